#!/usr/bin/env python3
"""Check a finished run by the rules of the game: what must not move when documents are altered must not move.

    DATA_DIR=... python tools/audit.py runs/x                       # with the train_gpt.py above tools/
    DATA_DIR=... python tools/audit.py runs/x --script FILE         # with what was shipped, or any copy of it
    DATA_DIR=... python tools/audit.py runs/x --documents 200 --seed 7    # more documents, other alterations
    DATA_DIR=... python tools/audit.py runs/x --scores s.npz        # and what SAVE_SCORES=s.npz left

The script is loaded, so its code runs here, and its own functions score. The artifact brings its settings;
the environment overrides them, as it does for train_gpt.py. Exit status: 0 if every check passes, 1 if one
fails, 2 after an error.

Scores that must be equal differ by rounding: on a CPU by less than EXACT, root mean square, which also bounds
what the mean can gain. On a GPU other neighbours in a batch are another rounding, and learning amplifies it:
there the noise is measured, by documents in the reverse order; it may not pass COARSE, and elsewhere scores
may spread 4 times as much, but not drift, and all together by COMMON at most. A few documents on a GPU are a
quick look; for evidence take many, or audit on the CPU: CUDA_VISIBLE_DEVICES= in front.
"""
import argparse
import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import os
import sys
import time
import types
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
CAP_BYTES = 16_000_000
EXACT, FAR = 1e-5, 1e-3  # nats between equal scores on a CPU: root mean square, largest
COARSE, DRIFT, COMMON = 0.02, 1e-4, 1e-3  # on a GPU: root mean square; mean; mean over all checks


class Case(NamedTuple):
    """A document as one scoring has it."""
    number: int  # among the documents
    tokens: np.ndarray  # from its BOS on
    kept: int  # so many of its first targets are as they were


Scored = list[tuple[Case, np.ndarray]]  # and the scores of its targets


class Verdict(NamedTuple):
    rule: str
    passed: bool
    figures: str
    moved: "Moved | None" = None

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.rule:<22}{self.figures}"


class Moved(NamedTuple):
    """How far scores lie from what they were."""
    targets: int
    largest: float
    rms: float
    mean: float
    error: float  # standard error of the mean, over documents or, if that is larger, over targets

    @classmethod
    def of(cls, pairs: list[tuple[np.ndarray, np.ndarray]]) -> "Moved":
        """Of (scores before, scores after) by document."""
        by_document = [after - before for before, after in pairs if len(before)]
        if not by_document:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        every = np.concatenate(by_document)
        mean, rms = every.mean(), math.sqrt((every**2).mean())
        over_documents = math.sqrt(sum((d - mean).sum() ** 2 for d in by_document)) / len(every)  # 0 for one
        over_targets = every.std() / math.sqrt(len(every))
        return cls(len(every), abs(every).max(), rms, mean, max(over_documents, over_targets))

    def little(self, noise: float | None) -> bool:
        """Whether only rounding moved them; `noise` is what it may be, root mean square, on a GPU."""
        if noise is None:
            return self.targets > 0 and self.rms <= EXACT and self.largest <= FAR
        drifts = abs(self.mean) > max(DRIFT, 4 * self.error)
        return self.targets > 0 and self.rms <= max(EXACT, noise) and not drifts

    def __str__(self) -> str:
        if not self.targets:
            return "nothing to compare, more --documents are needed"
        if not self.largest:
            return f"{self.targets} scores equal"
        return (f"{self.targets} scores moved by at most {self.largest:.1e}, rms {self.rms:.1e}, "
                f"mean {self.mean:+.1e} +- {self.error:.0e}")


def load_script(path: Path) -> types.ModuleType:
    """A train_gpt.py, or a copy, packed or not, as a module."""
    loaded = sys.modules.get("train_gpt")
    if loaded and path.is_file() and path.samefile(loaded.__file__):
        return loaded
    loader = importlib.machinery.SourceFileLoader("audited_script", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # where dataclasses look for it
    try:
        loader.exec_module(module)
    except Exception as error:
        print(f"error: {path} cannot be loaded: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return module


class Scorer:
    """Model, settings and functions of a run, to score any documents as it scored validation."""

    def __init__(self, tg: types.ModuleType, artifact: Path):
        env = {**os.environ, "EVAL_ONLY_PATH": str(artifact)}
        saved = tg.read_saved(artifact)
        self.tg, self.cfg, self.ranks = tg, tg.Config.from_env(env, saved.settings), tg.Ranks.join()
        ops = tg.Backend.for_machine(self.cfg, self.ranks.device)
        self.run = tg.Run(self.cfg, self.ranks, lambda line, **_: print(line), ops)
        model = tg.GPT(self.cfg).to(self.ranks.device)
        blob, _ = tg.open_saved(self.run, model, saved)
        self.model = tg.restore(model, tg.unpack_artifact(blob, artifact)[1]).requires_grad_(False)
        self.run, self.ops = self.run._replace(log=lambda *args, **_: None), ops.compiled_for_any_length()
        files = tg.find_data(self.cfg, need_train=False)
        self.tokenizer = tg.load_tokenizer(files.tokenizer, self.cfg.vocab_size)
        self.val = tg.load_validation(files.val, self.tokenizer, self.cfg)
        self.plan, self.adapters = tg.depth_plan(self.cfg, self.cfg.loops_at_end), None
        self.ends = tg.chunk_ends(int(self.val.lengths.max()), self.cfg)

    def documents(self, count: int) -> list[np.ndarray]:
        """The first documents of validation, each from its BOS on."""
        bounds = np.append(self.val.starts, len(self.val.tokens))
        return [self.val.tokens[lo:hi] for lo, hi in zip(bounds[:count], bounds[1:])]

    def validation(self, documents: list[np.ndarray]):
        """A validation set of these. One more BOS ends the last, so each has as many targets as tokens."""
        tokens = np.append(np.concatenate(documents), self.tokenizer.bos)
        lengths = np.array([len(tokens) for tokens in documents])
        return self.val._replace(tokens=tokens, token_bytes=self.tokenizer.target_bytes(tokens),
                                 starts=np.cumsum(lengths) - lengths, lengths=lengths)

    def score(self, documents: list[np.ndarray], slots: int, adapted: bool = True) -> list[np.ndarray]:
        """Losses of every document's targets as the run's final score has them, fp64; or the plain ones."""
        tg, val, run = self.tg, self.validation(documents), self.with_slots(slots)
        if adapted and self.cfg.ttt_enabled:
            if self.adapters is None or self.adapters.cfg != run.cfg:  # else what is compiled serves again
                self.adapters = None  # so that there is memory for others
                self.adapters = tg.Adapters(run.cfg, len(self.plan.visits), self.ranks.device)
                if self.ops.compilable:
                    tg.warm_up_adaptation(run, self.model, self.adapters, self.ops)
            self.adapters.reset_slots(range(slots))
            nll = tg.score_documents(run, self.model, val, self.adapters, self.ops, math.inf)
        else:
            nll = tg.evaluate(run, self.model, val, self.plan)
        return np.split(nll.numpy().astype(np.float64), val.starts[1:])

    def with_slots(self, slots: int):
        return self.run._replace(cfg=dataclasses.replace(self.cfg, ttt_batch_size=slots))

    def foreign(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random tokens, none of them BOS."""
        vocab_size = self.cfg.vocab_size
        return (self.tokenizer.bos + 1 + rng.integers(0, vocab_size - 1, count)) % vocab_size


# ------------------------------------------------------------------------------------------------------------
# Alterations: lists of cases, made from documents


def place(rng: np.random.Generator, length: int, ends: np.ndarray) -> int:
    """A token of a document to alter, 0 if it is too short; target j is token j + 1. `ends`: of chunks.

    The target that it is lies inside a chunk, not first in it, and, if it can be, in one that is learned
    from.
    """
    learned = max((end for end in ends.tolist() if end < length), default=0)  # end of the last of these
    last = learned if learned > 1 else length - 1
    if last < 2:
        return 0
    target = int(rng.integers(1, last))
    return min(target + (target in ends), length - 2) + 1


def with_other_tails(scorer: Scorer, documents: list[np.ndarray], rng: np.random.Generator) -> list[Case]:
    """Every second document has random tokens from a random place on."""
    cases = []
    for i, tokens in enumerate(documents):
        at = place(rng, len(tokens), scorer.ends) if i % 2 == 0 else 0
        tail = scorer.foreign(rng, len(tokens) - at)
        cases.append(Case(i, np.append(tokens[:at], tail), at - 1) if at else Case(i, tokens, len(tokens)))
    return cases


def with_other_lengths(scorer: Scorer, documents: list[np.ndarray], rng: np.random.Generator) -> list[Case]:
    """Of three documents one is cut, one goes on with random tokens, after a BOS or at once, one stays.

    A BOS is what the last target of a document is: before one, that target, too, has to keep its score.
    """
    cases, chunk = [], scorer.cfg.ttt_chunk_size
    for i, tokens in enumerate(documents):
        at = place(rng, len(tokens), scorer.ends) if i % 3 == 0 else 0
        if at:
            cases.append(Case(i, tokens[:at], at - 1))
        elif i % 3 == 1:
            more, after_bos = scorer.foreign(rng, int(rng.integers(1, 3 * chunk))), i % 2 == 1
            more = np.append(scorer.tokenizer.bos, more) if after_bos else more
            cases.append(Case(i, np.append(tokens, more), len(tokens) - (not after_bos)))
        else:
            cases.append(Case(i, tokens, len(tokens)))
    return cases


def some(documents: list[np.ndarray], rng: np.random.Generator) -> list[Case]:
    """Half of the documents, in random order."""
    chosen = rng.permutation(len(documents))[: -(-len(documents) // 2)].tolist()
    return [Case(i, documents[i], len(documents[i])) for i in chosen]


# ------------------------------------------------------------------------------------------------------------
# Checks


class Audit:
    """Scores of unaltered documents, and how others compare with them."""

    def __init__(self, scorer: Scorer, documents: list[np.ndarray], seed: int):
        self.scorer, self.documents, self.noise, self.pairs = scorer, documents, None, []
        self.rng = np.random.default_rng(seed)
        self.slots = scorer.cfg.ttt_batch_size
        self.few = max(1, min(self.slots, len(documents)) // 3)  # so that slots are used again
        self.whole = [Case(i, tokens, len(tokens)) for i, tokens in enumerate(documents)]
        self.base = [scores for _, scores in self.score("unaltered", self.whole, self.slots)]

    def score(self, what: str, cases: list[Case], slots: int) -> Scored:
        """Score all cases; says how long that took."""
        began = time.perf_counter()
        scores = self.scorer.score([case.tokens for case in cases], slots)
        print(f"scored {what}: {len(cases)} documents, {sum(map(len, scores))} targets, {slots} slots, "
              f"{time.perf_counter() - began:.1f} s", flush=True)
        return list(zip(cases, scores))

    def verdict(self, rule: str, what: str, scored: Scored, in_chunk: bool = False) -> Verdict:
        """Whether what is as it was has the scores it had; or that part of it in the chunk where it ends."""
        pairs, ends = [], [0, *self.scorer.ends.tolist()]
        for case, after in scored:
            kept = slice(max(end for end in ends if end <= case.kept) if in_chunk else 0, case.kept)
            pairs.append((self.base[case.number][kept], after[kept]))
        self.pairs += [] if in_chunk else pairs
        moved = Moved.of(pairs)
        return Verdict(rule, moved.little(self.noise), f"{what}: {moved}", moved)

    def verdicts(self, scores: Path | None = None) -> Iterator[Verdict]:
        """Of all checks, as they come; also of the scores that the run saved, if they are given."""
        for check in (self.order, self.tails, self.lengths, self.others, self.together, self.once,
                      self.normalised):
            yield from check()
        if scores:
            yield self.saved(scores)

    def order(self) -> list[Verdict]:
        """Documents in the reverse order; on a GPU this is the noise that later verdicts go by."""
        if self.scorer.ranks.on_gpu:
            self.noise = COARSE
        scored = self.score("in reverse order", self.whole[::-1], self.slots)
        verdict = self.verdict("documents independent", "order reversed", scored)
        if self.scorer.ranks.on_gpu:
            self.noise = 4 * min(verdict.moved.rms, COARSE)
        return [verdict]

    def tails(self) -> list[Verdict]:
        """Later tokens: neither what comes before in the document sees them, nor another document."""
        cases = with_other_tails(self.scorer, self.documents, self.rng)
        scored = self.score("with other tails", cases, self.few)
        altered = [(case, after) for case, after in scored if case.kept < len(case.tokens)]
        others = [(case, after) for case, after in scored if case.kept == len(case.tokens)]
        seen = Moved.of([(self.base[case.number][case.kept :], after[case.kept :])
                         for case, after in altered])
        visible = seen.largest > FAR and seen.rms > (self.noise or EXACT)
        in_chunk = "before altered tokens, in their chunk"
        return [Verdict("causal", visible, f"altered tokens: {seen}"),
                self.verdict("causal", "before altered tokens", altered),
                self.verdict("score before update", in_chunk, altered, in_chunk=True),
                self.verdict("documents independent", "others altered", others)]

    def lengths(self) -> list[Verdict]:
        """Where a document ends: nothing before it knows, nor does another document."""
        cases = with_other_lengths(self.scorer, self.documents, self.rng)
        by_change = {-1: [], 0: [], 1: []}  # cut, as it was, continued
        for case, scores in self.score("cut or continued", cases, self.few):
            more = len(case.tokens) - len(self.documents[case.number])
            by_change[int(np.sign(more))].append((case, scores))
        return [self.verdict("causal", "before a cut", by_change[-1]),
                self.verdict("causal", "continued", by_change[1]),
                self.verdict("documents independent", "others cut or continued", by_change[0])]

    def others(self) -> list[Verdict]:
        """Documents absent; another number of slots, each used again and again."""
        half = self.score("half of them", some(self.documents, self.rng), self.few)
        return [self.verdict("documents independent", "half of them absent, the rest in random order", half),
                self.verdict("slots do not matter", f"{self.few} instead of {self.slots}",
                             self.score("in few slots", self.whole, self.few))]

    def together(self) -> list[Verdict]:
        """A small advantage may hide in the noise of one check, less so in that of all."""
        moved = Moved.of(self.pairs)
        limit = COMMON if self.scorer.ranks.on_gpu else EXACT
        return [Verdict("no drift", abs(moved.mean) <= limit, f"all of these together: {moved}", moved)]

    def saved(self, file: Path) -> Verdict:
        """Whether the scores that the run saved are those of these documents now."""
        with np.load(file) as scores:
            nll, starts = scores["nll"].astype(np.float64), scores["document_starts"]
        pairs = list(zip(np.split(nll, starts[1:]), self.base))
        if any(len(after) - len(before) not in (0, 1) for before, after in pairs):  # 1: the BOS added here
            return Verdict("headline", False, f"{file} has other documents")
        moved = Moved.of([(before, after[: len(before)]) for before, after in pairs])
        return Verdict("headline", moved.little(self.noise), f"saved scores, and these: {moved}", moved)

    def once(self) -> list[Verdict]:
        """Every target has one score."""
        scores, tg = np.concatenate(self.base), self.scorer.tg
        good = int((np.isfinite(scores) & (scores > -EXACT)).sum())
        total = sum(map(len, self.documents))
        verdicts = [Verdict("one pass", good == len(scores) == total,
                            f"{good} of {total} targets have a score")]
        if self.scorer.cfg.ttt_enabled:
            count = np.zeros(total, dtype=np.int64)
            val, run = self.scorer.validation(self.documents), self.scorer.with_slots(self.slots)
            for this in tg.rank_rounds(run, val):
                np.add.at(count, this.target_index.cpu().numpy(), 1)
            once, more, never = ((count == 1).sum(), (count > 1).sum(), (count == 0).sum())
            verdicts.append(Verdict("one pass", once == total, f"targets in the rounds: {once} once, {more} "
                                    f"more often, {never} never"))
        return verdicts

    def normalised(self) -> list[Verdict]:
        """Probabilities of all tokens that could be a document's last sum to one, adapted and plain.

        After a chunk, learned from, and a little more; and somewhere later in another document.
        """
        scorer, verdicts = self.scorer, []
        chunk, vocab = scorer.cfg.ttt_chunk_size, scorer.cfg.vocab_size
        slots = self.slots if scorer.ranks.on_gpu else max(self.slots, 64)
        for number, place in enumerate((chunk + 2, int(self.rng.integers(2 * chunk + 2, 4 * chunk)))):
            long = [tokens for tokens in self.documents if len(tokens) > place]
            long = long or [max(self.documents, key=len)]
            before = long[number % len(long)]
            before = before[: min(place, len(before) - 1)]
            variants = [np.append(before, token) for token in range(vocab)]
            for adapted in (True, False) if scorer.cfg.ttt_enabled else (False,):
                nll = np.array([scores[len(before) - 1] for scores in scorer.score(variants, slots, adapted)])
                p, what = np.exp(-nll), "adapted" if adapted else "plain"
                limit = 1e-4
                if self.noise is not None:  # each p has its own
                    limit = 1e-3 + self.noise * math.sqrt((p**2).sum())
                figures = (f"all {vocab} tokens after {len(before)}, {what}: sum of p is {p.sum():.6f}, "
                           f"1 to {limit:.0e}")
                verdicts.append(Verdict("full distribution", abs(p.sum() - 1) <= limit, figures))
        return verdicts


def text_bytes(tokenizer: Path, tokens: np.ndarray) -> int:
    """Bytes of text that all tokens but the first stand for, counted without the audited script."""
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(len(sp))])
    pieces = ["" if special[i] else sp.id_to_piece(i) for i in range(len(sp))]
    spaced = np.array([piece.startswith("\u2581") for piece in pieces])
    size = np.array([1 if sp.is_byte(i) else len(piece.removeprefix("\u2581").encode())
                     for i, piece in enumerate(pieces)])
    before, target = tokens[:-1], tokens[1:]
    in_pieces = (size[target] * ~special[target]).sum()
    leading_spaces = (spaced[target] & ~special[before]).sum()
    return int(in_pieces + leading_spaces)


def result_of(run: Path) -> dict:
    """What result.json says; nothing if there is none."""
    file = run / "result.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def headline(run: Path, scorer: Scorer, scores: Path | None = None) -> list[Verdict]:
    """Whether the score in result.json, if there is one, follows from its loss and from these documents.

    And its loss from the scores that the run saved, if they are given.
    """
    said, val = result_of(run), scorer.val
    if not said:
        return []
    fraction = said["settings"].get("val_doc_fraction", 1.0)
    if said["val_sha256"] != val.sha256 or fraction != scorer.cfg.val_doc_fraction:
        return [Verdict("headline", True,
                        "not checked: DATA_DIR holds other validation documents than the run's")]
    files = scorer.tg.find_data(scorer.cfg, need_train=False)
    counts = dict(documents=len(val.starts), tokens=len(val.tokens) - 1,
                  bytes=text_bytes(files.tokenizer, val.tokens))
    wrong = [name for name, value in counts.items() if said[name] != value]
    bpb = said["val_loss"] * counts["tokens"] / (math.log(2) * counts["bytes"])
    wrong += [] if math.isclose(bpb, said["val_bpb"], rel_tol=1e-9) else ["val_bpb"]
    figures = (f"{counts['tokens']} targets, {counts['bytes']} bytes: val_loss {said['val_loss']:.6f} is "
               f"val_bpb {bpb:.6f}")
    if scores:
        with np.load(scores) as file:
            nll = file["nll"].astype(np.float64)
        loss = nll.mean()
        if len(nll) != counts["tokens"] or not math.isclose(loss, said["val_loss"], rel_tol=1e-9):
            wrong.append("val_loss")
        figures += f"; {len(nll)} saved scores have the mean {loss:.6f}"
    else:
        figures += "; that this is the mean of the run's scores is not checked without --scores"
    figures += f"; result.json differs in {' '.join(wrong)}" if wrong else ""
    return [Verdict("headline", not wrong, figures)]


def size(run: Path, tg: types.ModuleType) -> Verdict:
    """Bytes of code and model, and whether result.json, if there is one, says the same."""
    packed, said = run / "train_gpt_packed.py", result_of(run)
    model = (run / "final_model.int6.ptz").stat().st_size
    code = packed.stat().st_size if packed.is_file() else said.get("code_bytes") or len(tg.pack_script())
    wrong = [name for name, value in (("code", code), ("model", model), ("total", code + model))
             if said.get(f"{name}_bytes", value) != value]
    figures = f"code {code} + model {model} = {code + model} bytes of {CAP_BYTES}"
    figures += f"; result.json differs in {' '.join(wrong)}" if wrong else ""
    return Verdict("size", code + model <= CAP_BYTES and not wrong, figures)


def origin(run: Path, script: Path) -> str:
    """Whether the script is the one that made the run, by what result.json says."""
    said, digest = result_of(run), hashlib.sha256(script.read_bytes()).hexdigest()
    if not said:
        return "no result.json: unknown which script made the run"
    same = digest in (said.get("code_sha256"), said.get("packed_sha256"))
    return f"{script}: {'the' if same else 'NOT the'} script that made the run, by its sha256"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, with final_model.int6.ptz")
    parser.add_argument("--script", type=Path, default=SCRIPT,
                        help="the train_gpt.py, or copy of it, to score with")
    parser.add_argument("--documents", type=int, default=64,
                        help="how many of the first validation documents (64)")
    parser.add_argument("--seed", type=int, default=0, help="of places and tokens of alterations (0)")
    parser.add_argument("--scores", type=Path, help="the run's SAVE_SCORES file, to compare with")
    args = parser.parse_args(argv)
    tg = load_script(args.script)
    try:
        scorer = Scorer(tg, args.run / "final_model.int6.ptz")
        documents = scorer.documents(args.documents)
        if len(documents) < 3:
            raise tg.UserError(f"{len(documents)} documents are too few to compare: 3 at least")
        if scorer.ranks.world_size > 1:
            raise tg.UserError("an audit is one process: start it without torchrun")
        print(origin(args.run, args.script))
        print(f"on {tg.device_name(scorer.ranks.device)}, attention {scorer.ops.attend.__name__}", flush=True)
        verdicts = [size(args.run, tg), *headline(args.run, scorer, args.scores)]
        print(*verdicts, sep="\n", flush=True)
        for verdict in Audit(scorer, documents, args.seed).verdicts(args.scores):
            print(verdict, flush=True)
            verdicts.append(verdict)
    except (tg.UserError, RuntimeError, ValueError, KeyError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    failed = sorted({verdict.rule for verdict in verdicts if not verdict.passed})
    passed = sum(verdict.passed for verdict in verdicts)
    print(f"{'FAIL: ' + ', '.join(failed) if failed else 'pass'}: {passed} of {len(verdicts)} checks pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
