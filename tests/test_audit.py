"""tools/audit.py passes the script as it is, and finds cheats planted in copies of it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import audit  # noqa: E402

SMALL = {**TINY, "NUM_LAYERS": 2, "PARALLEL_START_LAYER": 1, "NUM_LOOPS": 0}  # few visits: many audits in little time
SOURCE = Path(tg.__file__).read_text()


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    env = {**SMALL, "DATA_DIR": tiny_data, "ARTIFACT_DIR": folder, "SAVE_SCORES": folder.parent / "scores.npz"}
    assert tg.main({name: str(value) for name, value in env.items()}) == 0
    return folder


def audit_copy(run: Path, data: Path, script: Path, *options: str) -> tuple[int, list[str]]:
    """Exit status and verdicts of an audit with a copy of the script, in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools/audit.py", run, "--script", script, *options], capture_output=True, text=True,
        env={**os.environ, "DATA_DIR": str(data), "VAL_BATCH_TOKENS": "65536", "OMP_NUM_THREADS": "1"})
    assert not done.stderr, done.stderr
    return done.returncode, [line for line in done.stdout.splitlines() if line.startswith(("pass", "FAIL"))]


def test_an_honest_run_passes(finished, tiny_data, capfd, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tiny_data))
    monkeypatch.setenv("VAL_BATCH_TOKENS", "65536")
    assert audit.main([str(finished), "--scores", str(finished.parent / "scores.npz")]) == 0
    out = capfd.readouterr().out
    assert ": the script that made the run" in out and "FAIL" not in out
    for rule in ("causal", "score before update", "full distribution", "one pass", "documents independent",
                 "slots do not matter", "size", "headline", "no drift"):
        assert f"\npass  {rule}" in out
    for check in ("others altered", "before a cut", "continued", "860 once, 0 more often, 0 never", "saved scores, and these: 8"):
        assert check in out
    assert "3 slots" in out and "1 slots" in out, "slots are used again"
    assert "settings other than those of its run" in out and "val_batch_tokens:512" in out


def test_a_packed_script_can_be_audited(finished, tiny_data):
    status, lines = audit_copy(finished, tiny_data, finished / "train_gpt_packed.py", "--documents", "3")
    assert status == 0 and all(line.startswith("pass") for line in lines), lines


CHEATS = {
    "train before score": ("    nll = model(this.batch, plan, ops, adapters", """\
    early = model(this.batch, plan, ops, adapters.tap(this.ends))
    adapters.learn((early * this.weight).sum(), ops.update)
    nll = model(this.batch, plan, ops, adapters""", "score before update"),
    "state kept between documents": ("""        if not (slots := list(slots)):
            return
""", """        if not (slots := list(slots)) or hasattr(self, "begun"):
            return
        self.begun = True
""", "documents independent"),
    "a discount later on": ("final = nll.detach().clone()",
                            "final = nll.detach() * (1 - 1e-3 * (this.batch.seqs.positions > 12))", "full distribution"),
    "the better of two passes": ("final = nll.detach().clone()", """\
early = nll.detach()
    final = early.minimum(model(this.batch, plan, ops).detach()).where(this.batch.seqs.positions > 12, early)""",
                                 "full distribution"),
    "a free end of every document": ("    rows, positions = np.cumsum(sizes)", """\
    batch.targets[np.isin(which, val.starts + val.lengths - 1)] = IGNORE
    rows, positions = np.cumsum(sizes)""", "causal"),
    "peeking at the next token": ("is_causal=True)", "is_causal=False)", "causal"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught(finished, tiny_data, tmp_path, name):
    honest, planted, rule = CHEATS[name]
    assert SOURCE.count(honest) == 1, "the script has changed: plant the cheat anew"
    copy = tmp_path / "train_gpt.py"
    copy.write_text(SOURCE.replace(honest, planted))
    status, lines = audit_copy(finished, tiny_data, copy, "--documents", "3")
    assert status == 1 and any(line.startswith(f"FAIL  {rule}") for line in lines), lines
    assert lines[-1].startswith("FAIL: ") and rule in lines[-1] and any(line.startswith("pass  size") for line in lines)


def test_a_headline_that_does_not_follow_is_caught(finished, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tiny_data))
    result = json.loads((finished / "result.json").read_text())
    scorer = audit.Scorer(tg, finished / "final_model.int6.ptz")
    for change in ({}, {"val_bpb": result["val_bpb"] - 0.01}, {"bytes": result["bytes"] + 9}, {"tokens": result["tokens"] - 1},
                   {"documents": 4}, {"val_loss": result["val_loss"] - 0.01}):
        (tmp_path / "result.json").write_text(json.dumps({**result, **change}))
        (verdict,) = audit.headline(tmp_path, scorer)
        assert verdict.passed == (not change), verdict
    scores = np.load(finished.parent / "scores.npz")
    trial = audit.Audit(scorer, scorer.documents(5), seed=0)
    assert trial.saved(finished.parent / "scores.npz").passed
    for change in ({"nll": scores["nll"] - 0.001}, {"document_starts": scores["document_starts"] + np.arange(5)}):
        np.savez(tmp_path / "s.npz", **{**scores, **change})
        assert not trial.saved(tmp_path / "s.npz").passed


def keep_adapters(self, slots):
    """Only those of the first documents are new."""
    if not hasattr(self, "begun"):
        self.begun = True
        ENTER(self, slots)


ENTER = tg.Adapters.enter


NOISES = [(0.003, ENTER, True), (0.003, keep_adapters, False), (0.05, ENTER, False)]


@pytest.mark.parametrize("noise,enter,passes", NOISES)
def test_noise_of_a_gpu_is_measured(finished, tiny_data, monkeypatch, noise, enter, passes):
    """Scores that differ a little each time, as they do there, are no cheat; but noise hides none, and has a limit."""
    monkeypatch.setenv("DATA_DIR", str(tiny_data))
    monkeypatch.setattr(tg.Adapters, "enter", enter)
    scorer, rng = audit.Scorer(tg, finished / "final_model.int6.ptz"), np.random.default_rng(0)
    score, noisy = scorer.score, lambda scores: scores + noise * rng.standard_normal(len(scores))
    scorer.score, scorer.ranks.on_gpu = lambda *args: [*map(noisy, score(*args))], True
    scorer.ranks.synchronize = lambda: None
    trial = audit.Audit(scorer, scorer.documents(5), seed=0)
    verdicts = [verdict for check in (trial.order, trial.tails, trial.lengths, trial.others) for verdict in check()]
    assert all(verdict.passed for verdict in verdicts) == passes, [str(verdict) for verdict in verdicts]


def test_mistakes_end_in_one_line(finished, tiny_data, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tiny_data))
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    for run, options, said in ((tmp_path, (), "final_model.int6.ptz"), (finished, ("--documents", "2"), "too few")):
        assert audit.main([str(run), *options]) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    for script, said in ((broken, "ZeroDivisionError"), (tmp_path / "none.py", "FileNotFoundError")):
        with pytest.raises(SystemExit) as end:
            audit.main([str(finished), "--script", str(script)])
        err = capfd.readouterr().err
        assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_bytes_are_those_of_the_files(finished, tmp_path):
    for file in filter(Path.is_file, finished.iterdir()):  # importing the packed script leaves a cache
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert audit.size(tmp_path, tg).passed
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**result, "model_bytes": result["model_bytes"] - 1}))
    assert not audit.size(tmp_path, tg).passed and "differs in model" in audit.size(tmp_path, tg).figures
    (tmp_path / "result.json").unlink()
    with open(tmp_path / "final_model.int6.ptz", "r+b") as file:
        file.truncate(16_000_000)
    assert not audit.size(tmp_path, tg).passed


@pytest.mark.parametrize("chunk,growth", [(2, 0), (16, 0), (48, 0), (8, 0.2)])
def test_places_lie_inside_chunks_that_are_learned_from(chunk, growth):
    rng, cfg = np.random.default_rng(0), tg.Config(ttt_chunk_size=chunk, ttt_chunk_growth=growth)
    ends = tg.chunk_ends(200, cfg)
    for length in [*range(1, 100)] * 5:
        at = audit.place(rng, length, ends)
        if at:
            assert 2 <= at < length and at - 1 not in ends
            assert length <= chunk or np.searchsorted(ends, at) < np.searchsorted(ends, length)
        else:
            assert length < 3


def test_what_counts_as_noise():
    rng = np.random.default_rng(0)
    before = [rng.uniform(1, 5, n) for n in (50, 80, 120, 60)]
    moved = lambda change: audit.Moved.of([(b, b + change(len(b))) for b in before])
    assert moved(lambda n: 0.0).little(None) and moved(lambda n: 1e-6).little(None)
    assert not moved(lambda n: 1e-4).little(None)
    assert not audit.Moved.of([]).little(None) and not audit.Moved.of([]).little(0.01), "nothing was compared"
    noise = moved(lambda n: 0.002 * rng.standard_normal(n))
    assert not noise.little(None) and noise.little(4 * noise.rms)
    assert not moved(lambda n: 0.1 * rng.standard_normal(n)).little(4 * noise.rms), "too wide"
    assert not moved(lambda n: 0.003 + 0.0001 * rng.standard_normal(n)).little(4 * noise.rms), "it drifts"
    assert not moved(lambda n: np.where(np.arange(n) == 3, np.nan, 0.0)).little(4 * noise.rms)
