"""tools/audit.py passes the script as it is, and finds cheats planted in copies of it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train_gpt as tg
from conftest import ROOT, SHALLOW, SMOKE, TINY, as_environment

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import audit
import prepare

SOURCE = Path(tg.__file__).read_text()
RESET_SLOTS = tg.Adapters.reset_slots


VOCAB_SIZE = 400  # few, as an audit tries every token as the last of a document


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A DATA_DIR of few pieces, with the beginnings of five documents for validation."""
    folder = tmp_path_factory.mktemp("data")
    with open(SMOKE / "smoke.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    characters = (500, 70, 300, 150, 450)
    texts = [text[:count] for text, count in zip(texts, characters)] + texts[40:60]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = [folder / "texts.jsonl", "--out", folder, "--val-docs", len(characters), "--vocab-size",
                 VOCAB_SIZE, "--workers", 1]
    assert prepare.main(list(map(str, arguments))) == 0
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """The folder of an honest run of few visits, which makes many audits cheap; its scores are beside it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    places = dict(DATA_DIR=data, ARTIFACT_DIR=folder, SAVE_SCORES=folder.parent / "scores.npz")
    settings = {**TINY, **SHALLOW, "VOCAB_SIZE": VOCAB_SIZE}
    assert tg.main(as_environment({**settings, **places})) == 0
    return folder


@pytest.fixture
def with_data(data, monkeypatch):
    """An audit in this process finds the data."""
    monkeypatch.setenv("DATA_DIR", str(data))


def audit_with_copy(run: Path, data: Path, script: Path, *options: str) -> tuple[int, list[str]]:
    """Exit status and verdicts of an audit by a copy of the script, in a process of its own."""
    command = [sys.executable, ROOT / "tools/audit.py", run, "--script", script, *options]
    environment = {**os.environ, "DATA_DIR": str(data), "VAL_BATCH_TOKENS": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not done.stderr, done.stderr
    return done.returncode, [line for line in done.stdout.splitlines() if line.startswith(("pass", "FAIL"))]


def test_an_honest_run_passes(finished, with_data, capfd, monkeypatch):
    monkeypatch.setenv("VAL_BATCH_TOKENS", "65536")
    assert audit.main([str(finished), "--scores", str(finished.parent / "scores.npz")]) == 0
    out = capfd.readouterr().out
    assert ": the script that made the run" in out and "FAIL" not in out
    for rule in ("causal", "score before update", "full distribution", "one pass", "documents independent",
                 "slots do not matter", "size", "headline", "no drift"):
        assert f"\npass  {rule}" in out
    targets = json.loads((finished / "result.json").read_text())["tokens"]
    with_last_bos = targets + 1  # which the audit adds
    for check in ("others altered", "before a cut", "continued", f"saved scores, and these: {targets} scores",
                  f"{with_last_bos} once, 0 more often, 0 never"):
        assert check in out
    assert "3 slots" in out and "1 slots" in out, "slots are used again"
    assert "settings other than those of its run" in out and "val_batch_tokens:512" in out


def test_a_packed_script_can_be_audited(finished, data):
    packed = finished / "train_gpt_packed.py"
    status, verdicts = audit_with_copy(finished, data, packed, "--documents", "3")
    assert status == 0 and all(verdict.startswith("pass") for verdict in verdicts), verdicts


CHEATS = {  # by name: honest code, what is planted in its place, the rule that catches it
    "train before score": (
        "    nll = model(this.batch, plan, backend, adapters",
        """\
    early = model(this.batch, plan, backend, adapters.hooks(this.ends))
    adapters.learn((early * this.loss_weight).sum(), backend.update)
    nll = model(this.batch, plan, backend, adapters""",
        "score before update"),
    "state kept between documents": (
        """\
        if not len(indices):
            return
""",
        """\
        if not len(indices) or hasattr(self, "begun"):
            return
        self.begun = True
""",
        "documents independent"),
    "a discount later on": (
        "final = nll.detach().clone()",
        "final = nll.detach() * (1 - 1e-3 * (this.batch.spans.positions > 12))",
        "full distribution"),
    "the better of two passes": (
        "final = nll.detach().clone()",
        """\
early = nll.detach()
    late = model(this.batch, plan, backend).detach()
    final = early.minimum(late).where(this.batch.spans.positions > 12, early)""",
        "full distribution"),
    "a free end of every document": (
        "    slot_ends = np.cumsum(slot_rows)",
        """\
    batch.targets[np.isin(target_index, val.starts + val.lengths - 1)] = IGNORE
    slot_ends = np.cumsum(slot_rows)""",
        "causal"),
    "peeking at the next token": ("is_causal=True)", "is_causal=False)", "causal"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught(finished, data, tmp_path, name):
    honest, planted, rule = CHEATS[name]
    assert SOURCE.count(honest) == 1, "the script has changed: plant the cheat anew"
    copy = tmp_path / "train_gpt.py"
    copy.write_text(SOURCE.replace(honest, planted))
    status, verdicts = audit_with_copy(finished, data, copy, "--documents", "3")
    assert status == 1 and any(verdict.startswith(f"FAIL  {rule}") for verdict in verdicts), verdicts
    assert verdicts[-1].startswith("FAIL: ") and rule in verdicts[-1]
    assert any(verdict.startswith("pass  size") for verdict in verdicts)


def test_a_headline_that_does_not_follow_is_caught(finished, with_data, tmp_path):
    result = json.loads((finished / "result.json").read_text())
    scorer = audit.Scorer(tg, finished / "final_model.int6.ptz")
    better = {name: 0.9 * result[name] for name in ("val_loss", "val_bpb")}
    for change in ({}, {"val_bpb": result["val_bpb"] - 0.01}, {"val_loss": result["val_loss"] - 0.01},
                   {"bytes": result["bytes"] + 9}, {"tokens": result["tokens"] - 1}, {"documents": 4},
                   better):
        (tmp_path / "result.json").write_text(json.dumps({**result, **change}))
        (verdict,) = audit.headline(tmp_path, scorer, finished.parent / "scores.npz")
        assert verdict.passed == (not change), verdict
        (verdict,) = audit.headline(tmp_path, scorer)
        assert verdict.passed == (change in ({}, better))
        assert "not checked without --scores" in verdict.figures


def test_saved_scores_that_are_others_are_caught(finished, with_data, tmp_path):
    saved = finished.parent / "scores.npz"
    scores = np.load(saved)
    scorer = audit.Scorer(tg, finished / "final_model.int6.ptz")
    trial = audit.Audit(scorer, scorer.documents(5), seed=0)
    assert trial.saved(saved).passed
    moved_starts = scores["document_starts"] + np.arange(5)
    for change in ({"nll": scores["nll"] - 0.001}, {"document_starts": moved_starts}):
        np.savez(tmp_path / "changed.npz", **{**scores, **change})
        assert not trial.saved(tmp_path / "changed.npz").passed


def keep_adapters(self, slots):
    """A cheat: only the adapters of the first documents are new."""
    if not hasattr(self, "begun"):
        self.begun = True
        RESET_SLOTS(self, slots)


@pytest.mark.parametrize("noise,reset_slots,passes", [
    (0.003, RESET_SLOTS, True), (0.003, keep_adapters, False), (0.05, RESET_SLOTS, False)])
def test_noise_of_a_gpu_is_measured(finished, with_data, monkeypatch, noise, reset_slots, passes):
    """Scores that differ a little each time, as on a GPU, are no cheat.

    But such noise hides no cheat, and it has a limit.
    """
    monkeypatch.setattr(tg.Adapters, "reset_slots", reset_slots)
    scorer = audit.Scorer(tg, finished / "final_model.int6.ptz")
    exact_score = scorer.score
    rng = np.random.default_rng(0)

    def noisy_score(*args):
        return [scores + noise * rng.standard_normal(len(scores)) for scores in exact_score(*args)]

    scorer.score = noisy_score
    scorer.ranks.on_gpu = True
    scorer.ranks.synchronize = lambda: None
    trial = audit.Audit(scorer, scorer.documents(5), seed=0)
    checks = trial.order, trial.tails, trial.lengths, trial.others
    verdicts = [verdict for check in checks for verdict in check()]
    assert all(verdict.passed for verdict in verdicts) == passes, [str(verdict) for verdict in verdicts]


def assert_one_line(err: str, said: str):
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_mistakes_end_in_one_line(finished, with_data, tmp_path, capfd):
    for run, options, said in ((tmp_path, (), "final_model.int6.ptz"),
                               (finished, ("--documents", "2"), "too few")):
        assert audit.main([str(run), *options]) == 2
        assert_one_line(capfd.readouterr().err, said)
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    for script, said in ((broken, "ZeroDivisionError"), (tmp_path / "none.py", "FileNotFoundError")):
        with pytest.raises(SystemExit) as end:
            audit.main([str(finished), "--script", str(script)])
        assert end.value.code == 2
        assert_one_line(capfd.readouterr().err, said)


def test_bytes_are_those_of_the_files(finished, tmp_path):
    for path in filter(Path.is_file, finished.iterdir()):  # importing the packed script leaves a cache
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert audit.size(tmp_path, tg).passed
    result = json.loads((tmp_path / "result.json").read_text())
    understated = {**result, "model_bytes": result["model_bytes"] - 1}
    (tmp_path / "result.json").write_text(json.dumps(understated))
    verdict = audit.size(tmp_path, tg)
    assert not verdict.passed and "differs in model" in verdict.figures
    (tmp_path / "result.json").unlink()
    with open(tmp_path / "final_model.int6.ptz", "r+b") as file:
        file.truncate(16_000_000)  # with the code, over the cap
    assert not audit.size(tmp_path, tg).passed


@pytest.mark.parametrize("chunk,growth", [(2, 0), (16, 0), (48, 0), (8, 0.2)])
def test_places_lie_inside_chunks_that_are_learned_from(chunk, growth):
    rng = np.random.default_rng(0)
    ends = tg.chunk_ends(200, tg.Config(ttt_chunk_size=chunk, ttt_chunk_growth=growth))
    for length in [*range(1, 100)] * 5:
        place = audit.place(rng, length, ends)
        if place:
            assert 2 <= place < length and place - 1 not in ends
            assert length <= chunk or np.searchsorted(ends, place) < np.searchsorted(ends, length)
        else:
            assert length < 3


def test_what_counts_as_noise():
    rng = np.random.default_rng(0)
    before = [rng.uniform(1, 5, count) for count in (50, 80, 120, 60)]  # scores by document

    def moved(change):
        return audit.Moved.of([(scores, scores + change(len(scores))) for scores in before])

    assert moved(lambda n: 0.0).little(None) and moved(lambda n: 1e-6).little(None)
    assert not moved(lambda n: 1e-4).little(None)
    nothing = audit.Moved.of([])
    assert not nothing.little(None) and not nothing.little(0.01), "nothing was compared"
    noise = moved(lambda n: 0.002 * rng.standard_normal(n))
    limit = 4 * noise.rms
    assert not noise.little(None) and noise.little(limit)
    assert not moved(lambda n: 0.1 * rng.standard_normal(n)).little(limit), "it spreads too widely"
    assert not moved(lambda n: 0.003 + 0.0001 * rng.standard_normal(n)).little(limit), "it drifts"
    assert not moved(lambda n: np.where(np.arange(n) == 3, np.nan, 0.0)).little(limit), "it is no number"
