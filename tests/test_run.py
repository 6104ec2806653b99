"""The whole script: what it leaves behind, re-scoring, determinism, order of events, mistakes of users."""
import hashlib
import importlib.util
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMOKE, TINY, free_port, make_data, smoke_tokens, write_shard

import train_gpt as tg

FILES = {"log.txt", "metrics.jsonl", "result.json", "final_model.pt", "final_model.int6.ptz", "train_gpt_packed.py"}


def nll_of(path):
    return np.load(path)["nll"]


@pytest.fixture(scope="session")
def finished(tiny_data, tmp_path_factory):
    """One run with scores saved: folder, its scores, its result."""
    folder = tmp_path_factory.mktemp("finished")
    env = {**TINY, "DATA_DIR": tiny_data, "ARTIFACT_DIR": folder / "run", "SAVE_SCORES": folder / "scores.npz"}
    assert tg.main({name: str(value) for name, value in env.items()}) == 0
    return folder / "run", folder / "scores.npz", json.loads((folder / "run/result.json").read_text())


def test_what_a_run_leaves_behind(finished):
    folder, _, result = finished
    assert {path.name for path in folder.iterdir()} == FILES
    log = (folder / "log.txt").read_text()
    assert log.splitlines()[-1] == "RESULT " + json.dumps(result)
    source = Path(tg.__file__).read_text()
    assert source in log and hashlib.sha256(source.encode()).hexdigest() == result["code_sha256"]
    assert f"code_sha256:{result['code_sha256']}" in log and "train_batch_tokens:1024" in log and "torch:" in log
    for line in ("step:1/6 train_loss:", "step_avg:", "layer_loop:enabled", "quantized val_loss:", "final val_loss:",
                 "phase train", "clock scoring"):
        assert line in log
    packed = (folder / "train_gpt_packed.py").read_bytes()
    assert len(packed) == result["code_bytes"] and hashlib.sha256(packed).hexdigest() == result["packed_sha256"]
    assert (folder / "final_model.int6.ptz").stat().st_size == result["model_bytes"]
    assert result["total_bytes"] == result["code_bytes"] + result["model_bytes"] <= result["cap_bytes"] == 16_000_000


def test_result_has_every_field(finished):
    _, _, result = finished
    assert set(result) >= {
        "val_loss", "val_bpb", "val_loss_quantized", "val_bpb_quantized", "val_loss_unquantized", "val_bpb_unquantized",
        "documents", "tokens", "bytes", "model_bytes", "code_bytes", "total_bytes", "seed", "code_sha256", "steps", "phases",
        "clocks", "hardware", "versions", "unadapted_tokens"}
    assert result["documents"] == 5 and result["steps"] == 6 and result["seed"] == 1337 and result["unadapted_tokens"] == 0
    assert set(result["phases"]) >= {"setup", "warm-up", "train", "calibrate", "export", "score quantized", "adapt"}
    assert result["clocks"]["scoring"]["budget"] == 600 and result["seconds"] >= sum(result["phases"].values()) * 0.9


def test_metrics_are_complete(finished):
    folder, _, result = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6] and all(row["loss"] > 0 for row in steps)
    assert [row["looped"] for row in steps] == [False, False, False, True, True, True], "from step 3 of 6 on, .35 passed"
    assert rows[-1] == {"kind": "result", **result}


def test_anyone_can_recompute_the_score(finished):
    _, scores, result = finished
    file = np.load(scores)
    assert file["nll"].dtype == np.float32
    assert len(file["nll"]) == len(file["token_bytes"]) == result["tokens"]
    assert file["token_bytes"].sum() == result["bytes"] and len(file["document_starts"]) == result["documents"]
    nats = file["nll"].astype(np.float64).sum()
    assert nats / result["tokens"] == pytest.approx(result["val_loss"], rel=1e-12)
    assert nats / np.log(2) / result["bytes"] == pytest.approx(result["val_bpb"], rel=1e-12)
    assert file["document_starts"].tolist() == [0, 300, 340, 510, 600]


def test_console_is_short_and_ends_with_the_result(run):
    outcome = run()
    assert outcome.status == 0 and outcome.err == "" and len(outcome.out.splitlines()) < 60
    assert outcome.out.splitlines()[-1].startswith("RESULT {")
    assert "\n" + "=" * 100 not in outcome.out, "the source goes to the file only"


def test_one_seed_one_artifact(run, finished, tmp_path):
    again = run(ARTIFACT_DIR=tmp_path / "again", SAVE_SCORES=tmp_path / "again.npz")
    other = run(ARTIFACT_DIR=tmp_path / "other", SEED=1)
    name = "final_model.int6.ptz"
    assert (tmp_path / "again" / name).read_bytes() == (finished[0] / name).read_bytes()
    assert np.array_equal(nll_of(tmp_path / "again.npz"), nll_of(finished[1]))
    assert again.result["val_bpb"] == finished[2]["val_bpb"] != other.result["val_bpb"]


def test_settings_reach_the_run(run, finished, tmp_path):
    for i, change in enumerate([dict(MATRIX_LR=0.01), dict(EMA_DECAY=0.1), dict(GRAD_CLIP_NORM=0.001), dict(BETA2=0.5),
                                dict(TIED_EMBED_LR=0.003), dict(SCALAR_LR=0.2), dict(MUON_WD=3), dict(WARMDOWN_FRAC=0.1),
                                dict(QK_GAIN_INIT=2), dict(ENABLE_LOOPING_AT=1), dict(GPTQ_CALIBRATION_BATCHES=2),
                                dict(TTT_LORA_LR=0), dict(TTT_CHUNK_SIZE=24), dict(TTT_EVAL_SEQ_LEN=32),
                                dict(MUON_MOMENTUM=0.5)]):
        outcome = run(ARTIFACT_DIR=tmp_path / str(i), **change)
        assert outcome.result["val_bpb"] != finished[2]["val_bpb"], change


# ----------------------------------------------------------------------------------------------------------------------
# Re-scoring


def test_the_artifact_alone_scores_the_same(run, finished, tiny_data, tmp_path):
    """Neither training shards nor the checkpoint are at hand."""
    folder, scores, result = finished
    shards = sorted((tiny_data / "datasets/fineweb10B_sp1024").glob("*val*"))
    bare = make_data(tmp_path / "bare", [], [np.array(tg.open_shard(path)) for path in shards])
    artifact = tmp_path / "alone.ptz"
    artifact.write_bytes((folder / "final_model.int6.ptz").read_bytes())
    outcome = run(EVAL_ONLY_PATH=artifact, DATA_DIR=bare, SAVE_SCORES=tmp_path / "s.npz")
    assert np.array_equal(nll_of(tmp_path / "s.npz"), nll_of(scores))
    assert outcome.result["val_bpb"] == result["val_bpb"] and outcome.result["model_bytes"] == result["model_bytes"]
    assert "val_bpb_unquantized" not in outcome.result and "steps" not in outcome.result


def test_a_checkpoint_uses_the_artifact_made_from_it(run, finished, tmp_path):
    outcome = run(EVAL_ONLY_PATH=finished[0] / "final_model.pt", SAVE_SCORES=tmp_path / "s.npz")
    assert "was made from" in outcome.out and "calibrate" not in outcome.result["phases"]
    assert np.array_equal(nll_of(tmp_path / "s.npz"), nll_of(finished[1]))
    assert outcome.result["val_bpb_unquantized"] == finished[2]["val_bpb_unquantized"]


def test_a_checkpoint_of_another_version_is_refused(run, finished, tmp_path):
    saved = torch.load(finished[0] / "final_model.pt", weights_only=True)
    torch.save({**saved, "settings": {**saved["settings"], "matrix_bits": 6}}, tmp_path / "old.pt")
    assert "another version of this script made it: what is matrix_bits?" in run(EVAL_ONLY_PATH=tmp_path / "old.pt").error


def test_a_damaged_artifact_beside_a_checkpoint_is_made_again(run, finished, tmp_path):
    for name in ("final_model.pt", "final_model.int6.ptz"):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes()[: None if name.endswith("pt") else 1000])
    outcome = run(EVAL_ONLY_PATH=tmp_path / "final_model.pt")
    assert "calibrating again" in outcome.out and outcome.result["val_bpb"] == finished[2]["val_bpb"]


def test_a_checkpoint_without_it_is_calibrated_again(run, finished, tmp_path):
    lonely = tmp_path / "final_model.pt"
    lonely.write_bytes((finished[0] / "final_model.pt").read_bytes())
    outcome = run(EVAL_ONLY_PATH=lonely)
    assert "training shards are needed" in outcome.out and outcome.result["val_bpb"] == finished[2]["val_bpb"]
    assert (tmp_path / "run/final_model.int6.ptz").read_bytes() == (finished[0] / "final_model.int6.ptz").read_bytes()
    other = run(EVAL_ONLY_PATH=finished[0] / "final_model.pt", GPTQ_CALIBRATION_BATCHES=2, ARTIFACT_DIR=tmp_path / "two")
    assert "calibrating again" in other.out and other.result["val_bpb"] != finished[2]["val_bpb"]


def test_a_checkpoint_without_training_shards(run, finished, tmp_path):
    (tmp_path / "final_model.pt").write_bytes((finished[0] / "final_model.pt").read_bytes())
    bare = make_data(tmp_path / "bare", [], [smoke_tokens("val")])
    outcome = run(EVAL_ONLY_PATH=tmp_path / "final_model.pt", DATA_DIR=bare)
    assert "training shards are needed" in outcome.out and "fineweb_train_*.bin" in outcome.error


def test_a_result_is_never_written_over(run, finished):
    folder, before = finished[0], {path: path.read_bytes() for path in finished[0].iterdir()}
    for settings in ({}, dict(EVAL_ONLY_PATH=folder / "final_model.int6.ptz")):
        assert "holds the result of another run" in run(ARTIFACT_DIR=folder, **settings).error
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_brings_its_settings(run, finished, tiny_data, tmp_path, capfd):
    """Without any of the run's variables the score is the same; the seed of a model cannot be another."""
    for saved in ("final_model.int6.ptz", "final_model.pt"):
        env = {"EVAL_ONLY_PATH": finished[0] / saved, "DATA_DIR": tiny_data, "ARTIFACT_DIR": tmp_path / saved}
        assert tg.main({name: str(value) for name, value in env.items()}) == 0
        result = json.loads((tmp_path / saved / "result.json").read_text())
        assert result["val_bpb"] == finished[2]["val_bpb"] and result["seed"] == 1337
        assert result["mode"] == ("artifact" if saved.endswith("ptz") else "checkpoint")
    assert "set SEED=1337" in run(EVAL_ONLY_PATH=finished[0] / "final_model.int6.ptz", SEED=4).error
    changed = run(EVAL_ONLY_PATH=finished[0] / "final_model.int6.ptz", TTT_CHUNK_SIZE=8)
    assert "settings other than those of its run, which were: ttt_chunk_size:16" in changed.out


def test_a_result_says_what_speaks_against_it(run, finished, tmp_path):
    assert finished[2]["mode"] == "train" and finished[2]["caveats"] == ["not on 8 GPUs"]
    artifact = finished[0] / "final_model.int6.ptz"
    for i, (settings, why) in enumerate((
            (dict(EVAL_ONLY_PATH=artifact), "not trained by this run"),
            (dict(EVAL_ONLY_PATH=artifact, VAL_DOC_FRACTION=0.4), "not all documents"),
            (dict(EVAL_ONLY_PATH=artifact, TTT_ENABLED=0), "targets have their plain score"),
            (dict(EVAL_ONLY_PATH=artifact, EVAL_MAX_SECONDS=0.01), "targets have their plain score"),
            (dict(VAL_LOSS_EVERY=4), "validation was read during training"))):
        outcome = run(ARTIFACT_DIR=tmp_path / str(i), **settings)
        assert why in "; ".join(outcome.result["caveats"]) and why in outcome.out.rsplit("caveats: ")[1]


def test_clocks_are_judged_by_the_challenge_and_not_by_the_settings(run, monkeypatch):
    monkeypatch.setattr(tg, "CLOCK_SECONDS", 0.01)
    outcome = run(MAX_WALLCLOCK_SECONDS=0, EVAL_MAX_SECONDS=0.02)
    why = "; ".join(outcome.result["caveats"])
    assert "training took" in why and "scoring took" in why and "EXCEEDED" in outcome.out
    monkeypatch.setattr(tg, "CAP_BYTES", 100_000)
    small = dict(artifact := {"val_loss": 0}, total_bytes=100_001, unadapted_tokens=0, mode="train", recompilations=3)
    log = type("Log", (), {"spent": lambda self, clock: 0.0})()
    why = "; ".join(tg.caveats(tg.Run(tg.Config(), tg.Ranks(), log, tg.Ops()), small))
    assert "100001 bytes of 100000" in why and "recompilations on the clocks: 3" in why


def test_what_is_compiled_on_a_clock_is_counted(run, finished, monkeypatch):
    assert finished[2]["recompilations"] == 0
    calibrate = tg.calibrate

    def compiling(*args):
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        return calibrate(*args)

    monkeypatch.setattr(tg, "calibrate", compiling)
    outcome = run()
    assert outcome.result["recompilations"] == 1 and "\nrecompilations on the clocks:1\n" in outcome.out
    assert "recompilations on the clocks: 1" in outcome.result["caveats"]
    assert outcome.result["val_bpb"] == finished[2]["val_bpb"]


def test_clocks_hold_what_the_rules_put_on_them(finished):
    result = finished[2]
    seconds = result["phases"]
    for clock, phases in (("training", ("train", "calibrate")), ("scoring", ("open artifact", "score quantized", "adapt"))):
        assert result["clocks"][clock]["seconds"] == pytest.approx(sum(seconds[name] for name in phases), abs=0.01)
    table = [line.split() for line in (finished[0] / "log.txt").read_text().splitlines() if line.startswith("phase ")]
    assert {" ".join(row[1:-3]): row[-1] for row in table if row[-1] != "s"} == {
        "train": "training", "calibrate": "training", "open artifact": "scoring", "score quantized": "scoring",
        "adapt": "scoring"}


def told(result, seconds):
    """Whether phases hold all of a run's seconds but for what lies between them."""
    return 0.75 * seconds <= sum(result["phases"].values()) - result["phases"]["imports"] <= seconds


@pytest.mark.parametrize("phase,slower", [("train", 0.5), ("adapt", 0.2)])  # seconds a step, a round
def test_clocks_do_not_lose_time(run, monkeypatch, tmp_path, phase, slower):
    began = time.perf_counter()
    assert told(run().result, time.perf_counter() - began)
    elapsed = tg.Phase.elapsed  # and one that goes at a fifth of its speed is noticed
    monkeypatch.setattr(tg.Phase, "elapsed", lambda self: elapsed(self) / (5 if self.name == phase else 1))
    slow = tg.Optimizers.step if phase == "train" else tg.adapt
    owner, name = (tg.Optimizers, "step") if phase == "train" else (tg, "adapt")
    monkeypatch.setattr(owner, name, lambda *args: (time.sleep(slower), slow(*args))[1])
    began = time.perf_counter()
    assert not told(run(ARTIFACT_DIR=tmp_path / "again").result, time.perf_counter() - began)


def test_steps_are_taken_in_training_and_warm_up_only(run, monkeypatch):
    logs, taken = [], []
    opened, step = tg.RunLog.__init__, tg.Optimizers.step
    monkeypatch.setattr(tg.RunLog, "__init__", lambda self, *args: (logs.append(self), opened(self, *args))[1])
    monkeypatch.setattr(tg.Optimizers, "step", lambda self, *args: (
        taken.append([p.name for p in logs[0].phases if not p.seconds]), step(self, *args))[1])
    assert run().status == 0
    assert taken.count(["train"]) == 6 and all(names in (["train"], ["warm-up"]) for names in taken)


def test_the_clock_stands_still_for_validation_only_after_training_is_done(run, monkeypatch):
    """What was sent to a GPU before validation belongs to the training clock: it is waited for first."""
    events, evaluate = [], tg.evaluate
    monkeypatch.setattr(tg.Ranks, "synchronize", lambda self: events.append("wait"))
    monkeypatch.setattr(tg, "evaluate", lambda *args: (events.append("validate"), evaluate(*args))[1])
    run(VAL_LOSS_EVERY=3)
    assert all(events[i - 1] == "wait" for i, event in enumerate(events) if event == "validate") and "validate" in events


def test_what_is_scored_is_what_was_read_back(run, monkeypatch, tmp_path):
    """An artifact that changes between writing and reading ends the run."""
    write = tg.write_file

    def damaging(path, data):
        write(path, data)
        if path.suffix == ".ptz":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setattr(tg, "write_file", damaging)
    assert "damaged" in run().error


def test_a_lost_scores_file_costs_no_result(run, monkeypatch, tmp_path):
    write = tg.write_file

    def full(path, data):
        if path.suffix == ".npz":
            raise tg.UserError(f"cannot write {path}: No space left on device")
        write(path, data)
    monkeypatch.setattr(tg, "write_file", full)
    outcome = run(SAVE_SCORES=tmp_path / "s.npz")
    assert outcome.status == 2 and "No space left" in outcome.err and "RESULT {" in outcome.out
    assert (tmp_path / "run/result.json").exists()


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(tg.UserError, match="it is not a file"):
            tg.write_file(tmp_path / name, b"x")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    tg.write_file(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_bytes() == b"x"


def test_validation_shards_have_no_gaps_and_no_strangers(run, tiny_data, tmp_path):
    tokens = smoke_tokens("val")
    data = make_data(tmp_path / "d", [smoke_tokens("train")[:4000]], [tokens[:500], tokens[:500], tokens[:500]])
    folder = data / "datasets/fineweb10B_sp1024"
    (folder / "fineweb_val_000001.bin").rename(folder / "fineweb_val_000001_copy.bin")
    assert "not numbered from 000000 without a gap" in run(DATA_DIR=data).error
    (folder / "fineweb_val_000001_copy.bin").unlink()
    assert "not numbered" in run(DATA_DIR=data).error


def test_a_result_names_its_data(finished, tiny_data):
    shards = sorted((tiny_data / "datasets/fineweb10B_sp1024").glob("*val*"))
    tokens = b"".join(np.array(tg.open_shard(path)).tobytes() for path in shards)
    assert finished[2]["val_sha256"] == hashlib.sha256(tokens).hexdigest()
    model = (tiny_data / "tokenizers/fineweb_1024_bpe.model").read_bytes()
    assert finished[2]["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()
    artifact = (finished[0] / "final_model.int6.ptz").read_bytes()
    assert finished[2]["model_sha256"] == hashlib.sha256(artifact).hexdigest()
    assert re.fullmatch("[0-9a-f]{64}", finished[2]["train_sha256"])


# ----------------------------------------------------------------------------------------------------------------------
# Order of events


LISTENERS = []  # lists of paths
sys.addaudithook(lambda event, args: [heard.append(str(args[0])) for heard in LISTENERS] if event == "open" else None)


@pytest.fixture
def opened():
    """Path of every file that is opened from now on, however: the interpreter itself tells."""
    LISTENERS.append(paths := [])
    yield paths
    LISTENERS.remove(paths)


def validation_comes_last(paths):
    validation = [i for i, path in enumerate(paths) if "fineweb_val" in path]
    written = max(i for i, path in enumerate(paths) if path.endswith("final_model.int6.ptz.part"))
    return validation and min(validation) > written


def test_validation_is_opened_after_the_artifact_is_written(run, opened):
    assert run().status == 0 and validation_comes_last(opened)


@pytest.mark.parametrize("read", [io.open, os.open, np.fromfile, np.memmap, Path.read_bytes])
def test_any_way_to_open_validation_before_is_caught(run, opened, monkeypatch, tiny_data, read):
    honest, (shard, *_) = tg.train, sorted(tiny_data.glob("**/fineweb_val_*.bin"))
    more = (os.O_RDONLY,) if read is os.open else (np.uint8, "r") if read is np.memmap else ()
    monkeypatch.setattr(tg, "train", lambda *args: (read(shard, *more), honest(*args))[1])
    assert run().status == 0 and not validation_comes_last(opened)


def unreadable(monkeypatch):
    """Validation shards that raise when read."""
    original = tg.open_shard

    def open_shard(path):
        if "fineweb_val" in str(path):
            raise RuntimeError("validation was opened")
        return original(path)
    monkeypatch.setattr(tg, "open_shard", open_shard)


def test_a_run_trains_and_exports_without_validation(run, monkeypatch, tmp_path, finished):
    unreadable(monkeypatch)
    with pytest.raises(RuntimeError, match="validation was opened"):
        run()
    artifact = tmp_path / "run/final_model.int6.ptz"
    assert artifact.read_bytes() == (finished[0] / "final_model.int6.ptz").read_bytes()


def test_looking_at_validation_while_training_is_caught(run, monkeypatch, tmp_path):
    """What VAL_LOSS_EVERY asks for, which is why a record leaves it at 0."""
    unreadable(monkeypatch)
    with pytest.raises(RuntimeError, match="validation was opened"):
        run(VAL_LOSS_EVERY=2)
    assert not (tmp_path / "run/final_model.int6.ptz").exists()


def test_validation_during_training_changes_nothing_and_is_not_timed(run, finished, tmp_path):
    outcome = run(VAL_LOSS_EVERY=2)
    assert outcome.out.count("/6 val_loss:") == 3, "every second step, the last once"
    assert (tmp_path / "run/final_model.int6.ptz").read_bytes() == (finished[0] / "final_model.int6.ptz").read_bytes()


def test_the_training_clock_ends_a_run(run, monkeypatch):
    """On a clock by which every step takes .05 s: as many steps as fit, none beyond, and rates that follow it."""
    taken, step = [], tg.Optimizers.step
    monkeypatch.setattr(tg.Optimizers, "step", lambda self, *args: (taken.append(1), step(self, *args))[1])

    def elapsed(phase):
        began = phase.__dict__.setdefault("steps_before", len(taken))
        return 0.05 * (len(taken) - began) if phase.name == "train" else 0.0
    monkeypatch.setattr(tg.Phase, "elapsed", elapsed)
    outcome = run(MAX_WALLCLOCK_SECONDS=3, GPTQ_RESERVE_SECONDS=1, ITERATIONS=100000, TRAIN_LOG_EVERY=1000000)
    result = outcome.result
    assert 38 <= result["steps"] <= 40 and result["phases"]["train"] <= 2
    assert result["clocks"]["training"]["budget"] == 3
    rows = [json.loads(line) for line in Path(outcome.out.split("artifact_dir:")[1].split()[0], "metrics.jsonl").open()]
    rates = [row["lr"] for row in rows if row["kind"] == "step"]
    assert rates[0] == 1 and rates[-1] < 0.2 and rates == sorted(rates, reverse=True)


def test_a_scoring_clock_that_runs_out_is_said(run, finished):
    outcome = run(EVAL_MAX_SECONDS=0.01, EVAL_ONLY_PATH=finished[0] / "final_model.int6.ptz")
    assert outcome.result["unadapted_tokens"] == outcome.result["tokens"]
    assert outcome.result["val_bpb"] == outcome.result["val_bpb_quantized"]
    assert "EVAL_MAX_SECONDS=0.01 passed" in outcome.out and "depended on time" in outcome.out


def test_without_test_time_training_the_plain_score_is_the_headline(run, finished):
    outcome = run(TTT_ENABLED=0, EVAL_ONLY_PATH=finished[0] / "final_model.int6.ptz")
    assert outcome.result["val_bpb"] == outcome.result["val_bpb_quantized"] == finished[2]["val_bpb_quantized"]


# ----------------------------------------------------------------------------------------------------------------------
# The packed script and torchrun


def start(path, cwd, launcher=(), **settings):
    env = {k: v for k, v in os.environ.items() if k not in TINY}
    env.update({k: str(v) for k, v in {**TINY, "OMP_NUM_THREADS": 1, **settings}.items()})
    return subprocess.Popen([sys.executable, *launcher, str(path)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def script(*args, **settings):
    process = start(*args, **settings)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_packed_script_is_the_script(finished, tiny_data, tmp_path):
    """Run from a read-only folder elsewhere: same model bytes, same scores, and it counts itself."""
    folder, scores, result = finished
    home = tmp_path / "home"
    home.mkdir()
    packed = home / "train_gpt.py"
    packed.write_bytes((folder / "train_gpt_packed.py").read_bytes())
    home.chmod(0o555)
    done = script(packed, tmp_path, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "r", SAVE_SCORES=tmp_path / "s.npz",
                  TMPDIR=tmp_path)
    assert done.returncode == 0, done.stderr
    own = json.loads((tmp_path / "r/result.json").read_text())
    assert (tmp_path / "r/final_model.int6.ptz").read_bytes() == (folder / "final_model.int6.ptz").read_bytes()
    assert np.array_equal(nll_of(tmp_path / "s.npz"), nll_of(scores))
    assert own["code_bytes"] == result["code_bytes"] and own["packed_sha256"] == result["packed_sha256"]
    log = (tmp_path / "r/log.txt").read_text()
    logged = log.split("=" * 100 + "\n")[1][:-1]
    assert hashlib.sha256(logged.encode()).hexdigest() == own["code_sha256"], "the source in the log is what ran"
    assert packed.stat().st_size == own["code_bytes"]


def test_packed_script_imports_anywhere(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    spec = importlib.util.spec_from_file_location("packed", finished[0] / "train_gpt_packed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Config() != tg.Config and module.Config().model_dim == 512
    import inspect
    assert "def window" in inspect.getsource(module.window), "its lines are there to be read, as Triton does"


def test_two_ranks_under_torchrun(finished, tiny_data, tmp_path):
    folder, scores, result = finished
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    done = script(Path(tg.__file__), tmp_path, launcher, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "r", SAVE_SCORES=tmp_path / "s.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RESULT {") == 1
    own = json.loads((tmp_path / "r/result.json").read_text())
    assert own["val_bpb"] == pytest.approx(result["val_bpb"], abs=2e-3)
    assert own["hardware"].startswith("2 x")
    mine = [json.loads(line)["loss"] for line in (tmp_path / "r/metrics.jsonl").open() if '"step"' in line and "loss" in line][:6]
    alone = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open() if '"step"' in line and "loss" in line][:6]
    np.testing.assert_allclose(mine, alone, rtol=1e-4)
    rescored = script(Path(tg.__file__), tmp_path, launcher, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "e",
                      EVAL_ONLY_PATH=folder / "final_model.int6.ptz", SAVE_SCORES=tmp_path / "e.npz")
    assert rescored.returncode == 0, rescored.stderr
    np.testing.assert_allclose(nll_of(tmp_path / "e.npz"), nll_of(scores), atol=2e-5)
    assert json.loads((tmp_path / "e/result.json").read_text())["val_bpb"] == pytest.approx(result["val_bpb"], abs=2e-5)


def test_two_nodes(finished, tiny_data, tmp_path):
    """Two launchers, each with one process and a folder of its own, as on two machines: the same run."""
    port = free_port()
    nodes = []
    for n in range(2):
        (tmp_path / f"{n}").mkdir()
        launcher = ("-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={n}", "--nproc_per_node=1",
                    "--master_addr=127.0.0.1", f"--master_port={port}")
        nodes.append(start(Path(tg.__file__), tmp_path / f"{n}", launcher, DATA_DIR=tiny_data, ARTIFACT_DIR="r"))
    (out, err), (silent, _) = (node.communicate() for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], err
    assert out.count("RESULT {") == 1 and "step:" not in silent and not (tmp_path / "1/r").exists()
    own = json.loads((tmp_path / "0/r/result.json").read_text())
    assert own["hardware"].startswith("2 x") and own["val_bpb"] == pytest.approx(finished[2]["val_bpb"], abs=2e-3)


def test_a_rank_that_dies_ends_the_run(tiny_data, tmp_path):
    """Killed in the middle of training; the other one, which waits for it in a collective, does not wait for long."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    run = start(Path(tg.__file__), tmp_path, launcher, DATA_DIR=tiny_data, ARTIFACT_DIR="r", ITERATIONS=100_000)
    assert any(line.startswith("step:3/") for line in run.stdout), run.communicate()[1]
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"train_gpt.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    try:
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode != 0 and "SIGKILL" in err and not (tmp_path / "r/result.json").exists()


def test_a_mistake_under_torchrun_is_said_once(tiny_data, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=3", f"--master_port={free_port()}")
    done = script(Path(tg.__file__), tmp_path, launcher, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "r")
    assert done.returncode != 0 and "RESULT" not in done.stdout
    mine = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(mine) == 1 and "TRAIN_BATCH_TOKENS=1024 cannot be shared by 3 ranks" in mine[0]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes: one line that names the variable or file, status 2, no RESULT


def test_missing_data(run, tmp_path):
    assert "DATA_DIR=/nowhere" in run(DATA_DIR="/nowhere").error
    assert "datasets/fineweb10B_sp512" in run(VOCAB_SIZE=512).error
    for split in ("train", "val"):
        data = make_data(tmp_path / split, [smoke_tokens("train")[:3000]] * (split != "train"),
                         [smoke_tokens("val")[:500]] * (split != "val"))
        assert f"fineweb_{split}_*.bin" in run(DATA_DIR=data).error


def damaged(folder, split, change):
    """A DATA_DIR one of whose shards went through change(bytes)."""
    data = make_data(folder, [smoke_tokens("train")[:4000]], [smoke_tokens("val")[:1500]])
    path = data / f"datasets/fineweb10B_sp1024/fineweb_{split}_000000.bin"
    path.write_bytes(change(path.read_bytes()))
    return data, path


def relabel(blob, index, value):
    header = np.frombuffer(blob[:1024], dtype="<i4").copy()
    header[index] = value
    return header.tobytes() + blob[1024:]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("what,change,says", [
    ("empty file", lambda b: b"", "not a token shard"),
    ("header only", lambda b: relabel(b[:1024], 2, 0), "empty"),
    ("short header", lambda b: b[:1000], "not a token shard"),
    ("truncated", lambda b: b[:-100], "truncated"),
    ("odd byte", lambda b: b[:-1], "truncated"),
    ("over-long", lambda b: b + b"\0\0", "over-long"),
    ("wrong magic", lambda b: relabel(b, 0, 1), "not a token shard"),
    ("wrong version", lambda b: relabel(b, 1, 2), "not a token shard"),
    ("negative count", lambda b: relabel(b, 2, -5), "empty"),
    ("token id too large", lambda b: b[:3000] + b"\xff\xff" + b[3002:], "holds token 65535, VOCAB_SIZE=1024"),
    ("no BOS", lambda b: b[:1024] + b"\x05\x00" * ((len(b) - 1024) // 2), "BOS (id 1)"),
    ("text file", lambda b: b"once upon a time " * 400, "not a token shard"),
])
def test_damaged_shards(run, tmp_path, split, what, change, says):
    data, path = damaged(tmp_path / "d", split, change)
    error = run(DATA_DIR=data, ITERATIONS=3).error
    assert str(path) in error and says in error


def test_validation_that_begins_inside_a_document(run, tmp_path):
    data = make_data(tmp_path / "d", [smoke_tokens("train")[:4000]], [smoke_tokens("val")[5:1500]])
    assert "does not begin with BOS (id 1)" in run(DATA_DIR=data, ITERATIONS=2).error


def test_unreadable_shard(run, tmp_path):
    data, path = damaged(tmp_path / "d", "train", lambda b: b)
    path.unlink()
    path.mkdir()
    assert str(path) in run(DATA_DIR=data).error


@pytest.mark.parametrize("change,says", [
    (lambda b: b"", "not a SentencePiece model"), (lambda b: b[:5000], "not a SentencePiece model"),
    (lambda b: b"garbage" * 1000, "not a SentencePiece model"),
    (lambda b: (ROOT / "tests/golden/tokenizer_8192.model").read_bytes(), "has 8192 pieces"),
])
def test_wrong_or_damaged_tokenizer(run, tmp_path, change, says):
    data = make_data(tmp_path / "d", [smoke_tokens("train")[:4000]], [smoke_tokens("val")[:1500]])
    path = data / "tokenizers/fineweb_1024_bpe.model"
    path.write_bytes(change(path.read_bytes()))
    error = run(DATA_DIR=data).error
    assert str(path) in error and says in error
    path.unlink()
    assert str(path) in run(DATA_DIR=data).error


def test_damaged_artifact_and_checkpoint(run, finished, tmp_path):
    for name, change in (("final_model.int6.ptz", lambda b: b[:-7]), ("final_model.int6.ptz", lambda b: b[:99] + b"x" + b[100:]),
                         ("final_model.pt", lambda b: b[:-999]), ("final_model.pt", lambda b: b"hello"),
                         ("final_model.pt", lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :])):
        path = tmp_path / name
        path.write_bytes(change((finished[0] / name).read_bytes()))
        assert str(path) in run(EVAL_ONLY_PATH=path).error
    assert "/nowhere.pt" in run(EVAL_ONLY_PATH="/nowhere.pt").error
    error = run(EVAL_ONLY_PATH=finished[0] / "final_model.int6.ptz", NUM_LOOPS=1, LOGIT_SOFTCAP=20).error
    assert "NUM_LOOPS=2" in error and "LOGIT_SOFTCAP=30.0" in error and "NUM_LAYERS" not in error
    torch.save({"model": {}, "steps": 1, "weights": {"embed": torch.zeros(2)}}, tmp_path / "foreign.pt")
    assert "foreign.pt" in run(EVAL_ONLY_PATH=tmp_path / "foreign.pt").error


def test_unwritable_places(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert f"ARTIFACT_DIR={file / 'x'}" in run(ARTIFACT_DIR=file / "x").error
    assert "SAVE_SCORES=" in run(SAVE_SCORES=tmp_path / "missing" / "s.npz").error


def test_too_little_room_is_noticed_before_training(run, monkeypatch):
    monkeypatch.setattr(tg.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    outcome = run()
    assert "ARTIFACT_DIR" in outcome.error and "MiB" in outcome.error and "train_loss" not in outcome.out


@pytest.mark.parametrize("limit", [60_000, 100_000, 200_000])
def test_full_disk(tiny_data, tmp_path, limit):
    """A limit on the size of files makes some write fail, as a full disk does; nothing half-written may stay behind."""
    code = (f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.path.insert(0, {str(ROOT)!r});"
            f"import train_gpt as tg; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
            "sys.exit(tg.main())")
    env = {**os.environ, **{k: str(v) for k, v in TINY.items()}, "DATA_DIR": str(tiny_data), "ARTIFACT_DIR": str(tmp_path / "r")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "RESULT" not in done.stdout
    assert done.stderr.startswith("error: cannot write ") and done.stderr.count("\n") == 1, done.stderr
    left = {path.name for path in (tmp_path / "r").iterdir()}
    assert left <= FILES - {"result.json"} and not any(name.endswith(".part") for name in left)
    if "final_model.pt" in left:
        torch.load(tmp_path / "r/final_model.pt", weights_only=True)


@pytest.mark.parametrize("victim", ["final_model.pt", "final_model.int6.ptz", "result.json"])
def test_a_run_killed_while_writing(tiny_data, tmp_path, victim):
    """SIGKILL between writing and renaming, over a finished earlier run: the old file stays, whole."""
    folder = tmp_path / "r"
    folder.mkdir()
    if victim != "result.json":
        (folder / victim).write_bytes(b"old")
    code = (f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt as tg; replace = os.replace\n"
            f"def dying(src, dst):\n    if str(dst) == {str(folder / victim)!r}: os.kill(os.getpid(), signal.SIGKILL)\n    replace(src, dst)\n"
            "os.replace = dying\nsys.exit(tg.main())")
    env = {**os.environ, **{k: str(v) for k, v in TINY.items()}, "DATA_DIR": str(tiny_data), "ARTIFACT_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert not (folder / victim).exists() if victim == "result.json" else (folder / victim).read_bytes() == b"old"


def test_missing_tool_is_said_before_training(run, monkeypatch):
    for name in ("brotli", "sentencepiece", "python_minifier"):
        tg.pack_script.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            outcome = run()
            assert name in outcome.error and "requirements.txt" in outcome.error and "train_loss" not in outcome.out


def test_divergence_is_said(run):
    assert "training diverged" in run(SCALAR_LR=1e30, TIED_EMBED_LR=1e30, TRAIN_LOG_EVERY=1).error
    assert "TTT_LORA_LR" in run(TTT_LORA_LR=1e30).error


def test_write_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x"
    tg.write_file(path, b"one")
    tg.write_file(path, b"two")
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(tg.UserError, match=f"cannot write {path}: No space left"):
        tg.write_file(path, b"three")
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]


def test_odd_data_trains(run, tmp_path):
    """Documents of one token, one longer than everything, and a whole training set smaller than one step."""
    train = smoke_tokens("train")[:700]
    train = np.concatenate([train, [1, 1, 1], train[1:300]])
    long = np.concatenate([[1], np.tile(smoke_tokens("val")[1:200], 4), [1]])
    outcome = run(DATA_DIR=make_data(tmp_path / "d", [train], [long]), ITERATIONS=3)
    assert outcome.status == 0 and outcome.result["documents"] == 2 and outcome.result["tokens"] == len(long) - 1
