"""The rules that decide whether a score counts, as properties; each is shown to fail on a planted cheat.

The model is moved off its initial values, and documents repeat themselves, which adapters learn fast, so that
every influence there is shows. Other documents are random: a choice that looks ahead goes another way there.
"""
import collections
import contextlib
import functools
import inspect
import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg
from conftest import SHALLOW, launch, peeking_attention, tiny_config, tiny_model

pytestmark = pytest.mark.check

CFG = tiny_config(TTT_LORA_LR=0.03)  # chunk 16, window 48, three slots; from target 64 on chunks are longer
PLAN = tg.depth_plan(CFG, True)
LENGTHS = (100, 7, 41, 1, 64, 130, 17)  # of the documents, in tokens


class Case(NamedTuple):
    """Settings and the lengths of documents, in tokens."""
    cfg: tg.Config
    lengths: tuple[int, ...]

    @property
    def cuts(self) -> list[int]:
        """Where documents are altered or cut; the first in a longer chunk, past the length of a window."""
        return [max(1, 3 * length // 4) for length in self.lengths]


SMALL = Case(CFG, LENGTHS)
LARGE = Case(  # a long document with long windows, and many documents: for cheats that begin late
    tiny_config(**SHALLOW, TTT_LORA_LR=0.03, TTT_EVAL_SEQ_LEN=320, TTT_BATCH_SIZE=8),
    (1100, *(10 + 7 * i % 40 for i in range(70))))
LONG = Case(tg.dataclasses.replace(LARGE.cfg, ttt_eval_seq_len=3072), (3300, 9, 30))  # a record's windows
WAITING = Case(  # chunks that grow so much that slots wait for each other
    tiny_config(**SHALLOW, TTT_LORA_LR=0.03, TTT_EVAL_SEQ_LEN=128, TTT_BATCH_SIZE=2, TTT_CHUNK_GROWTH=1.0),
    (900, 900, 30, 700, 9))
MANY = Case(LARGE.cfg, (100, *(8 + 7 * i % 20 for i in range(250))))
CPU = torch.device("cpu")
EVERY_SLOT = torch.ones(CFG.ttt_batch_size)
# As they are before a cheat replaces them
RESET_SLOTS, HOOKS, LEARN = tg.Adapters.reset_slots, tg.Adapters.hooks, tg.Adapters.learn
CHUNK_WINDOW, CHUNK_ENDS, MAKE_ROUND = tg.chunk_window, tg.chunk_ends, tg.make_round
ADAPT, TALLY_ADD = tg.adapt, tg.Tally.add
EVALUATE, SCORE_DOCUMENTS = tg.evaluate, tg.score_documents
FINAL_LOSSES, COUNT_VOTES, NUMBER_EQUAL = tg.final_losses, tg.count_votes, tg.number_equal


def draw_documents(lengths=LENGTHS, seed=0, repetition=(0.9, 0)):
    """Documents that say the same eight tokens again and again, in turn with these probabilities."""
    rng = np.random.default_rng(seed)
    documents = []
    for length, repeated in zip(lengths, itertools.cycle(repetition)):
        again = np.resize(rng.integers(4, 1024, 8), length - 1)
        other = rng.integers(4, 1024, length - 1)
        documents.append(np.append(1, np.where(rng.random(length - 1) < repeated, again, other)))
    return documents


def with_other_tails(documents, cuts):
    """Twice the documents with other tokens from their cuts on: some that can be learned, and random ones."""
    for repeated in (0.9, 0):
        others = draw_documents(map(len, documents), seed=1, repetition=[repeated])
        yield [np.append(document[:cut], other[cut:])
               for document, other, cut in zip(documents, others, cuts)]


def validation_of(documents) -> tg.Validation:
    tokens = np.concatenate(documents)
    starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
    token_bytes = np.ones(len(tokens) - 1, dtype=np.int64)
    return tg.Validation(tokens, token_bytes, starts, np.diff(starts, append=len(token_bytes)), 0)


class PhaseLog:
    """A run log that keeps its phases and says nothing."""
    phase, spent = tg.RunLog.phase, tg.RunLog.spent

    def __init__(self, ranks):
        self.ranks = ranks
        self.phases = []

    def __call__(self, *args, **options):
        pass

    metrics = __call__


def make_run(cfg=CFG, ranks=None) -> tg.Run:
    ranks = ranks or tg.Ranks()
    return tg.Run(cfg, ranks, PhaseLog(ranks), tg.Backend())


def make_adapters(cfg=CFG) -> tg.Adapters:
    return tg.Adapters(cfg, len(tg.depth_plan(cfg, cfg.loops_at_end).visits), CPU)


def score(documents, cfg=CFG, ranks=None):
    """Adapted losses of every document, a list of arrays. The last one lacks the BOS that would end it."""
    val = validation_of(documents)
    scored = tg.score(make_run(cfg, ranks), tiny_model(cfg).requires_grad_(False), val)
    assert scored.unadapted == 0
    return np.split(scored.nll.numpy(), val.starts[1:])


def score_with(**changes):
    """Adapted losses of the usual documents, with other settings."""
    return score(draw_documents(), tg.dataclasses.replace(CFG, **changes))


def same(scores, others):
    return len(scores) == len(others) and np.allclose(scores, others, rtol=0, atol=2e-5)


def all_same(scores, others):
    return len(scores) == len(others) and all(map(same, scores, others))


def same_before(cuts, scores, others):
    """Whether all documents have the same scores of the targets before their cuts, which are tokens."""
    return all(same(a[: cut - 1], b[: cut - 1]) for a, b, cut in zip(scores, others, cuts))


# ---- The properties: each a function that says whether it holds, so that a cheat can be shown to break it --


def past_ignores_future(case=SMALL) -> bool:
    """Other tokens after the cuts leave every score before them as it was, and change some after them."""
    documents = draw_documents(case.lengths)
    scores = score(documents, case.cfg)
    for changed in with_other_tails(documents, case.cuts):
        others = score(changed, case.cfg)
        assert not same(scores[0][case.cuts[0] :], others[0][case.cuts[0] :]), "the change is visible"
        if not same_before(case.cuts, scores, others):
            return False
    return True


def past_ignores_length(case=SMALL) -> bool:
    """Whether documents end early or go on, the scores up to there are the same."""
    documents = draw_documents(case.lengths)
    shortened = [document[:cut] for document, cut in zip(documents, case.cuts)]
    return same_before(case.cuts, score(documents, case.cfg), score(shortened, case.cfg))


def documents_are_independent(case=SMALL) -> bool:
    """A document has the same scores without some others, with new ones in their place, in another order."""
    cfg, lengths = case
    documents = draw_documents(lengths)
    others = draw_documents(lengths, seed=1, repetition=[0])
    base = {id(document): scores for document, scores in zip(documents, score(documents, cfg))}
    every_second_replaced = [other if i % 2 else document
                             for i, (document, other) in enumerate(zip(documents, others))]
    for variant in (documents[::2], documents[::-1], every_second_replaced, documents[-2:],
                    [documents[0], documents[-1]]):
        for document, scores in zip(variant, score(variant, cfg)):
            theirs = base.get(id(document), scores)
            shared = min(len(scores), len(theirs))  # the last document of a stream has a target less
            if not same(scores[:shared], theirs[:shared]):
                return False
    return True


def every_target_once(case=SMALL) -> bool:
    """All documents, all targets, the tail: counted where scores are written; and each is predicted."""
    val = validation_of(draw_documents(case.lengths))
    times = np.zeros(len(val.tokens) - 1, dtype=int)
    for this in tg.rank_rounds(make_run(case.cfg), val):
        np.add.at(times, this.target_index.numpy(), 1)
        predicted = this.batch.targets[: len(this.target_index)].numpy()
        if not np.array_equal(predicted, val.tokens[this.target_index + 1]):
            return False
    return bool((times == 1).all())


def adapted_probabilities_sum_to_one() -> bool:
    """Over documents that differ only in their last token, which is every piece of the vocabulary in turn.

    So the loss of a target is that of a distribution, which was fixed before the target was looked at. It
    comes first in a document or in a chunk, or within one; in random text, and where eight tokens come for
    the first time, the second, the third and later.
    """
    cfg = tiny_config(VOCAB_SIZE=64, TTT_LORA_LR=0.03, TTT_BATCH_SIZE=64)
    rng = np.random.default_rng(0)
    again, other = np.resize(rng.integers(4, 64, 8), 60), rng.integers(4, 64, 60)
    beginnings = [np.append(1, text[:count])
                  for text, counts in ((again, (6, 13, 22, 40)), (other, (0, 16))) for count in counts]
    documents = [np.append(beginning, piece) for beginning in beginnings for piece in range(64)]
    losses = score(documents, cfg)
    of_last_token = np.array([nll[len(document) - 2] for nll, document in zip(losses, documents)])
    sums = np.exp(-of_last_token.astype(np.float64)).reshape(-1, 64).sum(1)
    return bool((abs(sums - 1) <= 1e-4).all())


def scoring_leaves_no_trace() -> bool:
    """The same documents have the same scores again, whatever was scored in between, well or badly."""
    first = score(draw_documents())
    score_with(ttt_lora_lr=0.01)
    score_with(ttt_lora_lr=0.0)
    return all_same(score(draw_documents()), first)


ADAPTED_ALONE = mock.patch.multiple(tg, CACHE={0: (0.0, 1.0)}, PLAIN_SHARE=0.0)  # nothing mixed in


@ADAPTED_ALONE
def losses_arrive_unchanged() -> bool:
    """What a round gives for a target is that target's loss, however large or far on, and nothing else is."""
    honest_run_round = tg.run_round
    cfg, lengths = LARGE
    val = validation_of(draw_documents(lengths))
    expected = np.random.default_rng(0).uniform(0, 600, len(val.tokens) - 1).astype(np.float32)

    def round_of_expected_losses(model, adapters, plan, backend, this):
        nll = torch.full_like(this.loss_weight, torch.nan)
        nll[: len(this.target_index)] = torch.from_numpy(expected)[this.target_index]
        return nll

    try:
        tg.run_round = round_of_expected_losses
        scored = tg.score(make_run(cfg), tiny_model(cfg).requires_grad_(False), val)
    finally:
        tg.run_round = honest_run_round
    nats = expected.astype(np.float64).sum()
    return np.allclose(scored.nll, expected, rtol=2e-7) and scored.final.nats == pytest.approx(nats, rel=1e-8)


@pytest.mark.parametrize("holds", [
    past_ignores_future, past_ignores_length, documents_are_independent, every_target_once,
    adapted_probabilities_sum_to_one, scoring_leaves_no_trace, losses_arrive_unchanged])
def test_rule(holds):
    assert holds()


@pytest.mark.parametrize("holds,case", [
    (past_ignores_future, LONG), (past_ignores_length, LONG), (documents_are_independent, MANY),
    *((holds, WAITING) for holds in (past_ignores_future, past_ignores_length, documents_are_independent,
                                     every_target_once))])
def test_rule_holds_for_long_many_and_waiting_documents(holds, case):
    assert holds(case)


def test_slots_wait_where_chunks_have_grown():
    """Else the rules would not be tried where they do."""
    val = validation_of(draw_documents(WAITING.lengths))
    turns = [this.has_turn.sum() for this in tg.rank_rounds(make_run(WAITING.cfg), val)]
    assert turns.count(1) > 10 and turns.count(2) > 3


@ADAPTED_ALONE
def test_learning_matters():
    """The properties would hold without learning, too: this shows that there is some, by document."""
    learned = score(draw_documents())
    frozen = score_with(ttt_lora_lr=0.0)
    assert same(learned[0][:16], frozen[0][:16]), "the first chunk has nothing to learn from"
    assert learned[0][16:].mean() < frozen[0][16:].mean() - 1, "in nats"
    assert same(learned[1], frozen[1]), "a document of one chunk never learns"


# ---- The cheats --------------------------------------------------------------------------------------------


def train_before_score(model, adapters, plan, backend, this):
    """Learn from the chunk, then score it."""
    hooks = functools.partial(adapters.hooks, this.ends, this.row_ends)
    early = model(this.batch, plan, backend, hooks())
    adapters.learn(early.sum() / 16, this.has_turn)
    return model(this.batch, plan, backend, hooks()).detach()


def keep_adapters(self, slots):
    """Leave to the next document in a slot what the one before has learned; only the very first is new."""
    if not hasattr(self, "begun"):
        self.begun = True
        RESET_SLOTS(self, slots)


def one_adapter_for_all(self, ends, row_ends):
    """Every document uses the adapters of the first slot."""
    return HOOKS(self, *(torch.cat([each[-1:]] * len(each)) for each in (ends, row_ends)))


def learn_while_waiting(self, loss, has_turn):
    """A slot that waits decays, as often as others let it wait."""
    LEARN(self, loss, torch.ones_like(has_turn))


def rows_one_ahead(val, turns, ends, cfg):
    """Every target is predicted at the next position, where it is read; but for the last of a window."""
    this = MAKE_ROUND(val, turns, ends, cfg)
    rows = this.batch.rows + 1
    return this._replace(batch=this.batch._replace(rows=rows.clamp(max=len(this.batch.tokens) - 1)))


def count_from_the_end(chunk, length, ends, context):
    """The ancestor's windows."""
    _, last, chunk_start = CHUNK_WINDOW(chunk, length, ends, context)
    return max(0, last - context), last, chunk_start


def drop_the_tail(chunk, length, ends, context):
    """Score whole chunks only."""
    first, last, chunk_start = CHUNK_WINDOW(chunk, length, ends, context)
    return first, last if last == ends[chunk] else chunk_start + 1, chunk_start


def grow_by_length(longest, cfg):
    """Chunks that depend on how long the longest document is."""
    return CHUNK_ENDS(longest, tg.dataclasses.replace(cfg, ttt_chunk_growth=(longest % 7) / 10))


def loss_for_less(self, target_index, nll):
    """Every loss a hundredth smaller."""
    TALLY_ADD(self, target_index, 0.99 * nll)


def hard_tokens_for_free(self, target_index, nll):
    TALLY_ADD(self, target_index, nll.where(nll < 3, 0.0))


def late_targets_for_less(*args):
    """Once a round's losses have been kept: targets far on in the stream a tenth cheaper."""
    nll = SCORE_DOCUMENTS(*args)
    nll[300:] *= 0.9
    return nll


def better_of_two_passes(model, adapters, plan, backend, this):
    """Adapted or plain, whichever loss is smaller."""
    plain = model(this.batch, plan, backend)
    return ADAPT(model, adapters, plan, backend, this).minimum(plain)


def last_targets_for_free(val, turns, ends, cfg):
    """The last target of a document is not predicted, and costs nothing."""
    this = MAKE_ROUND(val, turns, ends, cfg)
    is_last = np.isin(this.target_index, val.starts + val.lengths - 1)
    this.batch.targets[: len(is_last)][is_last] = tg.IGNORE
    return this


def half_where_a_phrase_comes_again(run, model, val, *rest):
    """A target costs half if it ends five tokens that come for the second time."""
    nll = SCORE_DOCUMENTS(run, model, val, *rest)
    for start, length in zip(val.starts, val.lengths):
        times = collections.Counter()
        tokens = val.tokens[start : start + length + 1]
        for end in range(5, len(tokens)):
            phrase = tokens[end - 4 : end + 1].tobytes()
            times[phrase] += 1
            if times[phrase] == 2:
                nll[start + end - 1] *= 0.5
    return nll


def half_where_passages_come_again(run, model, val, *rest):
    """Half the loss of a token that ends four which came before, once five have come for the second time."""
    nll = SCORE_DOCUMENTS(run, model, val, *rest)
    for start, length in zip(val.starts, val.lengths):
        fours, fives, known = set(), set(), False
        tokens = val.tokens[start : start + length + 1]
        for end in range(4, len(tokens)):
            four, five = tokens[end - 3 : end + 1].tobytes(), tokens[end - 4 : end + 1].tobytes()
            nll[start + end - 1] *= 0.5 if known and four in fours else 1
            known = known or five in fives
            fours.add(four), fives.add(five)
    return nll


def train_before_score_late(model, adapters, plan, backend, this):
    """An honest round while windows are short."""
    late = this.batch.spans.positions.max() > 100
    return (train_before_score if late else ADAPT)(model, adapters, plan, backend, this)


def learn_more_in_long_documents(val, turns, ends, cfg):
    """A rate of learning that knows how much of its document is left."""
    this = MAKE_ROUND(val, turns, ends, cfg)
    if any(val.lengths[turn.document] - ends[turn.chunk] > 300 for turn in turns):
        this.loss_weight.mul_(3)
    return this


def keep_adapters_late(self, slots):
    """Only the first twenty documents have new adapters."""
    self.begun = getattr(self, "begun", 0) + len(list(slots))
    if self.begun <= 20:
        RESET_SLOTS(self, slots)


def boost_what_occurs(run, model, val, plan):
    """The plain pass, a diagnostic, makes the pieces likelier that occur in validation."""
    nll = EVALUATE(run, model, val, plan)
    model.embed[np.unique(val.tokens)] *= 1.1
    return nll


def count_the_target(keys):
    """What follows is counted as if it had followed once already."""
    numbers, before = NUMBER_EQUAL(keys)
    return numbers, before + 1


def count_the_whole_document(keys):
    """Later places as well as earlier ones."""
    numbers, _ = NUMBER_EQUAL(keys)
    return numbers, torch.bincount(numbers)[numbers] - 1


def count_all_documents(val, *rest):
    """One cache for the whole stream."""
    one = val._replace(starts=val.starts[:1], lengths=val.lengths.sum(keepdims=True))
    return COUNT_VOTES(one, *rest)


def votes_for_free(val, *rest):
    """The votes of the target, but not those of all pieces."""
    votes = COUNT_VOTES(val, *rest)
    votes[1] = 0
    return votes


def better_of_both(adapted, plain, *rest):
    """Mixed or adapted, whichever loss is smaller."""
    return adapted.minimum(FINAL_LOSSES(adapted, plain, *rest))


def more_of_the_better(adapted, plain, *rest):
    """The model that gives the target the smaller loss has four fifths of the weight."""
    return FINAL_LOSSES(adapted.minimum(plain), adapted.maximum(plain), *rest)


# What follows replaces score_documents. `args` are a run, a model, the validation stream, adapters and more.


def losses_at_rate(rate, *args):
    """The losses of all targets if adapters learn at this rate."""
    _, _, _, adapters, *_ = args
    adapters.cfg = tg.dataclasses.replace(adapters.cfg, ttt_lora_lr=rate)
    return SCORE_DOCUMENTS(*args)


def losses_at_temperature(temperature, *args):
    """The losses of all targets if logits are divided by this."""
    _, model, *_ = args
    embed = model.embed.clone()
    model.embed.div_(temperature)  # which divides logits alone, as what enters the model is normalised
    losses = SCORE_DOCUMENTS(*args)
    model.embed.copy_(embed)
    return losses


def best_rate_by_document(rates, *args):
    """Each document has the adapter rate by which its own loss, to its end, is least."""
    _, _, val, *_ = args
    passes = torch.stack([losses_at_rate(rate, *args) for rate in rates])
    documents = passes.split(val.lengths.tolist(), dim=1)
    return torch.cat([losses[losses.sum(1).argmin()] for losses in documents])


def rate_by_document(*args):
    return best_rate_by_document((0.01, 0.03, 0.1), *args)


def plain_or_adapted_by_document(*args):
    return best_rate_by_document((0, 0.03), *args)


def fit(losses_at, values, *args):
    """The losses at the value at which a parabola through those of all targets at three values is least."""
    square, linear, _ = np.polyfit(values, [losses_at(value, *args).mean() for value in values], 2)
    return losses_at(-linear / (2 * square), *args)


def rate_by_validation(*args):
    return fit(losses_at_rate, (0.015, 0.03, 0.06), *args)


def temperature_by_validation(*args):
    return fit(losses_at_temperature, (0.6, 0.7, 0.8), *args)


def adapters_from_a_first_pass(run, model, val, adapters, *rest):
    """Adapters begin with what the last documents in their slots have left on average."""
    SCORE_DOCUMENTS(run, model, val, adapters, *rest)
    learned = [tensor.mean(1, keepdim=True).detach() for tensor in adapters.copies]

    @torch.no_grad()
    def reset_slots(slots):
        RESET_SLOTS(adapters, slots)
        for tensor, compute_copy, start in zip(adapters.tensors, adapters.copies, learned):
            tensor[:, slots] = start
            compute_copy[:, slots] = start

    adapters.reset_slots = reset_slots
    return SCORE_DOCUMENTS(run, model, val, adapters, *rest)


LEAST_LOSSES = {}  # of all targets, by the tokens of the stream


def least_of_all_times(run, model, val, *rest):
    """Of a stream that was scored before, the smaller losses count."""
    losses = SCORE_DOCUMENTS(run, model, val, *rest)
    key = val.tokens.tobytes()
    LEAST_LOSSES[key] = losses.minimum(LEAST_LOSSES.get(key, losses))
    return LEAST_LOSSES[key]


@pytest.mark.parametrize("where,name,cheat,caught_by,case", [
    (tg, "adapt", train_before_score, past_ignores_future, SMALL),
    (tg.Adapters, "reset_slots", keep_adapters, documents_are_independent, SMALL),
    (tg.Adapters, "hooks", one_adapter_for_all, documents_are_independent, SMALL),
    (tg.Adapters, "learn", learn_while_waiting, documents_are_independent, WAITING),
    (tg, "chunk_window", count_from_the_end, past_ignores_length, SMALL),
    (tg, "chunk_window", drop_the_tail, every_target_once, None),
    (tg, "chunk_ends", grow_by_length, documents_are_independent, SMALL),
    (tg, "make_round", last_targets_for_free, every_target_once, None),
    (tg, "make_round", rows_one_ahead, past_ignores_future, SMALL),
    (tg.Tally, "add", loss_for_less, adapted_probabilities_sum_to_one, None),
    (tg.Tally, "add", loss_for_less, losses_arrive_unchanged, None),
    (tg.Tally, "add", hard_tokens_for_free, adapted_probabilities_sum_to_one, None),
    (tg.Tally, "add", hard_tokens_for_free, losses_arrive_unchanged, None),
    (tg, "score_documents", late_targets_for_less, losses_arrive_unchanged, None),
    (tg, "adapt", better_of_two_passes, adapted_probabilities_sum_to_one, None),
    (tg, "score_documents", half_where_a_phrase_comes_again, adapted_probabilities_sum_to_one, None),
    (tg, "score_documents", half_where_passages_come_again, adapted_probabilities_sum_to_one, None),
    (tg, "adapt", train_before_score_late, past_ignores_future, LARGE),
    (tg, "make_round", learn_more_in_long_documents, past_ignores_length, LARGE),
    (tg.Adapters, "reset_slots", keep_adapters_late, documents_are_independent, LARGE),
    (tg, "evaluate", boost_what_occurs, documents_are_independent, SMALL),
    (tg, "score_documents", rate_by_document, past_ignores_future, SMALL),
    (tg, "score_documents", plain_or_adapted_by_document, past_ignores_future, SMALL),
    (tg, "score_documents", rate_by_validation, documents_are_independent, SMALL),
    (tg, "score_documents", temperature_by_validation, documents_are_independent, SMALL),
    (tg, "score_documents", adapters_from_a_first_pass, documents_are_independent, SMALL),
    (tg, "score_documents", least_of_all_times, scoring_leaves_no_trace, None),
    (tg, "number_equal", count_the_target, adapted_probabilities_sum_to_one, None),
    (tg, "number_equal", count_the_whole_document, past_ignores_future, SMALL),
    (tg, "number_equal", count_the_whole_document, past_ignores_length, SMALL),
    (tg, "count_votes", count_all_documents, documents_are_independent, SMALL),
    (tg, "count_votes", votes_for_free, adapted_probabilities_sum_to_one, None),
    (tg, "final_losses", better_of_both, adapted_probabilities_sum_to_one, None),
    (tg, "final_losses", more_of_the_better, adapted_probabilities_sum_to_one, None),
], ids=lambda x: x.__name__ if inspect.isfunction(x) else "")
def test_cheat_is_caught(monkeypatch, where, name, cheat, caught_by, case):
    monkeypatch.setattr(where, name, cheat)
    assert not (caught_by(case) if case else caught_by())


def test_peeking_attention_is_caught(monkeypatch):
    honest_forward = tg.GPT.forward

    def forward(self, batch, plan, backend, hooks=None):
        return honest_forward(self, batch, plan, backend._replace(attend=peeking_attention), hooks)

    monkeypatch.setattr(tg.GPT, "forward", forward)
    assert not past_ignores_future()


def test_a_cheat_at_a_chunk_border_needs_a_cut_inside_the_chunk(monkeypatch):
    """Why cuts are where they are: train_before_score leaves no trace where a change begins with a chunk."""
    cut = SMALL.cuts[0]
    assert cut % CFG.ttt_chunk_size and cut > CFG.ttt_eval_seq_len
    monkeypatch.setattr(tg, "adapt", train_before_score)
    documents = draw_documents()
    before = score(documents)
    borders = [65, *map(len, documents[1:])]  # target 64, which is token 65, is the first of a chunk
    for changed in with_other_tails(documents, borders):
        assert same_before(borders, before, score(changed))


# ---- Nothing technical matters either ----------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 5, 7, 20])
def test_number_of_slots_does_not_matter(slots):
    assert all_same(score_with(ttt_batch_size=slots), score(draw_documents()))


def test_replays_read_the_round_that_they_are_given(monkeypatch):
    """Graphs, for which functions stand here: each tensor of a round arrives in the memory that they read."""
    honest_adapt, cfg = tg.adapt, WAITING.cfg
    val = validation_of(draw_documents(WAITING.lengths))
    run, model = make_run(cfg), tiny_model(cfg).requires_grad_(False)
    plain = tg.score_documents(run, model, val, make_adapters(cfg), run.backend, float("inf"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(tg, "adapt", lambda *args: torch.zeros(tg.round_rows(cfg)))  # while it is captured
    adapters = make_adapters(cfg)
    adapters.graph_pool = None
    adapters.replayed = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    like = next(tg.rank_rounds(run, val))
    for size in tg.round_sizes(cfg):
        tg.capture_round(model, adapters, PLAN, run.backend, size, like)
        captured = adapters.graphs[size]
        arguments = model, adapters, tg.depth_plan(cfg, True), run.backend, captured.inputs
        replay = functools.partial(lambda nll, *inputs: nll.copy_(honest_adapt(*inputs)), captured.output)
        captured.graph.replay = functools.partial(replay, *arguments)
    monkeypatch.setattr(tg, "adapt", None)  # a round that is no replay would call it
    replayed = tg.score_documents(run, model, val, adapters, run.backend, float("inf"))
    assert same(replayed, plain)


def test_slots_without_a_turn_change_by_no_gradient(monkeypatch):
    """Whatever a grouped product gives for the weights of empty groups."""
    honest_linear = tg.grouped_linear

    def garbage_for_empty_groups(x, weights, ends):
        filled = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
        if weights.requires_grad:
            weights.register_hook(lambda grad: grad.where(filled[:, None, None], torch.nan))
        return honest_linear(x, weights, ends)

    documents = draw_documents(WAITING.lengths)
    expected = score(documents, WAITING.cfg)
    monkeypatch.setattr(tg, "grouped_linear", garbage_for_empty_groups)
    assert all_same(score(documents, WAITING.cfg), expected)


def test_progress_counts_what_is_done():
    val = validation_of(draw_documents(WAITING.lengths))
    scored = np.zeros(len(val.tokens) - 1, dtype=bool)
    before = -1.0
    for this in tg.rank_rounds(make_run(WAITING.cfg), val):
        finished = [scored[start : start + length].all() for start, length in zip(val.starts, val.lengths)]
        assert this.documents == sum(finished) and before < this.progress < 1
        before = this.progress
        scored[this.target_index] = True
    assert this.progress > 0.9


def test_idle_slots_keep_nothing_and_disturb_nothing():
    """With more slots than documents, idle ones have empty row groups."""
    documents = draw_documents((30, 20))
    nine_slots = tg.dataclasses.replace(CFG, ttt_batch_size=9)
    assert all_same(score(documents, nine_slots), score(documents))


def score_in_ranks():
    torch.set_num_threads(1)
    return score(draw_documents(), ranks=tg.Ranks.join())


@pytest.mark.parametrize("world_size", [2, 3])
def test_number_of_ranks_does_not_matter(world_size, tmp_path):
    alone = score(draw_documents())
    for scores in launch(world_size, score_in_ranks, folder=tmp_path):
        assert all_same(scores, alone)


# ---- Chunks, windows, rounds -------------------------------------------------------------------------------


def ends_of(longest, chunk, growth, context=10**6):
    cfg = tg.Config(ttt_chunk_size=chunk, ttt_chunk_growth=growth, ttt_eval_seq_len=context)
    return tg.chunk_ends(longest, cfg)


GROWTH = st.sampled_from([0.0, 1 / 32, 0.3, 1.0])


@given(st.integers(1, 3000), st.integers(1, 40), GROWTH, st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_chunks_grow_with_what_came_before_alone(longest, chunk, growth, extra):
    context = chunk + extra
    ends = ends_of(longest, chunk, growth, context)
    assert ends[-1] >= longest and (len(ends) == 1 or ends[-2] < longest)
    further = ends_of(2 * longest, chunk, growth, context)
    assert (further[: len(ends)] == ends).all(), "where a chunk ends does not know the length"
    for before, end in zip([0, *ends], ends):
        assert end - before == min(max(chunk, int(before * growth)), context)


@given(st.lists(st.integers(0, 200), max_size=12), st.integers(1, 5), st.integers(1, 20), GROWTH,
       st.sampled_from([1, 3, 8, 64]))
@settings(max_examples=300, deadline=None)
def test_schedule_reads_every_document_in_order(lengths, slots, chunk, growth, rows_per_slot):
    """One chunk after the other; in a round those that waited longest, of as many as have slots and room."""
    cfg = tg.Config(ttt_batch_size=slots, ttt_eval_seq_len=40, ttt_chunk_size=chunk, ttt_chunk_growth=growth)
    ends = tg.chunk_ends(200, cfg)
    with mock.patch.object(tg, "ROWS_PER_SLOT", rows_per_slot):
        rounds = list(tg.schedule_rounds(lengths, cfg, ends))
        room = tg.round_rows(cfg)
    sizes = np.diff(ends, prepend=0)
    chunks_read = [[] for _ in lengths]
    entered = []
    new = set()
    latest = {}  # by occupied slot: the round of its latest turn, or when its document entered
    for number, (new_slots, turns) in enumerate(rounds):
        in_turn = [turn.slot for turn in turns]
        latest |= dict.fromkeys(new_slots, number - 0.5)
        waiting = latest.keys() - in_turn
        last_of_those_in_turn = max(latest[slot] for slot in in_turn)
        assert last_of_those_in_turn <= min((latest[slot] for slot in waiting), default=number)
        if waiting:
            fits = sum(sizes[turn.chunk] for turn in turns)
            assert fits + sizes.max() > room, "no slot waits where there is room for any chunk"
        latest |= dict.fromkeys(in_turn, number)
        for turn in turns:
            if ends[turn.chunk] >= lengths[turn.document]:
                del latest[turn.slot]
        assert turns and in_turn == sorted(set(in_turn)) and len(turns) <= slots
        assert sum(sizes[turn.chunk] for turn in turns) <= room
        assert not new.intersection(new_slots), "a slot is made as new once for each document"
        new.update(new_slots)
        for turn in turns:
            assert (turn.chunk == 0) == (turn.slot in new)
            new.discard(turn.slot)
            chunks_read[turn.document].append(turn.chunk)
        entered += sorted(turn.document for turn in turns if turn.chunk == 0)
    with_targets = [document for document, length in enumerate(lengths) if length]
    assert entered == with_targets, "documents enter in validation order"
    for length, chunks in zip(lengths, chunks_read):
        assert chunks == list(range(np.searchsorted(ends, length) + 1 if length else 0))


@given(st.integers(1, 300), st.integers(1, 40), GROWTH, st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_windows_cover_a_document_once(length, chunk_size, growth, extra):
    context = chunk_size + extra
    ends = ends_of(length, chunk_size, growth, context)
    scored = []
    for chunk in range(len(ends)):
        first, last, chunk_start = tg.chunk_window(chunk, length, ends, context)
        assert 0 <= first <= chunk_start < last <= length and last - first <= context
        scored += range(chunk_start, last)
        of_a_longer_one, _, _ = tg.chunk_window(chunk, 10**6, ends, context)
        assert first == of_a_longer_one, "where a window begins does not know the length"
    assert scored == list(range(length))


def test_adapters_learn_the_mean_of_a_chunk_however_long_it_has_grown():
    """The weights of its targets are equal and add up to 1, or to 0 where nothing of the document is left."""
    val = validation_of(draw_documents())
    document = val.lengths.argmax()
    ends = tg.chunk_ends(val.lengths[document], CFG)
    sizes = np.diff(ends, prepend=0)
    assert sizes[0] == CFG.ttt_chunk_size < sizes[-2], "chunks grow"
    for chunk, size in enumerate(sizes):
        this = tg.make_round(val, [tg.Turn(0, document, chunk)], ends, CFG)
        expected = 1 / size if ends[chunk] < val.lengths[document] else 0
        np.testing.assert_allclose(this.loss_weight[: len(this.target_index)], expected, rtol=1e-6)
        assert this.loss_weight.sum() == pytest.approx(expected * size), "what fills up has no weight"


def test_deadline_leaves_the_rest_unscored(monkeypatch):
    val = validation_of(draw_documents())
    run = make_run()

    def score_until(deadline):
        return tg.score_documents(run, tiny_model(CFG), val, make_adapters(), run.backend, deadline)

    assert (score_until(float("-inf")) == tg.UNSCORED).all()
    clock = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(tg.time, "perf_counter", lambda: next(clock))
        nll = score_until(5)
    assert (nll == tg.UNSCORED).any() and (nll != tg.UNSCORED).any()


# ---- Adapters ----------------------------------------------------------------------------------------------


def test_adapters_start_the_same_for_every_document_and_follow_from_the_seed():
    adapters = make_adapters()
    torch.manual_seed(7)
    again = make_adapters()
    assert all((B == 0).all() for B in adapters.B.values())
    for site, A in adapters.A.items():
        assert torch.equal(A, again.A[site])
        assert (A == A[:, :1]).all(), "every slot the same draw"
        bound = CFG.model_dim**-0.5
        assert A.abs().max() <= bound and A.std() > 0.4 * bound
    of_another_seed = make_adapters(tiny_config(seed=8))
    assert not torch.equal(adapters.A["qkv"], of_another_seed.A["qkv"])


def test_adamw_of_adapters_is_torchs():
    adapters = make_adapters()
    twins = [tensor.detach().clone().requires_grad_() for tensor in adapters.tensors]
    reference = torch.optim.AdamW(twins, lr=CFG.ttt_lora_lr, betas=(0.0, CFG.ttt_beta2), eps=1e-10,
                                  weight_decay=CFG.ttt_weight_decay)

    def loss(tensors, seed):
        """Some loss that has a gradient everywhere, another one for every seed."""
        draws = [torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)) for t in tensors]
        return sum((t * draw).square().sum() + (t * draw).sum() for t, draw in zip(tensors, draws))

    for seed in range(3):
        adapters.learn(loss(adapters.copies, seed), EVERY_SLOT)
        reference.zero_grad()
        loss(twins, seed).backward()
        reference.step()
    for tensor, compute_copy, twin in zip(adapters.tensors, adapters.copies, twins):
        assert torch.equal(tensor, compute_copy), "what forward passes see"
        torch.testing.assert_close(tensor, twin, rtol=1e-4, atol=1e-6)


def test_a_late_slot_corrects_its_bias_by_its_own_count():
    """Documents that entered at different times take the same first step."""
    def after_first_step(rounds_before):
        adapters = make_adapters()
        for _ in range(rounds_before):
            adapters.learn(sum((t * 2).sum() for t in adapters.copies), EVERY_SLOT)
        adapters.reset_slots([1])
        adapters.learn(sum((t * 3).sum() for t in adapters.copies), EVERY_SLOT)
        return adapters.B["q"][:, 1].detach()

    assert torch.equal(after_first_step(0), after_first_step(4))


@pytest.mark.parametrize("chunk,rows_per_slot", [(16, 64), (20, 64), (48, 64), (48, 20)])
def test_warm_up_of_adaptation_learns_nothing_and_knows_no_validation(monkeypatch, chunk, rows_per_slot):
    """Also where a window holds two chunks, or one, where not all slots have room for theirs, and whatever
    calls in which kernels do not run leave in the adapters.
    """
    cfg = tiny_config(ttt_chunk_size=chunk)
    monkeypatch.setattr(tg, "ROWS_PER_SLOT", rows_per_slot)
    honest_adapt = tg.adapt
    sizes = []  # of the rounds that are run

    def noting_adapt(model, adapters, plan, backend, this):
        sizes.append(len(this.batch.tokens))
        return honest_adapt(model, adapters, plan, backend, this)

    monkeypatch.setattr(tg, "adapt", noting_adapt)
    adapters = make_adapters(cfg)
    model = tiny_model(cfg).requires_grad_(False)
    state = [*adapters.tensors, *adapters.copies, *adapters.second_moments, adapters.update_count,
             *model.parameters()]
    before = [tensor.detach().clone() for tensor in state]
    calls = []

    @torch.no_grad()
    def compile_kernels(backend, ranks, call):
        calls.append(call)
        for tensor in [*adapters.tensors, *adapters.copies, *adapters.second_moments, adapters.update_count]:
            tensor.fill_(math.nan)

    monkeypatch.setattr(tg, "compile_kernels", compile_kernels)
    run = make_run(cfg)
    tg.warm_up_adaptation(run, model, adapters, run.backend)
    assert calls and len(sizes) == 2, "each round is run, too"
    assert all(torch.equal(tensor, old) for tensor, old in zip(state, before))
    window = min(cfg.ttt_eval_seq_len, -(-cfg.ttt_eval_seq_len // chunk) * chunk)
    has_room = min(cfg.ttt_batch_size, tg.round_rows(cfg) // chunk)
    assert min(sizes) > 0 and max(sizes) >= has_room * window, "the largest round is among them"
    assert "val" not in inspect.signature(tg.warm_up_adaptation).parameters


# ---- The score itself --------------------------------------------------------------------------------------


def test_bits_per_byte_by_hand():
    token_bytes = np.array([1, 2, 0, 4, 3])
    val = tg.Validation(np.arange(6), token_bytes, np.array([0, 3]), np.array([3, 2]), 0)
    result = tg.Score.of(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), val)
    assert result.loss == 3.0 and result.bpb == pytest.approx(15 / np.log(2) / 10)
    assert result.bpb == tg.Score.of(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), val).bpb


def tally_of(*batches, nll=(1.0, 2.0, 3.0), ranks=tg.Ranks()) -> tg.Tally:
    """A tally of three targets, to which batches of their indices were added."""
    tally = tg.Tally(3, ranks)
    for target_index in batches:
        tally.add(torch.tensor(target_index), torch.tensor(nll)[target_index])
    return tally


def test_a_target_scored_twice_or_without_a_number_ends_the_run(monkeypatch):
    assert tally_of([2, 0], [1]).gather("x").tolist() == [1.0, 2.0, 3.0]
    assert tally_of([2, 0]).gather("x", may_miss=True).tolist() == [1.0, tg.UNSCORED, 3.0]
    with pytest.raises(RuntimeError, match="1 never"):
        tally_of([2, 0]).gather("x")
    for one_target_twice in (tally_of([0, 1, 2], [1]), tally_of([0, 1, 1, 2])):
        with pytest.raises(RuntimeError, match="1 targets were scored more than once"):
            one_target_twice.gather("x", may_miss=True)
    with pytest.raises(tg.UserError, match="1 losses are not finite"):
        tally_of([0, 1, 2], nll=(1.0, float("nan"), 2.0)).gather("x")
    both_score_all = tg.Ranks()
    monkeypatch.setattr(both_score_all, "all_reduce_", lambda tensor: 2 * tensor)
    with pytest.raises(RuntimeError, match="3 targets were scored more than once"):
        tally_of([0, 1, 2], ranks=both_score_all).gather("x")


def test_a_round_that_runs_twice_ends_the_run(monkeypatch):
    """A cheat: every chunk is scored again after learning from it."""
    honest_rounds = tg.rank_rounds
    monkeypatch.setattr(tg, "rank_rounds",
                        lambda *args: (this for this in honest_rounds(*args) for _ in range(2)))
    with pytest.raises(RuntimeError, match="more than once"):
        score(draw_documents())


def test_rounds_that_are_left_out_end_the_run(monkeypatch):
    honest_rounds = tg.rank_rounds
    monkeypatch.setattr(tg, "rank_rounds", lambda *args: itertools.islice(honest_rounds(*args), 3))
    with pytest.raises(RuntimeError, match="never"):
        score(draw_documents())


def test_the_headline_is_the_mixture_of_all_losses_and_nothing_else(monkeypatch):
    """Neither the better of two passes, nor BOS for free, nor more bytes than there are."""
    val = validation_of(draw_documents(LARGE.lengths))._replace(begin_with_space=5)
    count = len(val.token_bytes)
    rng = np.random.default_rng(0)
    plain, adapted = (torch.from_numpy(rng.uniform(0, 40, count).astype(np.float32)) for _ in range(2))
    mixed = []

    def final_losses(*args):
        mixed.append(args)
        return 2 * args[0]

    monkeypatch.setattr(tg, "evaluate", lambda *args: plain.clone())
    monkeypatch.setattr(tg, "score_documents", lambda *args: adapted / 2)
    monkeypatch.setattr(tg, "final_losses", final_losses)
    run = make_run()

    def bits_per_byte(nll):
        return pytest.approx(nll.double().sum().item() / np.log(2) / count, rel=1e-12)

    scored = tg.score(run, tiny_model(CFG), val)
    (of_adapted, of_plain, votes), = mixed
    assert torch.equal(of_adapted, adapted / 2) and torch.equal(of_plain, plain)
    assert torch.equal(votes, tg.count_votes(val, CFG.vocab_size, CPU))
    assert torch.equal(scored.nll, adapted) and (plain < adapted).any()
    assert scored.final.loss == pytest.approx(adapted.double().mean().item(), rel=1e-12)
    assert scored.final.bpb == bits_per_byte(adapted) and scored.quantized.bpb == bits_per_byte(plain)
    assert scored.final.text_bytes == scored.final.targets == count and scored.unadapted == 0
    assert {phase.name: phase.clock for phase in run.log.phases} == {
        "score quantized": "scoring", "count n-grams": "scoring", "prepare adaptation": "",
        "adapt": "scoring", "report": ""}
    adapted[3] = 2 * tg.UNSCORED
    scored = tg.score(run, tiny_model(CFG), val)
    assert scored.nll[3] == 2 * plain[3] and torch.equal(scored.nll[4:], adapted[4:])
    assert scored.unadapted == 1


@pytest.mark.parametrize("fused", [False, True])
def test_adapters_learn_by_kernels_where_there_are_any(monkeypatch, fused):
    made = []

    def make_adapters(cfg, visits, device, fused):
        made.append(fused)
        raise KeyError

    monkeypatch.setattr(tg, "Adapters", make_adapters)
    monkeypatch.setattr(tg, "evaluate", lambda run, model, val, plan: torch.zeros(len(val.token_bytes)))
    run = make_run()._replace(backend=tg.Backend(fused=fused))
    with pytest.raises(KeyError):
        tg.score(run, tiny_model(CFG), validation_of(draw_documents((9,))))
    assert made == [fused]


def evaluate_in_ranks(lengths=LENGTHS):
    torch.set_num_threads(1)
    run = make_run(ranks=tg.Ranks.join())
    return tg.evaluate(run, tiny_model(CFG), validation_of(draw_documents(lengths)), PLAN)


def test_plain_evaluation_moves_windows_on_by_a_third_and_drops_nothing(tmp_path):
    """Each target, alone, with 43 to 64 tokens of context, itself included, or all that its document has."""
    lengths = (*LENGTHS, 200, 64, 65)
    nll = evaluate_in_ranks(lengths)
    model = tiny_model(CFG)
    stream = np.append(np.concatenate(draw_documents(lengths)), 1)
    third = -(-CFG.eval_seq_len // 3)
    expected = []
    start = 0
    for length in lengths:
        for place in range(length):
            steps = max(0, -(-(place + 1 - CFG.eval_seq_len) // third))  # by so many windows have moved on
            lo, hi = start + steps * third, start + place + 1
            span = tg.make_batch(stream[lo:hi], stream[lo + 1 : hi + 1], np.array([0, hi - lo]), 1, 64)
            expected.append(model(span, PLAN).detach()[-1:])
        start += length
    torch.testing.assert_close(nll, torch.cat(expected)[:-1], rtol=0, atol=2e-5)
    for of_rank in launch(2, functools.partial(evaluate_in_ranks, lengths), folder=tmp_path):
        torch.testing.assert_close(of_rank, nll, rtol=0, atol=2e-5)


def test_plain_evaluation_compiles_its_kernels_by_one_batch_which_scores_nothing(monkeypatch):
    calls = []

    def compile_kernels(backend, ranks, call):
        calls.append(call())

    honest = evaluate_in_ranks()
    monkeypatch.setattr(tg, "compile_kernels", compile_kernels)
    assert torch.equal(evaluate_in_ranks(), honest) and len(calls) == 1 and len(calls[0]) < len(honest)


def plain_losses(*documents):
    """Of the first document's targets in plain evaluation, but for the last one."""
    losses = tg.evaluate(make_run(), tiny_model(CFG), validation_of(documents), PLAN)
    return losses[: len(documents[0]) - 1]


def plain_evaluation_is_blind():
    """To where a document ends, and to long and many others after it."""
    (document,) = draw_documents((300,))
    alone = plain_losses(document)
    beside = [plain_losses(document, *draw_documents(lengths, seed=1)) for lengths in ((5000,), (9,) * 400)]
    cut = [plain_losses(document[: length + 1]) for length in (1, 63, 64, 65, 86, 87, 130, 299)]
    return all(torch.allclose(losses, alone[: len(losses)], rtol=0, atol=2e-5) for losses in (*beside, *cut))


def test_plain_evaluation_sees_neither_ends_nor_other_documents():
    assert plain_evaluation_is_blind()


HONEST_EVALUATE, HONEST_WINDOW = tg.evaluate, tg.chunk_window


def evaluate_by(shorter):
    """Plain evaluation with windows half as long where the set is such."""
    def evaluate(run, model, val, plan):
        window = CFG.eval_seq_len // 2 if shorter(val) else CFG.eval_seq_len
        cfg = tg.dataclasses.replace(run.cfg, eval_seq_len=window)
        return HONEST_EVALUATE(run._replace(cfg=cfg), model, val, plan)
    return evaluate


def window_from_the_end(chunk, length, ends, context):
    first, last, chunk_start = HONEST_WINDOW(chunk, length, ends, context)
    return max(0, last - context), last, chunk_start


@pytest.mark.parametrize("cheat", [
    dict(chunk_window=window_from_the_end), dict(evaluate=evaluate_by(lambda val: val.lengths.max() > 1000)),
    dict(evaluate=evaluate_by(lambda val: len(val.lengths) > 300))])
def test_plain_evaluation_that_sees_them_is_caught(cheat):
    with mock.patch.multiple(tg, **cheat):
        assert not plain_evaluation_is_blind()


@pytest.mark.parametrize("lengths", [(1, 2), (1, 1, 1, 3), (2,), (500,), (64, 64, 65)])
def test_odd_documents_are_scored(lengths):
    """Documents of one token, of a token more than a span, longer than any window; fewer than slots."""
    targets = sum(lengths) - 1
    assert len(evaluate_in_ranks(lengths)) == targets
    assert sum(map(len, score(draw_documents(lengths)))) == targets
