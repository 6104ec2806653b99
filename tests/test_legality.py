"""The rules that decide whether a score counts, as properties; each is shown to fail on a planted cheat.

The model is moved off its initial values and adapters learn fast, so that every influence that exists is visible.
"""
import itertools

import numpy as np
import pytest
import torch
from conftest import launch, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

CFG = tiny_config()  # chunk 16, window 48, three slots; from target 64 on chunks are longer
PLAN = tg.depth_plan(CFG, True)
LENGTHS = (100, 7, 41, 1, 64, 130, 17)
CUT = 75  # in the middle of a longer chunk, past the length of a window


def documents(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [np.append(1, rng.integers(4, 1024, n - 1)) for n in lengths]


def validation(docs) -> tg.Validation:
    tokens = np.concatenate(docs)
    starts = np.cumsum([0] + [len(d) for d in docs[:-1]])
    size = np.ones(len(tokens) - 1, dtype=np.int64)
    return tg.Validation(tokens, size, starts, np.diff(starts, append=len(size)), 0)


def score(docs, cfg=CFG, ranks=None, ops=tg.Ops()):
    """Scores of every document, a list of arrays; the last one lacks the BOS that would end it."""
    val, ranks = validation(docs), ranks or tg.Ranks()
    run = tg.Run(cfg, ranks, lambda *a, **k: None, ops)
    adapters = tg.Adapters(cfg, len(PLAN.encoder + PLAN.decoder), torch.device("cpu"))
    model = tiny_model(cfg).requires_grad_(False)
    nll = tg.score_documents(run, model, val, adapters, ops, float("inf"))
    assert (nll != tg.UNSCORED).all()
    return [nll[a : a + n].numpy() for a, n in zip(val.starts, val.lengths)]


def same(a, b):
    return len(a) == len(b) and np.allclose(a, b, rtol=0, atol=2e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The properties. Each is a function that says whether it holds, so that a cheat can be shown to break it.


def past_ignores_future() -> bool:
    """Other tokens after CUT leave every score before it as it was, and change some after it."""
    docs, other = documents(), documents()
    other[0][CUT:] = documents(seed=1)[0][CUT:]
    a, b = score(docs), score(other)
    assert not same(a[0][CUT:], b[0][CUT:]), "the change is visible"
    return same(a[0][: CUT - 1], b[0][: CUT - 1])  # target CUT - 1 is the first changed token itself


def past_ignores_length() -> bool:
    """Ending a document early, or going on, leaves the scores up to there as they were."""
    docs, short = documents(), documents()
    short[0] = short[0][:CUT]
    a, b = score(docs), score(short)
    return same(a[0][: CUT - 1], b[0][: CUT - 1])


def documents_are_independent() -> bool:
    """Without some documents, with others in their place, in another order, a document's scores are the same."""
    docs, other = documents(), documents(seed=1)
    base = score(docs)
    last = docs[6]
    variants = [[docs[0], docs[2], docs[5], last], [docs[5], docs[4], docs[1], docs[2], docs[3], docs[0], last],
                [other[0], docs[1], other[5], docs[3], docs[4], docs[5], last], [docs[5], last], [docs[0], last]]
    for variant in variants:
        for d, scores in zip(variant, score(variant)):
            at = [i for i, original in enumerate(docs) if original is d]
            if at and not same(scores, base[at[0]]):
                return False
    return True


def every_target_once() -> bool:
    """All documents, all targets, the tail: counted where scores are written."""
    docs, count = documents(), np.zeros(sum(LENGTHS) - 1, dtype=int)
    run = tg.Run(CFG, tg.Ranks(), lambda *a, **k: None, tg.Ops())
    for _, this, *_ in tg.rounds(run, validation(docs)):
        np.add.at(count, this.where.numpy(), 1)
    return bool((count == 1).all())


PROPERTIES = [past_ignores_future, past_ignores_length, documents_are_independent, every_target_once]


@pytest.mark.parametrize("holds", PROPERTIES)
def test_rule(holds):
    assert holds()


def test_learning_matters():
    """The properties above would hold without learning too; this shows that there is some, and that it is per document."""
    docs = documents()
    docs[0][48:] = docs[0][:52]  # a document that repeats itself can be learned
    learned, frozen = score(docs), score(docs, tg.dataclasses.replace(CFG, ttt_lora_lr=0.0))
    assert same(learned[0][:16], frozen[0][:16]), "the first chunk has nothing to learn from"
    assert not same(learned[0][16:], frozen[0][16:])
    assert same(learned[1], frozen[1]), "a document of one chunk never learns"


# ----------------------------------------------------------------------------------------------------------------------
# The cheats


def train_before_score(model, adapters, plan, ops, this):
    """Learn from the chunk, then score it."""
    tap = lambda: adapters.tap(this.ends)
    chunk = torch.zeros(len(this.weight))
    chunk[this.scored] = 1 / 16
    adapters.learn((model(this.batch, plan, ops, tap()) * chunk).sum())
    return model(this.batch, plan, ops, tap()).detach()


def keep_adapters(self, slots):
    """Leave to the next document in a slot what the one before has learned; only the very first is new."""
    if not hasattr(self, "begun"):
        self.begun = True
        ENTER(self, slots)


ENTER = tg.Adapters.enter


def one_adapter_for_all(self, ends):
    """Every document uses the adapters of the first slot."""
    return TAP(self, torch.cat([ends[-1:]] * len(ends)))


TAP = tg.Adapters.tap


def count_from_the_end(c, length, ends, context):
    """The ancestor's windows."""
    _, last, own = WINDOW(c, length, ends, context)
    return max(0, last - context), last, own


def drop_the_tail(c, length, ends, context):
    """Score whole chunks only."""
    first, last, own = WINDOW(c, length, ends, context)
    return first, last if last == ends[c] else own + 1, own


def grow_by_length(longest, cfg):
    """Chunks that depend on how long the longest document is."""
    return CHUNK_ENDS(longest, tg.dataclasses.replace(cfg, ttt_chunk_growth=(longest % 7) / 10))


WINDOW, CHUNK_ENDS = tg.window, tg.chunk_ends


def not_causal(q, k, v, seqs):
    return torch.cat([torch.nn.functional.scaled_dot_product_attention(
        *(t[lo:hi].transpose(0, 1) for t in (q, k, v)), enable_gqa=True).transpose(0, 1)
        for lo, hi in zip(seqs.cu_seqlens[:-1], seqs.cu_seqlens[1:]) if hi > lo])


@pytest.mark.parametrize("where,name,cheat,caught_by", [
    (tg, "adapt", train_before_score, past_ignores_future),
    (tg.Adapters, "enter", keep_adapters, documents_are_independent),
    (tg.Adapters, "tap", one_adapter_for_all, documents_are_independent),
    (tg, "window", count_from_the_end, past_ignores_length),
    (tg, "window", drop_the_tail, every_target_once),
    (tg, "chunk_ends", grow_by_length, documents_are_independent),
], ids=lambda x: getattr(x, "__name__", None))
def test_cheat_is_caught(monkeypatch, where, name, cheat, caught_by):
    monkeypatch.setattr(where, name, cheat)
    assert not caught_by()


def test_peeking_attention_is_caught(monkeypatch):
    original = tg.GPT.forward
    monkeypatch.setattr(tg.GPT, "forward", lambda self, batch, plan, ops, tap=None: original(
        self, batch, plan, ops._replace(attend=not_causal), tap))
    assert not past_ignores_future()


def test_a_cheat_at_a_chunk_border_needs_a_cut_inside_the_chunk(monkeypatch):
    """Why CUT is where it is: train-before-score leaves no trace when the change begins exactly with a chunk."""
    assert CUT % CFG.ttt_chunk_size and CUT > CFG.ttt_eval_seq_len
    monkeypatch.setattr(tg, "adapt", train_before_score)
    docs, other = documents(), documents()
    border = 65  # target 64 is the first of a chunk, and token 65
    other[0][border:] = documents(seed=1)[0][border:]
    assert same(score(docs)[0][: border - 1], score(other)[0][: border - 1])


# ----------------------------------------------------------------------------------------------------------------------
# Nothing technical matters either


@pytest.mark.parametrize("slots", [1, 2, 5, 7, 20])
def test_number_of_slots_does_not_matter(slots):
    base = score(documents())
    other = score(documents(), tg.dataclasses.replace(CFG, ttt_batch_size=slots))
    assert all(same(a, b) for a, b in zip(base, other))


def score_in_ranks():
    torch.set_num_threads(1)
    return score(documents(), ranks=tg.Ranks.join())


@pytest.mark.parametrize("world", [2, 3])
def test_number_of_ranks_does_not_matter(world, tmp_path):
    base = score(documents())
    for scores in launch(world, score_in_ranks, folder=tmp_path):
        assert all(same(a, b) for a, b in zip(base, scores))


def ends_of(longest, chunk, growth, context=10**9):
    return tg.chunk_ends(longest, tg.Config(ttt_chunk_size=chunk, ttt_chunk_growth=growth, ttt_eval_seq_len=context))


GROWTH = st.sampled_from([0.0, 1 / 32, 0.3, 1.0])


@given(st.integers(1, 3000), st.integers(1, 40), GROWTH, st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_chunks_grow_with_what_came_before_alone(longest, chunk, growth, extra):
    ends = ends_of(longest, chunk, growth, chunk + extra)
    assert ends[-1] >= longest and (len(ends) == 1 or ends[-2] < longest)
    more = ends_of(2 * longest, chunk, growth, chunk + extra)
    assert (more[: len(ends)] == ends).all(), "where a chunk ends does not know the length"
    for before, end in zip([0, *ends], ends):
        assert end - before == min(max(chunk, int(before * growth)), chunk + extra)


@given(st.lists(st.integers(0, 70), max_size=12), st.integers(1, 5), st.integers(1, 20), GROWTH)
@settings(max_examples=100, deadline=None)
def test_schedule_reads_every_document_in_order(lengths, slots, chunk, growth):
    seen, order, ends = {d: [] for d in range(len(lengths))}, [], ends_of(70, chunk, growth)
    for entering, turns in tg.schedule(lengths, slots, ends):
        assert turns and [slot for slot, _, _ in turns] == sorted({slot for slot, _, _ in turns}) and len(turns) <= slots
        for slot, d, c in turns:
            assert (c == 0) == (slot in entering)
            seen[d].append(c)
            order += [d] * (c == 0)
    assert order == [d for d, n in enumerate(lengths) if n], "documents enter in validation order"
    for n, chunks in zip(lengths, seen.values()):
        assert chunks == list(range(np.searchsorted(ends, n) + 1 if n else 0))


@given(st.integers(1, 300), st.integers(1, 40), GROWTH, st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_windows_cover_a_document_once(length, chunk, growth, extra):
    context, scored = chunk + extra, []
    ends = ends_of(length, chunk, growth, context)
    for c in range(len(ends)):
        first, last, own = tg.window(c, length, ends, context)
        assert 0 <= first <= own < last <= length and last - first <= context
        scored += range(own, last)
        assert first == tg.window(c, 10**6, ends, context)[0], "where a window begins does not know the length"
    assert scored == list(range(length))


def test_slots_that_wait_keep_nothing_and_disturb_nothing():
    """More slots than documents: idle slots have empty row groups."""
    docs = documents((30, 20))
    assert all(same(a, b) for a, b in zip(score(docs), score(docs, tg.dataclasses.replace(CFG, ttt_batch_size=9))))


def test_adapters_start_the_same_for_every_document_and_seed():
    a, b = (tg.Adapters(CFG, 9, torch.device("cpu")) for _ in range(2))
    torch.manual_seed(7)
    for site in a.A:
        assert torch.equal(a.A[site], b.A[site]) and (a.B[site] == 0).all()
        assert (a.A[site] == a.A[site][:, :1]).all(), "every slot the same draw"
        assert a.A[site].abs().max() <= CFG.model_dim**-0.5 and a.A[site].std() > 0.4 * CFG.model_dim**-0.5
    other = tg.Adapters(tiny_config(seed=8), 9, torch.device("cpu"))
    assert not torch.equal(a.A["q"], other.A["q"])


def test_adamw_of_adapters_is_torchs(monkeypatch):
    adapters = tg.Adapters(CFG, 9, torch.device("cpu"))
    twins = [t.detach().clone().requires_grad_() for t in adapters.tensors]
    reference = torch.optim.AdamW(twins, lr=CFG.ttt_lora_lr, betas=(0.0, CFG.ttt_beta2), eps=1e-10,
                                  weight_decay=CFG.ttt_weight_decay)
    for seed in range(3):
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)) for t in twins]
        adapters.learn(sum((t * w).square().sum() + (t * w).sum() for t, w in zip(adapters.live, weights)))
        reference.zero_grad()
        sum((t * w).square().sum() + (t * w).sum() for t, w in zip(twins, weights)).backward()
        reference.step()
    for t, live, twin in zip(adapters.tensors, adapters.live, twins):
        assert torch.equal(t, live), "what forwards see"
        torch.testing.assert_close(t, twin, rtol=1e-4, atol=1e-6)


def test_a_late_slot_corrects_its_bias_by_its_own_count():
    """Two documents that entered at different times take the same first step."""
    def first_b(rounds_before):
        adapters = tg.Adapters(CFG, 9, torch.device("cpu"))
        for _ in range(rounds_before):
            adapters.learn(sum((t * 2).sum() for t in adapters.live))
        adapters.enter([1])
        adapters.learn(sum((t * 3).sum() for t in adapters.live))
        return adapters.B["q"][:, 1].detach()

    assert torch.equal(first_b(0), first_b(4))


def test_deadline_leaves_the_rest_unscored():
    val, device = validation(documents()), torch.device("cpu")
    run = tg.Run(CFG, tg.Ranks(), lambda *a, **k: None, tg.Ops())
    adapters = tg.Adapters(CFG, 9, device)
    nll = tg.score_documents(run, tiny_model(CFG), val, adapters, tg.Ops(), float("-inf"))
    assert (nll == tg.UNSCORED).all()
    clock = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.time, "perf_counter", lambda: next(clock))
        nll = tg.score_documents(run, tiny_model(CFG), val, adapters, tg.Ops(), 5)
    assert (nll == tg.UNSCORED).any() and (nll != tg.UNSCORED).any()


def test_a_target_scored_twice_or_without_a_number_ends_the_run(monkeypatch):
    def tally(*wheres, nll=(1.0, 2.0, 3.0), ranks=tg.Ranks()):
        tally = tg.Tally(3, ranks)
        for where in wheres:
            tally.add(torch.tensor(where), torch.tensor(nll)[where])
        return tally

    assert tally([2, 0], [1]).gather("x").tolist() == [1.0, 2.0, 3.0]
    assert tally([2, 0]).gather("x", may_miss=True).tolist() == [1.0, tg.UNSCORED, 3.0]
    with pytest.raises(RuntimeError, match="1 never"):
        tally([2, 0]).gather("x")
    for twice in (tally([0, 1, 2], [1]), tally([0, 1, 1, 2])):
        with pytest.raises(RuntimeError, match="1 targets were scored more than once"):
            twice.gather("x", may_miss=True)
    with pytest.raises(tg.UserError, match="1 losses are not finite"):
        tally([0, 1, 2], nll=(1.0, float("nan"), 2.0)).gather("x")
    doubled = tg.Ranks()
    monkeypatch.setattr(doubled, "sum_", lambda t: 2 * t)
    with pytest.raises(RuntimeError, match="3 targets were scored more than once"):
        tally([0, 1, 2], ranks=doubled).gather("x")


def test_a_round_that_runs_twice_ends_the_run(monkeypatch):
    """A cheat: every chunk scored again after learning from it."""
    original = tg.rounds
    monkeypatch.setattr(tg, "rounds", lambda *args: (r for r in original(*args) for _ in range(2)))
    with pytest.raises(RuntimeError, match="more than once"):
        score(documents())


def test_rounds_that_are_left_out_end_the_run(monkeypatch):
    original = tg.rounds
    monkeypatch.setattr(tg, "rounds", lambda *args: itertools.islice(original(*args), 3))
    with pytest.raises(RuntimeError, match="never"):
        score(documents())


class Log:
    """A run log that keeps its phases and says nothing."""
    phase, spent = tg.RunLog.phase, tg.RunLog.spent

    def __init__(self):
        self.ranks, self.phases = tg.Ranks(), []

    def __call__(self, *args, **kwargs):
        pass


def test_the_headline_is_the_adapted_score_and_nothing_else(monkeypatch):
    """Neither the better of two passes, nor BOS for free, nor more bytes than there are."""
    val = validation(documents())._replace(begin_with_space=5)
    n = len(val.token_bytes)
    rng = np.random.default_rng(0)
    plain, adapted = (torch.from_numpy(rng.uniform(1, 5, n).astype(np.float32)) for _ in range(2))
    monkeypatch.setattr(tg, "evaluate", lambda *args: plain.clone())
    monkeypatch.setattr(tg, "score_documents", lambda *args: adapted.clone())
    result, run = {}, tg.Run(CFG, tg.Ranks(), Log(), tg.Ops())
    nll = tg.score(run, tiny_model(CFG), val, result)
    assert torch.equal(nll, adapted) and (plain < adapted).any()
    assert result["val_loss"] == pytest.approx(adapted.double().mean().item(), rel=1e-12)
    assert result["val_bpb"] == pytest.approx(adapted.double().sum().item() / np.log(2) / n, rel=1e-12)
    assert result["val_bpb_quantized"] == pytest.approx(plain.double().sum().item() / np.log(2) / n, rel=1e-12)
    assert result["bytes"] == result["tokens"] == n and result["unadapted_tokens"] == 0
    assert {p.name: p.clock for p in run.log.phases} == {
        "score quantized": "scoring", "prepare adaptation": "", "adapt": "scoring"}
    adapted[3] = tg.UNSCORED
    nll = tg.score(run, tiny_model(CFG), val, result)
    assert nll[3] == plain[3] and torch.equal(nll[4:], adapted[4:]) and result["unadapted_tokens"] == 1


@pytest.mark.parametrize("chunk", [16, 20, 48])
def test_rehearsal_learns_nothing_and_knows_no_validation(monkeypatch, chunk):
    """Also where a window holds two chunks, or one."""
    CFG = tiny_config(ttt_chunk_size=chunk)
    seen, original = [], tg.adapt
    monkeypatch.setattr(tg, "adapt", lambda model, adapters, plan, ops, this: (
        seen.append(this.batch.tokens), original(model, adapters, plan, ops, this))[1])
    adapters = tg.Adapters(CFG, 9, torch.device("cpu"))
    before = [t.detach().clone() for t in (*adapters.tensors, *adapters.live, *adapters.second_moments, adapters.updates)]
    run, model = tg.Run(CFG, tg.Ranks(), Log(), tg.Ops()), tiny_model(CFG).requires_grad_(False)
    weights = [p.clone() for p in model.parameters()]
    tg.rehearse(run, model, adapters, tg.Ops())
    after = (*adapters.tensors, *adapters.live, *adapters.second_moments, adapters.updates)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    largest = CFG.ttt_batch_size * min(CFG.ttt_eval_seq_len, -(-CFG.ttt_eval_seq_len // chunk) * chunk)
    assert min(map(len, seen)) > 0 and max(map(len, seen)) >= largest, "the largest round is among them"
    assert "val" not in tg.inspect.signature(tg.rehearse).parameters


# ----------------------------------------------------------------------------------------------------------------------
# The score itself


def test_bits_per_byte_by_hand():
    val = tg.Validation(np.arange(6), np.array([1, 2, 0, 4, 3]), np.array([0, 3]), np.array([3, 2]), 0)
    result = tg.Score.of(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), val)
    assert result.loss == 3.0 and result.bpb == pytest.approx(15 / np.log(2) / 10)
    assert result.bpb == tg.Score.of(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), val).bpb


def evaluate_in_ranks(lengths=LENGTHS):
    torch.set_num_threads(1)
    run = tg.Run(CFG, tg.Ranks.join(), lambda *a, **k: None, tg.Ops())
    return tg.evaluate(run, tiny_model(CFG), validation(documents(lengths)), tg.depth_plan(CFG, True))


def test_plain_evaluation_cuts_as_training_does_and_drops_nothing(tmp_path):
    nll, docs = evaluate_in_ranks(), documents()
    model, plan = tiny_model(CFG), PLAN
    stream, expected = np.append(np.concatenate(docs), 1), []
    for start, n in zip(np.cumsum([0, *LENGTHS[:-1]]), LENGTHS):
        for lo in range(start, start + n, CFG.eval_seq_len):
            hi = min(lo + CFG.eval_seq_len, start + n)
            batch = tg.make_batch(stream[lo:hi], stream[lo + 1 : hi + 1], np.array([0, hi - lo]), 1, 64)
            expected.append(model(batch, plan).detach())
    torch.testing.assert_close(nll, torch.cat(expected)[:-1], rtol=0, atol=2e-5)
    for ranks in launch(2, evaluate_in_ranks, folder=tmp_path):
        torch.testing.assert_close(ranks, nll, rtol=0, atol=2e-5)


@pytest.mark.parametrize("lengths", [(1, 2), (1, 1, 1, 3), (2,), (500,), (64, 64, 65)])
def test_odd_documents_are_scored(lengths):
    """Documents of one token, of one token more than a span, longer than any window; fewer documents than slots."""
    assert len(evaluate_in_ranks(lengths)) == sum(lengths) - 1
    assert sum(map(len, score(documents(lengths)))) == sum(lengths) - 1
