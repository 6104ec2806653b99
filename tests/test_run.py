"""The whole script: what it leaves behind, re-scoring, determinism, clocks, order of events, torchrun."""
import dataclasses
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import (
    ARTIFACT,
    CHECKPOINT,
    FILES,
    QUICK,
    SCRIPT,
    Finished,
    as_environment,
    call_script,
    finish_run,
    make_data,
    read_result,
    shards_of,
    smoke_tokens,
    start_script,
    torchrun,
)


def read_metrics(folder, kind) -> list[dict]:
    """The rows of a kind, in order."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def read_nll(path):
    return np.load(path)["nll"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- What a run leaves behind ------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(finished):
    folder, _, result = finished
    assert {path.name for path in folder.iterdir()} == FILES
    log = (folder / "log.txt").read_text()
    assert log.splitlines()[-1] == "RESULT " + json.dumps(result)
    source = SCRIPT.read_text()
    assert source in log and sha256(source.encode()) == result["code_sha256"]
    for said in (f"code_sha256:{result['code_sha256']}", "train_batch_tokens:1024", "torch:",
                 "step:1/6 train_loss:", "step_avg:", "layer_loop:enabled", "quantized val_loss:",
                 "final val_loss:", "phase train", "clock scoring"):
        assert said in log
    packed = (folder / "train_gpt_packed.py").read_bytes()
    assert len(packed) == result["code_bytes"] and sha256(packed) == result["packed_sha256"]
    assert finished.artifact.stat().st_size == result["model_bytes"]
    assert result["total_bytes"] == result["code_bytes"] + result["model_bytes"] <= result["cap_bytes"]
    assert result["cap_bytes"] == 16_000_000


def test_result_has_every_field(finished):
    _, _, result = finished
    assert set(result) >= {
        "val_loss", "val_bpb", "val_loss_quantized", "val_bpb_quantized", "val_loss_unquantized",
        "val_bpb_unquantized", "documents", "tokens", "bytes", "model_bytes", "code_bytes", "total_bytes",
        "seed", "code_sha256", "steps", "phases", "clocks", "hardware", "versions", "unadapted_tokens"}
    assert result["documents"] == 5 and result["steps"] == 6 and result["seed"] == 1337
    assert result["unadapted_tokens"] == 0
    assert list(result["phases"]) == [
        "imports", "join", "setup", "open training data", "warm-up", "train", "calibrate", "export",
        "hash training data", "open validation", "count bytes", "score unquantized", "open artifact",
        "score quantized", "count n-grams", "prepare adaptation", "adapt", "report"]
    assert result["clocks"]["scoring"]["budget"] == 0, "a CPU has no deadline"


def test_every_second_belongs_to_a_phase(tiny_data, tmp_path):
    """But for what Python takes to end, and for writing the result."""
    settings = dict(DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "run", VAL_LOSS_EVERY=3)
    began = time.perf_counter()
    assert call_script(SCRIPT, tmp_path, **QUICK, **settings).returncode == 0
    seconds = time.perf_counter() - began
    result = read_result(tmp_path / "run")
    assert "validate" in result["phases"]
    milliseconds = 0.0005 * (len(result["phases"]) + 1)  # to which each is rounded
    assert -milliseconds <= result["seconds"] - sum(result["phases"].values()) < 0.5
    assert 0 <= seconds - result["seconds"] < 3


def test_rows_tell_the_time_and_when_phases_end(finished):
    rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    last, first = rows[-1], rows[0]
    before_first = last["phases"]["imports"] + last["phases"]["join"]
    assert last["time"] - first["time"] == pytest.approx(last["seconds"] - before_first, abs=1)
    phases = read_metrics(finished.folder, "phase")
    assert {row["name"]: round(row["seconds"], 3) for row in phases} == {
        name: seconds for name, seconds in last["phases"].items() if name not in ("imports", "join")}
    for before, row in zip(phases, phases[1:]):
        assert row["time"] - before["time"] == pytest.approx(row["seconds"], abs=0.5), row["name"]


def test_a_result_names_its_data(finished, tiny_data):
    result = finished.result
    tokens = b"".join(np.array(tg.open_shard(path)).tobytes() for path in shards_of(tiny_data, "val"))
    assert result["val_sha256"] == sha256(tokens)
    tokenizer = (tiny_data / "tokenizers/fineweb_1024_bpe.model").read_bytes()
    assert result["tokenizer_sha256"] == sha256(tokenizer)
    assert result["model_sha256"] == sha256(finished.artifact.read_bytes())
    assert re.fullmatch("[0-9a-f]{64}", result["train_sha256"])


def test_metrics_are_complete(finished):
    folder, _, result = finished
    steps = read_metrics(folder, "step")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6] and all(row["loss"] > 0 for row in steps)
    looped = [row["looped"] for row in steps]
    assert looped == [False, False, False, True, True, True], "from step 3 of 6 on, .35 passed"
    last_line = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    last_row = json.loads(last_line)
    assert last_row == {"kind": "result", "time": last_row["time"], **result}


def test_anyone_can_recompute_the_score(finished):
    _, scores, result = finished
    file = np.load(scores)
    assert file["nll"].dtype == np.float32
    assert len(file["nll"]) == len(file["token_bytes"]) == result["tokens"]
    assert file["token_bytes"].sum() == result["bytes"]
    assert len(file["document_starts"]) == result["documents"]
    nats = file["nll"].astype(np.float64).sum()
    assert nats / result["tokens"] == pytest.approx(result["val_loss"], rel=1e-12)
    assert nats / np.log(2) / result["bytes"] == pytest.approx(result["val_bpb"], rel=1e-12)
    assert file["document_starts"].tolist() == [0, 300, 340, 510, 600]


def test_console_is_short_and_ends_with_the_result(run):
    outcome = run()
    lines = outcome.out.splitlines()
    assert outcome.status == 0 and outcome.err == "" and len(lines) < 60
    assert lines[-1].startswith("RESULT {")
    assert "\n" + "=" * 100 not in outcome.out, "the source goes to the file only"


def test_a_result_is_never_written_over(run, finished):
    before = {path: path.read_bytes() for path in finished.folder.iterdir()}
    for settings in ({}, dict(EVAL_ONLY_PATH=finished.artifact)):
        error = run(ARTIFACT_DIR=finished.folder, **settings).error
        assert "holds log.txt of another run" in error
    assert {path: path.read_bytes() for path in finished.folder.iterdir()} == before


def test_a_lost_scores_file_costs_no_result(run, monkeypatch, tmp_path):
    honest_write = tg.write_file

    def write_on_full_disk(path, data):
        if path.suffix == ".npz":
            raise tg.UserError(f"cannot write {path}: No space left on device")
        honest_write(path, data)

    monkeypatch.setattr(tg, "write_file", write_on_full_disk)
    outcome = run(**QUICK, SAVE_SCORES=tmp_path / "scores.npz")
    assert outcome.status == 2 and "No space left" in outcome.err and "RESULT {" in outcome.out
    assert (tmp_path / "run/result.json").exists()


# ---- Seeds and settings ------------------------------------------------------------------------------------


def test_one_seed_one_artifact(run, finished, tmp_path):
    again = run(ARTIFACT_DIR=tmp_path / "again", SAVE_SCORES=tmp_path / "again.npz")
    assert (tmp_path / "again" / ARTIFACT).read_bytes() == finished.artifact.read_bytes()
    assert np.array_equal(read_nll(tmp_path / "again.npz"), read_nll(finished.scores))
    other = run(ARTIFACT_DIR=tmp_path / "other", SEED=1)
    assert again.result["val_bpb"] == finished.result["val_bpb"] != other.result["val_bpb"]


@pytest.fixture(scope="module")
def finished_quickly(tiny_data, tmp_path_factory) -> Finished:
    """A run with the settings of QUICK."""
    return finish_run(tmp_path_factory.mktemp("quick"), tiny_data, **QUICK)


@pytest.mark.parametrize("name,value", dict(
    MATRIX_LR=0.01, EMA_DECAY=0.1, GRAD_CLIP_NORM=0.001, BETA2=0.5, TIED_EMBED_LR=0.003, SCALAR_LR=0.2,
    MUON_WD=3, MUON_MOMENTUM=0.5, WARMDOWN_FRAC=0.1, QK_GAIN_INIT=2, ENABLE_LOOPING_AT=1,
    SMALL_BATCH_FRAC=0.5).items())
def test_settings_of_training_reach_the_run(run, finished_quickly, name, value):
    outcome = run(**QUICK, TTT_ENABLED=0, **{name: value})
    assert outcome.result["val_bpb_quantized"] != finished_quickly.result["val_bpb_quantized"]


def test_settings_of_quantization_reach_the_run(run, finished_quickly):
    outcome = run(EVAL_ONLY_PATH=finished_quickly.checkpoint, **QUICK, GPTQ_CALIBRATION_BATCHES=2)
    assert outcome.result["val_bpb"] != finished_quickly.result["val_bpb"]


@pytest.mark.parametrize("name,value", dict(TTT_LORA_LR=0, TTT_CHUNK_SIZE=24, TTT_EVAL_SEQ_LEN=32).items())
def test_settings_of_adaptation_reach_the_run(run, finished_quickly, name, value):
    outcome = run(EVAL_ONLY_PATH=finished_quickly.artifact, **{**QUICK, name: value})
    assert outcome.result["val_bpb_quantized"] == finished_quickly.result["val_bpb_quantized"]
    assert outcome.result["val_bpb"] != finished_quickly.result["val_bpb"]


def test_without_test_time_training_the_plain_score_is_the_headline(run, finished):
    result = run(TTT_ENABLED=0, EVAL_ONLY_PATH=finished.artifact).result
    assert result["val_bpb"] == result["val_bpb_quantized"] == finished.result["val_bpb_quantized"]


# ---- Re-scoring --------------------------------------------------------------------------------------------


def validation_alone(folder, data) -> Path:
    """A DATA_DIR with the validation shards of another and no training shards."""
    return make_data(folder, [], [np.array(tg.open_shard(path)) for path in shards_of(data, "val")])


def copy_to(folder, *paths):
    for path in paths:
        (folder / path.name).write_bytes(path.read_bytes())


def test_the_artifact_alone_scores_the_same(run, finished, tiny_data, tmp_path):
    """Neither training shards nor the checkpoint are at hand."""
    copy_to(tmp_path, finished.artifact)
    data = validation_alone(tmp_path / "data", tiny_data)
    scores = tmp_path / "scores.npz"
    result = run(EVAL_ONLY_PATH=tmp_path / ARTIFACT, DATA_DIR=data, SAVE_SCORES=scores).result
    assert np.array_equal(read_nll(scores), read_nll(finished.scores))
    for name in ("val_bpb", "model_bytes"):
        assert result[name] == finished.result[name]
    assert "val_bpb_unquantized" not in result and "steps" not in result


def test_a_checkpoint_uses_the_artifact_made_from_it(run, finished, tmp_path):
    scores = tmp_path / "scores.npz"
    outcome = run(EVAL_ONLY_PATH=finished.checkpoint, SAVE_SCORES=scores)
    assert "was made from" in outcome.out and "calibrate" not in outcome.result["phases"]
    assert np.array_equal(read_nll(scores), read_nll(finished.scores))
    assert outcome.result["val_bpb_unquantized"] == finished.result["val_bpb_unquantized"]


def test_a_checkpoint_of_another_version_is_refused(run, finished, tmp_path):
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    checkpoint["settings"]["matrix_bits"] = 6
    torch.save(checkpoint, tmp_path / "old.pt")
    error = run(EVAL_ONLY_PATH=tmp_path / "old.pt").error
    assert "another version of this script, whose settings differ: matrix_bits" in error


def test_a_damaged_artifact_beside_a_checkpoint_is_made_again(run, finished, tmp_path):
    copy_to(tmp_path, finished.checkpoint)
    (tmp_path / ARTIFACT).write_bytes(finished.artifact.read_bytes()[:1000])
    outcome = run(EVAL_ONLY_PATH=tmp_path / CHECKPOINT)
    assert "calibrating again" in outcome.out and outcome.result["val_bpb"] == finished.result["val_bpb"]


def test_a_checkpoint_without_its_artifact_is_calibrated_again(run, finished, tmp_path):
    copy_to(tmp_path, finished.checkpoint)
    outcome = run(EVAL_ONLY_PATH=tmp_path / CHECKPOINT)
    assert "training shards are needed" in outcome.out
    assert outcome.result["val_bpb"] == finished.result["val_bpb"]
    assert (tmp_path / "run" / ARTIFACT).read_bytes() == finished.artifact.read_bytes()


def test_a_checkpoint_after_small_steps_is_calibrated_as_in_its_run(run, tiny_data, tmp_path):
    """On the same tokens, whenever steps had grown."""
    trained = finish_run(tmp_path / "trained", tiny_data, **QUICK, SMALL_BATCH_FRAC=0.5)
    copy_to(tmp_path, trained.checkpoint)
    outcome = run(EVAL_ONLY_PATH=tmp_path / CHECKPOINT, **QUICK, SMALL_BATCH_FRAC=0.5)
    assert "calibrating again" in outcome.out
    assert outcome.result["val_bpb"] == trained.result["val_bpb"]


def test_a_checkpoint_with_other_settings_is_calibrated_again(run, finished):
    outcome = run(EVAL_ONLY_PATH=finished.checkpoint, GPTQ_CALIBRATION_BATCHES=2)
    assert "calibrating again" in outcome.out and outcome.result["val_bpb"] != finished.result["val_bpb"]


def test_a_checkpoint_without_training_shards(run, finished, tmp_path):
    copy_to(tmp_path, finished.checkpoint)
    data = make_data(tmp_path / "data", [], [smoke_tokens("val")])
    outcome = run(EVAL_ONLY_PATH=tmp_path / CHECKPOINT, DATA_DIR=data)
    assert "training shards are needed" in outcome.out and "fineweb_train_*.bin" in outcome.error


@pytest.mark.parametrize("saved,mode", [(ARTIFACT, "artifact"), (CHECKPOINT, "checkpoint")])
def test_a_model_brings_its_settings(finished, tiny_data, tmp_path, saved, mode):
    """Without any of the run's variables the score is the same."""
    settings = dict(EVAL_ONLY_PATH=finished.folder / saved, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "run")
    assert tg.main(as_environment(settings)) == 0
    result = read_result(tmp_path / "run")
    assert result["val_bpb"] == finished.result["val_bpb"]
    assert result["seed"] == 1337 and result["mode"] == mode


def test_a_model_keeps_its_seed_and_says_what_is_changed(run, finished):
    assert "set SEED=1337" in run(EVAL_ONLY_PATH=finished.artifact, SEED=4).error
    changed = run(EVAL_ONLY_PATH=finished.artifact, TTT_CHUNK_SIZE=8)
    assert "settings other than those of its run, which were: ttt_chunk_size:16" in changed.out


def test_a_saved_setting_can_be_changed_to_what_the_default_would_not_allow(finished, tiny_data, tmp_path):
    """A window of 20 holds the chunks of 16 that were saved, though not the default's 24."""
    settings = dict(EVAL_ONLY_PATH=finished.artifact, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "run",
                    TTT_EVAL_SEQ_LEN=20)
    assert tg.Config().ttt_chunk_size == 24
    assert tg.main(as_environment(settings)) == 0


def test_a_checkpoint_without_a_step_is_refused(run, finished, tmp_path):
    """Training would go on from it as if from initial weights."""
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    torch.save({**checkpoint, "steps": 0}, tmp_path / "zero.pt")
    assert "before the first step" in run(EVAL_ONLY_PATH=tmp_path / "zero.pt").error


# ---- Caveats and clocks ------------------------------------------------------------------------------------


def test_a_result_says_what_speaks_against_it(run, finished, tmp_path):
    assert finished.result["mode"] == "train" and finished.result["caveats"] == [
        "unknown validation set", "not on 8 GPUs"]
    saved = dict(EVAL_ONLY_PATH=finished.artifact)
    for i, (settings, why) in enumerate((
            (saved, "not trained by this run"),
            ({**saved, "VAL_DOC_FRACTION": 0.4}, "not all documents"),
            ({**saved, "TTT_ENABLED": 0}, "targets have their plain score"),
            ({**saved, "EVAL_MAX_SECONDS": 0.01}, "targets have their plain score"),
            ({**QUICK, "VAL_LOSS_EVERY": 4}, "validation was read during training"))):
        outcome = run(ARTIFACT_DIR=tmp_path / str(i), **settings)
        _, said = outcome.out.rsplit("caveats: ")
        assert why in "; ".join(outcome.result["caveats"]) and why in said


def test_clocks_are_judged_by_the_challenge_and_not_by_the_settings(run, monkeypatch):
    monkeypatch.setattr(tg, "CLOCK_SECONDS", 0.01)
    outcome = run(**QUICK, MAX_WALLCLOCK_SECONDS=0, EVAL_MAX_SECONDS=0.02)
    caveats = "; ".join(outcome.result["caveats"])
    assert "training took" in caveats and "scoring took" in caveats


class NoTime:
    """A log of a run that took none, and of which nothing is to be said."""
    caveats = []

    def spent(self, clock):
        return 0.0


def test_rank_0_alone_packs_the_script(monkeypatch, tmp_path):
    monkeypatch.setattr(tg, "pack_script", lambda: b"packed")
    monkeypatch.setattr(tg.Ranks, "broadcast_object", lambda ranks, value: value)
    for rank, packed in ((0, b"packed"), (1, b"")):
        result = tg.Result()
        log = SimpleNamespace(folder=tmp_path / str(rank))
        log.folder.mkdir()
        tg.measure_code(tg.Run(tg.Config(), tg.Ranks(rank, 2), log, tg.Backend()), result)
        assert result.code_bytes == len(packed)
        assert [path.read_bytes() for path in log.folder.iterdir()] == [packed] * (rank == 0)


def test_what_is_packed_is_the_script_as_it_was_at_the_start(tmp_path):
    """Even if its file is edited while it trains."""
    script = tmp_path / "train_gpt.py"
    script.write_bytes(SCRIPT.read_bytes())
    spec = importlib.util.spec_from_file_location("edited_while_it_trains", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = module.script_source()
    script.write_text("raise SystemExit")
    assert module.script_source() == source and module.pack_script() == tg.pack_script()
    script.write_bytes(tg.pack_script())
    spec.loader.exec_module(module)
    module.open_run(module.Run(module.Config(), module.Ranks(), mock.MagicMock(), module.Backend()))
    script.write_text("raise SystemExit")
    assert module.pack_script() == tg.pack_script()


def test_too_many_bytes_are_a_caveat(monkeypatch):
    monkeypatch.setattr(tg, "CAP_BYTES", 100_000)
    run = tg.Run(tg.Config(), tg.Ranks(), NoTime(), tg.Backend())
    result = tg.Result(total_bytes=100_001, unadapted_tokens=0, tokens=9, mode="train")
    assert "100001 bytes of 100000" in tg.caveats(run, result)


def test_a_clean_record_run_has_no_caveat():
    """And it takes little to spoil it."""
    ranks = tg.Ranks(world_size=8, device="cuda:0")
    run = tg.Run(tg.Config(seed=7, run_id="x", save_scores="y"), ranks, NoTime(), tg.Backend())
    clean = tg.Result(total_bytes=16_000_000, unadapted_tokens=0, tokens=40_540_803, bytes=151_080_645,
                      bytes_at_cut=151_078_222)
    assert tg.caveats(run, clean) == []
    case_operations = dict(tokens=47_853_343, bytes=151_080_266, bytes_at_cut=151_074_499)
    assert tg.caveats(run, dataclasses.replace(clean, **case_operations)) == []
    own_tokenizer = dataclasses.replace(clean, tokens=43_000_000, documents=50_000, bytes_at_cut=None)
    assert tg.caveats(run, own_tokenizer) == []
    for change in (dict(documents=49_999), dict(bytes=151_074_498), dict(bytes=151_082_691)):
        assert tg.caveats(run, dataclasses.replace(own_tokenizer, **change)) == ["unknown validation set"]
    for change in (dict(bytes_at_cut=151_078_223), dict(bytes_at_cut=151_074_499), dict(bytes=151_086_414),
                   dict(bytes=151_078_221), dict(tokens=1000, bytes_at_cut=None),
                   dict(unadapted_tokens=1), dict(total_bytes=16_000_001)):
        assert len(tg.caveats(run, dataclasses.replace(clean, **change))) == 1


def test_the_bytes_at_the_challenge_s_cut(monkeypatch):
    """Of the cut that validation passes by less than a sequence; without one there is no such number."""
    val = tg.Validation(np.zeros(11), np.arange(10), np.array([0]), np.array([10]), 0)
    score = tg.Score(1.0, 10, 45)
    scored = tg.Scored(score, score, torch.zeros(10), 0)
    for cuts, expected in (({8: 0}, 28), ({11: 0, 4: 0}, 6), ({11: 0}, None), ({10 - 2048: 0}, None)):
        monkeypatch.setattr(tg, "FINEWEB_BYTES", cuts)
        result = tg.Result()
        result.add_scores(scored, val)
        assert result.bytes_at_cut == expected


def test_clocks_hold_what_the_rules_put_on_them(finished):
    on_clocks = {"training": ["train", "calibrate"],
                 "scoring": ["open artifact", "score quantized", "count n-grams", "adapt"]}
    seconds = finished.result["phases"]
    for clock, phases in on_clocks.items():
        expected = sum(seconds[phase] for phase in phases)
        assert finished.result["clocks"][clock]["seconds"] == pytest.approx(expected, abs=0.01)
    log = (finished.folder / "log.txt").read_text()
    table = re.findall(r"^phase (.+?) +[\d.]+ s  (\w+)$", log, flags=re.M)
    assert table == [(phase, clock) for clock, phases in on_clocks.items() for phase in phases]


def test_ranks_begin_a_clock_together_and_the_slowest_is_counted():
    """A rank whose own seconds are few waits first, and then counts the seconds of another rank."""
    events = []

    class FastRank(tg.Ranks):
        def barrier(self):
            events.append("barrier")

        def all_reduce_max(self, value):
            return max(value, 7.0)

    log = object.__new__(tg.RunLog)
    log.ranks = FastRank()
    log.phases = []
    log.files = {}
    with log.phase("adapt", "scoring"):
        events.append("work")
    assert events == ["barrier", "work"] and log.spent("scoring") == 7.0
    with log.phase("export"):
        events.append("work")
    assert events[2:] == ["work"] and log.phases[-1].seconds == 7.0 and log.spent("scoring") == 7.0


def test_nothing_is_trained_between_the_clock_and_the_checkpoint(run, monkeypatch, tmp_path):
    """What is saved and quantized is what training has returned."""
    models = []
    honest_train, honest_export = tg.warm_up_and_train, tg.export

    def weights(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def noting_train(*args):
        model, steps = honest_train(*args)
        models.append(weights(model))
        return model, steps

    def noting_export(run, model, *args):
        models.append(weights(model))
        return honest_export(run, model, *args)

    monkeypatch.setattr(tg, "warm_up_and_train", noting_train)
    monkeypatch.setattr(tg, "export", noting_export)
    assert run(**QUICK).status == 0
    models.append(torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["weights"])
    trained, exported, saved = models
    for name, weight in trained.items():
        assert torch.equal(weight, exported[name]) and torch.equal(weight, saved[name]), name


def test_steps_are_taken_in_training_and_warm_up_only(run, monkeypatch):
    logs = []
    phases_of_steps = []
    honest_init, honest_step = tg.RunLog.__init__, tg.Optimizers.step

    def noting_init(self, *args):
        logs.append(self)
        honest_init(self, *args)

    def noting_step(self, *args):
        phases_of_steps.append([phase.name for phase in logs[0].phases if not phase.seconds])
        return honest_step(self, *args)

    monkeypatch.setattr(tg.RunLog, "__init__", noting_init)
    monkeypatch.setattr(tg.Optimizers, "step", noting_step)
    assert run(**QUICK).status == 0
    assert phases_of_steps.count(["train"]) == 6
    assert all(phases in (["train"], ["warm-up"]) for phases in phases_of_steps)


def test_the_clock_stands_still_for_validation_only_after_training_is_done(run, monkeypatch):
    """What was sent to a GPU before validation belongs to the training clock: it is waited for first."""
    events = []
    honest_evaluate = tg.evaluate

    def noting_evaluate(*args):
        events.append("validate")
        return honest_evaluate(*args)

    monkeypatch.setattr(tg.Ranks, "synchronize", lambda self: events.append("wait"))
    monkeypatch.setattr(tg, "evaluate", noting_evaluate)
    run(**QUICK, VAL_LOSS_EVERY=3)
    before_validations = [before for before, event in zip(events, events[1:]) if event == "validate"]
    assert before_validations and set(before_validations) == {"wait"} and events[0] == "wait"


def test_the_training_clock_ends_a_run(run, monkeypatch, tmp_path):
    """On a clock by which a step takes .05 s: as many steps as fit, none beyond, rates that follow it."""
    steps = []  # the warm-up's, too
    honest_step = tg.Optimizers.step

    def noting_step(self, *args):
        steps.append(self)
        return honest_step(self, *args)

    def elapsed(phase):
        steps_before = phase.__dict__.setdefault("steps_before", len(steps))
        return 0.05 * (len(steps) - steps_before) if phase.name == "train" else 0.0

    monkeypatch.setattr(tg.Optimizers, "step", noting_step)
    monkeypatch.setattr(tg.Phase, "elapsed", elapsed)
    result = run(**QUICK, MAX_WALLCLOCK_SECONDS=3, GPTQ_RESERVE_SECONDS=1, ITERATIONS=100_000,
                 TRAIN_LOG_EVERY=1_000_000).result
    assert 38 <= result["steps"] <= 40 and result["phases"]["train"] <= 2
    assert result["clocks"]["training"]["budget"] == 3
    rates = [row["lr"] for row in read_metrics(tmp_path / "run", "step")]
    assert rates[0] == 1 and rates[-1] < 0.2 and rates == sorted(rates, reverse=True)


def test_a_scoring_clock_that_runs_out_is_said(run, finished):
    outcome = run(EVAL_MAX_SECONDS=0.01, EVAL_ONLY_PATH=finished.artifact)
    assert outcome.result["unadapted_tokens"] == outcome.result["tokens"]
    quantized, adapted = re.findall(r"^(?:quantized|adapted) (val_loss.+)$", outcome.out, flags=re.M)
    assert adapted == quantized and outcome.result["val_bpb"] < outcome.result["val_bpb_quantized"]
    assert "EVAL_MAX_SECONDS=0.01 passed" in outcome.out and "depended on time" in outcome.out


# ---- Order of events ---------------------------------------------------------------------------------------


def test_what_is_scored_is_what_was_read_back(run, monkeypatch):
    """An artifact that changes between writing and reading ends the run."""
    honest_write = tg.write_file

    def damaging_write(path, data):
        honest_write(path, data)
        if path.suffix == ".ptz":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(tg, "write_file", damaging_write)
    assert "damaged" in run(**QUICK).error


LISTENERS = []  # lists that get the path of every file that is opened, however: the interpreter itself tells


def tell_listeners(event, args):
    if event == "open":
        for paths in LISTENERS:
            paths.append(str(args[0]))


sys.addaudithook(tell_listeners)


@pytest.fixture
def opened():
    """The path of every file that is opened from now on."""
    paths = []
    LISTENERS.append(paths)
    yield paths
    LISTENERS.remove(paths)


def validation_comes_last(paths):
    validation = [i for i, path in enumerate(paths) if "fineweb_val" in path]
    written = max(i for i, path in enumerate(paths) if path.endswith(f"{ARTIFACT}.part"))
    return bool(validation) and min(validation) > written


def test_validation_is_opened_after_the_artifact_is_written(run, opened):
    assert run().status == 0 and validation_comes_last(opened)


@pytest.mark.parametrize("read", [io.open, os.open, np.fromfile, np.memmap, Path.read_bytes])
def test_any_way_to_open_validation_before_is_caught(run, opened, monkeypatch, tiny_data, read):
    honest_train = tg.warm_up_and_train
    shard = shards_of(tiny_data, "val")[0]
    options = {os.open: (os.O_RDONLY,), np.memmap: (np.uint8, "r")}.get(read, ())

    def peeking_train(*args):
        read(shard, *options)
        return honest_train(*args)

    monkeypatch.setattr(tg, "warm_up_and_train", peeking_train)
    assert run(**QUICK).status == 0 and not validation_comes_last(opened)


@pytest.fixture
def unreadable_validation(monkeypatch):
    """Validation shards that raise when they are opened."""
    honest_open = tg.open_shard

    def open_shard(path):
        if "fineweb_val" in str(path):
            raise RuntimeError("validation was opened")
        return honest_open(path)

    monkeypatch.setattr(tg, "open_shard", open_shard)


def test_a_run_trains_and_exports_without_validation(run, finished, unreadable_validation, tmp_path):
    with pytest.raises(RuntimeError, match="validation was opened"):
        run()
    assert (tmp_path / "run" / ARTIFACT).read_bytes() == finished.artifact.read_bytes()


def test_looking_at_validation_while_training_is_caught(run, unreadable_validation, tmp_path):
    """What VAL_LOSS_EVERY asks for, which is why a record leaves it at 0."""
    with pytest.raises(RuntimeError, match="validation was opened"):
        run(VAL_LOSS_EVERY=2)
    assert not (tmp_path / "run" / ARTIFACT).exists()


def test_validation_during_training_changes_nothing(run, finished, tmp_path):
    outcome = run(VAL_LOSS_EVERY=2)
    assert outcome.out.count("/6 val_loss:") == 3, "every second step, the last once"
    assert (tmp_path / "run" / ARTIFACT).read_bytes() == finished.artifact.read_bytes()


# ---- The packed script and torchrun ------------------------------------------------------------------------


def test_packed_script_is_the_script(finished, tiny_data, tmp_path):
    """Run from a read-only folder elsewhere: same model bytes, same scores, and it counts itself.

    Nothing there says that it is tested, as the modules that are loaded here would.
    """
    home = tmp_path / "home"
    home.mkdir()
    packed = home / "train_gpt.py"
    packed.write_bytes((finished.folder / "train_gpt_packed.py").read_bytes())
    home.chmod(0o555)
    folder = tmp_path / "run"
    scores = tmp_path / "scores.npz"
    done = call_script(packed, tmp_path, DATA_DIR=tiny_data, ARTIFACT_DIR=folder, SAVE_SCORES=scores,
                       TMPDIR=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / ARTIFACT).read_bytes() == finished.artifact.read_bytes()
    assert np.array_equal(read_nll(scores), read_nll(finished.scores))
    result = read_result(folder)
    for name in ("code_bytes", "packed_sha256"):
        assert result[name] == finished.result[name]
    assert packed.stat().st_size == result["code_bytes"]
    logged_source = (folder / "log.txt").read_text().split("=" * 100 + "\n")[1][:-1]
    assert sha256(logged_source.encode()) == result["code_sha256"], "the source in the log is what ran"


def test_packed_script_imports_anywhere(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    spec = importlib.util.spec_from_file_location("packed", finished.folder / "train_gpt_packed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Config is not tg.Config and module.Config().model_dim == 512
    lines = inspect.getsource(module.chunk_window)
    assert "def chunk_window" in lines, "its lines are there to be read, as Triton does"


def test_two_ranks_under_torchrun(finished, tiny_data, tmp_path):
    """They train as one does, and score an artifact as one does."""
    launcher = torchrun("--nproc_per_node=2")
    trained = tmp_path / "trained"
    done = call_script(SCRIPT, tmp_path, launcher, DATA_DIR=tiny_data, ARTIFACT_DIR=trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RESULT {") == 1
    result = read_result(trained)
    assert result["val_bpb"] == pytest.approx(finished.result["val_bpb"], abs=2e-3)
    assert result["hardware"].startswith("2 x")
    losses, losses_alone = ([row["loss"] for row in read_metrics(folder, "step")]
                            for folder in (trained, finished.folder))
    np.testing.assert_allclose(losses, losses_alone, rtol=1e-4)

    scored = tmp_path / "scored"
    scores = tmp_path / "scores.npz"
    done = call_script(SCRIPT, tmp_path, launcher, DATA_DIR=tiny_data, ARTIFACT_DIR=scored,
                       EVAL_ONLY_PATH=finished.artifact, SAVE_SCORES=scores)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(read_nll(scores), read_nll(finished.scores), atol=2e-5)
    assert read_result(scored)["val_bpb"] == pytest.approx(finished.result["val_bpb"], abs=2e-5)


def test_two_nodes(finished, tiny_data, tmp_path):
    """Two launchers, each with one process and a folder of its own, as on two machines: the same run.

    Settings are those of the first node, whatever the second one's environment says.
    """
    launcher = torchrun("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1")
    strange = dict(SEED=5, MATRIX_LR=0.5, TTT_LORA_LR=0.5, EVAL_MAX_SECONDS=0.01)
    nodes = []
    for rank in range(2):
        folder = tmp_path / f"{rank}"
        folder.mkdir()
        nodes.append(start_script(SCRIPT, folder, (*launcher, f"--node_rank={rank}"), DATA_DIR=tiny_data,
                                  ARTIFACT_DIR="run", **({} if rank == 0 else strange)))
    (out, err), (out_of_second, _) = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], err
    assert out.count("RESULT {") == 1
    assert "step:" not in out_of_second and not (tmp_path / "1/run").exists()
    result = read_result(tmp_path / "0/run")
    assert result["hardware"].startswith("2 x")
    assert result["val_bpb"] == pytest.approx(finished.result["val_bpb"], abs=2e-3)


def test_a_rank_that_dies_ends_the_run(tiny_data, tmp_path):
    """Killed while it trains; the other one, which waits for it in a collective, does not wait for long."""
    process = start_script(SCRIPT, tmp_path, torchrun("--nproc_per_node=2"), DATA_DIR=tiny_data,
                           ARTIFACT_DIR="run", ITERATIONS=100_000)
    assert any(line.startswith("step:3/") for line in process.stdout), process.communicate()[1]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"train_gpt.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and "SIGKILL" in err and not (tmp_path / "run/result.json").exists()


def test_a_mistake_under_torchrun_is_said_once(tiny_data, tmp_path):
    launcher = torchrun("--nproc_per_node=3")
    done = call_script(SCRIPT, tmp_path, launcher, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "run")
    assert done.returncode != 0 and "RESULT" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "TRAIN_BATCH_TOKENS=1024 cannot be shared by 3 ranks" in errors[0]
