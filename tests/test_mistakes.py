"""Mistakes of users, damaged and hostile files: one line that says what to do, status 2, nothing lost."""
import dataclasses
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import (
    ARTIFACT,
    CHECKPOINT,
    FILES,
    QUICK,
    ROOT,
    SCRIPT,
    TINY,
    as_environment,
    call_script,
    make_data,
    shards_of,
    smoke_tokens,
    tiny_config,
)

# ---- Mistakes: one line that names the variable or file, status 2, no RESULT -------------------------------


@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help_lists_every_setting_with_its_default_and_meaning(capfd, argument):
    assert tg.main({"MATRIX_LRR": "1"}, [argument]) == 0, "whatever else is wrong"
    lines = capfd.readouterr().out.splitlines()
    for field in dataclasses.fields(tg.Config):
        (line,) = (line for line in lines if line.split()[:1] == [field.name.upper()])
        shown = [field.name.upper(), *([str(field.default)] if field.default != "" else [])]
        assert line.split()[: len(shown)] == shown and len(line.split()) > len(shown), line


def test_help_goes_through_a_pipe():
    command = f"set -o pipefail; {sys.executable} {SCRIPT} --help"
    through = subprocess.run(["bash", "-c", f"{command} | cat"], capture_output=True, text=True)
    assert through.returncode == 0 and "TTT_BATCH_SIZE" in through.stdout
    closed = subprocess.run(["bash", "-c", f"{command} | head -c 1"], capture_output=True, text=True)
    assert closed.returncode == 0 and closed.stderr == ""


def test_any_other_argument_is_a_mistake(tmp_path):
    command = [sys.executable, str(SCRIPT), "--seed=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: '--seed=3': settings are environment variables; --help lists them\n"


def test_missing_data(run, tmp_path):
    assert "DATA_DIR=/nowhere" in run(DATA_DIR="/nowhere").error
    assert "datasets/fineweb10B_sp512" in run(VOCAB_SIZE=512).error
    train, val = [smoke_tokens("train")[:3000]], [smoke_tokens("val")[:500]]
    without_train = make_data(tmp_path / "val", [], val)
    assert "fineweb_train_*.bin" in run(DATA_DIR=without_train).error
    without_val = make_data(tmp_path / "train", train, [])
    assert "fineweb_val_*.bin" in run(DATA_DIR=without_val).error


def short_data(folder) -> Path:
    """A DATA_DIR of a little text."""
    return make_data(folder, [smoke_tokens("train")[:4000]], [smoke_tokens("val")[:1500]])


def with_header(shard, index, value):
    """The shard with another number in its header."""
    header = np.frombuffer(shard[: tg.HEADER_BYTES], dtype="<i4").copy()
    header[index] = value
    return header.tobytes() + shard[tg.HEADER_BYTES :]


MAGIC, VERSION, COUNT = range(3)  # what a header begins with


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("what,damage,says", [
    ("empty file", lambda b: b"", "not a token shard"),
    ("header only", lambda b: with_header(b[:1024], COUNT, 0), "empty"),
    ("short header", lambda b: b[:1000], "not a token shard"),
    ("truncated", lambda b: b[:-100], "truncated"),
    ("odd byte", lambda b: b[:-1], "truncated"),
    ("over-long", lambda b: b + b"\0\0", "over-long"),
    ("wrong magic", lambda b: with_header(b, MAGIC, 1), "not a token shard"),
    ("wrong version", lambda b: with_header(b, VERSION, 2), "not a token shard"),
    ("negative count", lambda b: with_header(b, COUNT, -5), "empty"),
    ("token id too large", lambda b: b[:3000] + b"\xff\xff" + b[3002:], "token 65535, but VOCAB_SIZE=1024"),
    ("no BOS", lambda b: b[:1024] + b"\x05\x00" * ((len(b) - 1024) // 2), "BOS (id 1)"),
    ("text file", lambda b: b"once upon a time " * 400, "not a token shard"),
])
def test_damaged_shards(run, tmp_path, split, what, damage, says):
    data = short_data(tmp_path / "data")
    (shard,) = shards_of(data, split)
    shard.write_bytes(damage(shard.read_bytes()))
    error = run(**{**QUICK, "ITERATIONS": 3}, DATA_DIR=data).error
    assert str(shard) in error and says in error


def test_unreadable_shard(run, tmp_path):
    data = short_data(tmp_path / "data")
    (shard,) = shards_of(data, "train")
    shard.unlink()
    shard.mkdir()
    assert str(shard) in run(DATA_DIR=data).error


def test_validation_that_begins_inside_a_document(run, tmp_path):
    data = make_data(tmp_path / "data", [smoke_tokens("train")[:4000]], [smoke_tokens("val")[5:1500]])
    assert "does not begin with BOS (id 1)" in run(DATA_DIR=data, ITERATIONS=2).error


def test_validation_shards_have_no_gaps_and_no_strangers(run, tmp_path):
    tokens = smoke_tokens("val")[:500]
    data = make_data(tmp_path / "data", [smoke_tokens("train")[:4000]], [tokens, tokens, tokens])
    folder = data / "datasets/fineweb10B_sp1024"
    stranger = folder / "fineweb_val_000001_copy.bin"
    (folder / "fineweb_val_000001.bin").rename(stranger)
    assert "not numbered from 000000 without a gap" in run(DATA_DIR=data).error
    stranger.unlink()
    assert "not numbered" in run(DATA_DIR=data).error


@pytest.mark.parametrize("damage,says", [
    (lambda b: b"", "not a SentencePiece model"),
    (lambda b: b[:5000], "not a SentencePiece model"),
    (lambda b: b"garbage" * 1000, "not a SentencePiece model"),
    (lambda b: (ROOT / "tests/golden/tokenizer_8192.model").read_bytes(), "has 8192 pieces"),
])
def test_wrong_or_damaged_tokenizer(run, tmp_path, damage, says):
    data = short_data(tmp_path / "data")
    path = data / "tokenizers/fineweb_1024_bpe.model"
    path.write_bytes(damage(path.read_bytes()))
    error = run(DATA_DIR=data).error
    assert str(path) in error and says in error
    path.unlink()
    assert str(path) in run(DATA_DIR=data).error


def with_flipped_bit(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize("name,damage", [
    (ARTIFACT, lambda b: b[:-7]), (ARTIFACT, lambda b: b[:99] + b"x" + b[100:]),
    (CHECKPOINT, lambda b: b[:-999]), (CHECKPOINT, lambda b: b"hello"),
    (CHECKPOINT, lambda b: with_flipped_bit(b, len(b) // 2))])
def test_damaged_artifact_and_checkpoint(run, finished, tmp_path, name, damage):
    path = tmp_path / name
    path.write_bytes(damage((finished.folder / name).read_bytes()))
    assert str(path) in run(EVAL_ONLY_PATH=path).error


def test_missing_and_foreign_models(run, finished, tmp_path):
    assert "/nowhere.pt" in run(EVAL_ONLY_PATH="/nowhere.pt").error
    error = run(EVAL_ONLY_PATH=finished.artifact, NUM_LOOPS=1, LOGIT_SOFTCAP=20).error
    assert "NUM_LOOPS=2" in error and "LOGIT_SOFTCAP=30.0" in error and "NUM_LAYERS" not in error
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": {}, "steps": 1, "weights": {"embed": torch.zeros(2)}}, foreign)
    assert "foreign.pt" in run(EVAL_ONLY_PATH=foreign).error


def test_unwritable_places(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert f"ARTIFACT_DIR={file / 'x'}" in run(ARTIFACT_DIR=file / "x").error
    assert "SAVE_SCORES=" in run(SAVE_SCORES=tmp_path / "missing" / "scores.npz").error


def test_too_little_room_is_noticed_before_training(run, monkeypatch):
    class Usage:
        free = 10  # bytes

    monkeypatch.setattr(tg.shutil, "disk_usage", lambda path: Usage)
    outcome = run()
    assert "ARTIFACT_DIR" in outcome.error and "MiB" in outcome.error and "train_loss" not in outcome.out


def test_missing_tool_is_said_before_training(run, monkeypatch):
    for name in ("brotli", "sentencepiece", "python_minifier"):
        tg.pack_script.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            outcome = run()
        assert name in outcome.error and "requirements.txt" in outcome.error
        assert "train_loss" not in outcome.out


def test_divergence_is_said(run, tmp_path):
    assert "training diverged" in run(SCALAR_LR=1e30, TIED_EMBED_LR=1e30, TRAIN_LOG_EVERY=1).error
    assert "TTT_LORA_LR" in run(**QUICK, TTT_LORA_LR=1e30, ARTIFACT_DIR=tmp_path / "other").error


def test_odd_data_trains(run, tmp_path):
    """Documents of one token, one longer than everything, and a training set smaller than one step."""
    text = smoke_tokens("train")
    train = np.concatenate([text[:700], [1, 1, 1], text[1:300]])
    long_document = np.concatenate([[1], np.tile(smoke_tokens("val")[1:200], 4), [1]])
    outcome = run(DATA_DIR=make_data(tmp_path / "data", [train], [long_document]), ITERATIONS=3)
    assert outcome.status == 0 and outcome.result["documents"] == 2
    assert outcome.result["tokens"] == len(long_document) - 1


# ---- Writing files: all or nothing -------------------------------------------------------------------------


def test_write_file_is_all_or_nothing(tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x"
    tg.write_file(path, b"one")
    tg.write_file(path, b"two")
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(tg.UserError, match=f"cannot write {path}: No space left"):
        tg.write_file(path, b"three")
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(tg.UserError, match="it is not a file"):
            tg.write_file(tmp_path / name, b"x")
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    tg.write_file(link, b"x")
    assert link.is_symlink() and target.read_bytes() == b"x"


def run_code(code, data, folder, **settings) -> subprocess.CompletedProcess:
    """Run Python code that runs the script, in a process of its own."""
    places = dict(DATA_DIR=data, ARTIFACT_DIR=folder)
    environment = {**os.environ, **as_environment({**TINY, "OMP_NUM_THREADS": 1, **settings, **places})}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


FULL_DISK = """
import resource, signal, sys
import train_gpt
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(train_gpt.main())
"""


@pytest.mark.parametrize("limit,victim", [(60_000, "log.txt"), (100_000, "log.txt"), (300_000, CHECKPOINT)])
def test_full_disk(tiny_data, tmp_path, limit, victim):
    """A limit on the size of files makes a write fail, as a full disk does. Nothing is left half-written."""
    folder = tmp_path / "run"
    done = run_code(FULL_DISK.format(limit=limit), tiny_data, folder)
    assert done.returncode == 2 and "RESULT" not in done.stdout
    assert done.stderr.startswith(f"error: cannot write {folder / victim}: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert left <= FILES - {"result.json"} and not any(name.endswith(".part") for name in left)
    if CHECKPOINT in left:
        torch.load(folder / CHECKPOINT, weights_only=True)


KILLED = """
import os, signal, sys
import train_gpt
replace = os.replace

def dying_replace(source, destination):
    if str(destination) == {victim!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, destination)

os.replace = dying_replace
sys.exit(train_gpt.main())
"""


@pytest.mark.parametrize("victim", [CHECKPOINT, ARTIFACT, "result.json"])
def test_a_run_killed_while_writing(tiny_data, tmp_path, victim):
    """SIGKILL between writing and renaming: there is no such file, rather than half of one."""
    path = tmp_path / victim
    done = run_code(KILLED.format(victim=str(path)), tiny_data, tmp_path, **QUICK)
    assert done.returncode == -signal.SIGKILL and not path.exists()
    again = call_script(SCRIPT, tmp_path, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path)
    assert "holds log.txt of another run" in again.stderr


# ---- Folders: each belongs to one run ----------------------------------------------------------------------


@pytest.mark.parametrize("name", tg.RUN_FILES)
def test_a_named_folder_with_any_file_of_a_run_is_refused(run, tmp_path, name):
    """Finished or not, trained or scored again: nothing in it is touched."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_bytes(b"of another run")
    assert f"holds {name} of another run" in run(**QUICK).error
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_bytes() == b"of another run"


def test_a_folder_with_other_files_will_do(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert run(**QUICK).status == 0 and (folder / "notes.txt").read_text() == "mine"


def test_a_score_in_the_folder_of_a_dead_run_is_refused(run, finished, tmp_path):
    """Its log used to be lost."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("step:1/6")
    (folder / CHECKPOINT).write_bytes(finished.checkpoint.read_bytes())
    assert "of another run" in run(EVAL_ONLY_PATH=folder / CHECKPOINT).error
    assert (folder / "log.txt").read_text() == "step:1/6"


def claim(cfg):
    """The log of a run that has just begun, or what it says instead."""
    try:
        return tg.RunLog(cfg, tg.Ranks(), tg.time.perf_counter())
    except tg.UserError as error:
        return str(error)


def test_of_runs_that_begin_at_once_one_gets_the_folder(tmp_path):
    for attempt in range(20):
        cfg = tg.Config(artifact_dir=str(tmp_path / str(attempt)))
        with ThreadPoolExecutor(4) as pool:
            logs = list(pool.map(claim, [cfg] * 4))
        assert sum(isinstance(log, tg.RunLog) for log in logs) == 1, logs


def test_default_names_are_never_shared(tmp_path, monkeypatch):
    """Of four runs in one second; a name that the user gave is refused when it is taken."""
    noon = types.SimpleNamespace(now=lambda: datetime.datetime(2026, 1, 1, 12))
    monkeypatch.setattr(tg, "datetime", types.SimpleNamespace(datetime=noon))
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        logs = list(pool.map(claim, [tg.Config()] * 4))
    names = sorted(log.run_id for log in logs)
    first = "20260101-120000-seed1337"
    assert names == [first, f"{first}-2", f"{first}-3", f"{first}-4"]
    assert sorted(path.name for path in Path("runs").iterdir()) == names
    assert "of another run" in claim(tg.Config(run_id=first))


def test_a_mistake_leaves_no_folder_but_the_user_s(run, tmp_path):
    """What is wrong before a run begins leaves its folder to the next."""
    damaged = short_data(tmp_path / "data")
    shards_of(damaged, "train")[0].write_bytes(b"")  # which is found once training data are opened
    mistakes = (dict(VOCAB_SIZE=512), dict(DATA_DIR="/nowhere"), dict(SAVE_SCORES="/nowhere/s.npz"),
                dict(DATA_DIR=damaged))
    folder = tmp_path / "run"
    for settings in mistakes:
        assert run(**settings).error and not folder.exists()
    folder.mkdir()
    for settings in mistakes:
        assert run(**settings).error and list(folder.iterdir()) == []
    assert run(**QUICK).status == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_a_mistake(run, tmp_path, monkeypatch, error):
    """In setup it leaves no folder, later it names the phase: that under way, not one inside it."""
    def raise_error(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tg, "GPT", raise_error)
        assert "out of memory in phase setup: raise TRAIN_BUFFERS" in run(**QUICK).error
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(tg.Trainer, "report_validation", lambda self, score: None)
    monkeypatch.setattr(tg.Ema, "update", raise_error)
    outcome = run(**QUICK, VAL_LOSS_EVERY=1)
    assert "out of memory in phase train" in outcome.err and (tmp_path / "run/log.txt").exists()


def test_any_other_error_is_no_mistake(run, monkeypatch):
    monkeypatch.setattr(tg, "calibrate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(**QUICK)


def test_a_folder_for_runs_that_leads_nowhere(tmp_path, monkeypatch):
    """As a link to a disk that is not mounted: it used to be tried for ever."""
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("/nowhere/at/all")
    assert "cannot be used" in claim(tg.Config())


# ---- Launchers and consoles --------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [
    dict(RANK="0"), dict(WORLD_SIZE="2"), dict(LOCAL_RANK="0"), dict(RANK="0", WORLD_SIZE="1"),
    dict(RANK="", WORLD_SIZE="", LOCAL_RANK=""), dict(RANK="a", WORLD_SIZE="2", LOCAL_RANK="0"),
    dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0"), dict(RANK="-1", WORLD_SIZE="2", LOCAL_RANK="0"),
    dict(RANK="0", WORLD_SIZE="0", LOCAL_RANK="0"), dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="-1"),
    dict(RANK="0.5", WORLD_SIZE="2", LOCAL_RANK="0")])
def test_variables_of_no_launcher(run, monkeypatch, variables):
    monkeypatch.setattr(tg.time, "sleep", lambda seconds: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "start with torchrun, or unset them" in run(**QUICK).error


def test_a_port_that_is_taken(monkeypatch, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **places).items():
            monkeypatch.setenv(name, value)
        assert "MASTER_PORT" in run(**QUICK).error


def test_without_a_place_to_meet(monkeypatch, run):
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    assert "MASTER_ADDR" in run(**QUICK).error


@pytest.mark.parametrize("console", ["full", "gone", "closed"])
def test_a_lost_console_costs_only_the_console(tiny_data, tmp_path, console):
    redirected = {"full": "> /dev/full 2> /dev/full", "gone": "| head -c 1", "closed": ">&- 2>&-"}[console]
    environment = {**os.environ, **as_environment({**TINY, **QUICK, "DATA_DIR": tiny_data})}
    environment |= {"ARTIFACT_DIR": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
    command = f"set -o pipefail; {sys.executable} {SCRIPT} {redirected}"
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 0
    assert (tmp_path / "run/log.txt").read_text().splitlines()[-1].startswith("RESULT {")


def test_logs_are_utf_8_whatever_the_locale(tiny_data, tmp_path):
    folder = tmp_path / "l\u00e4ufe"
    locale = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    done = call_script(SCRIPT, tmp_path, **QUICK, **locale, DATA_DIR=tiny_data, ARTIFACT_DIR=folder)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("RESULT {"), done.stderr
    assert f"artifact_dir:{folder}" in (folder / "log.txt").read_text(encoding="utf-8")


def test_the_packed_script_needs_no_folder_for_temporary_files(finished, tiny_data, tmp_path):
    """So that several users can run it, and whatever somebody has left there."""
    packed = tmp_path / "train_gpt.py"
    packed.write_bytes((finished.folder / "train_gpt_packed.py").read_bytes())
    done = call_script(packed, tmp_path, **QUICK, DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "run",
                       TMPDIR="/nowhere", HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"train_gpt.py", "run"}


# ---- Defaults of a CPU -------------------------------------------------------------------------------------


def test_a_cpu_has_no_deadline_and_one_thread_unless_told(run, finished, tmp_path):
    saved = dict(EVAL_ONLY_PATH=finished.artifact)
    try:
        torch.set_num_threads(2)
        told = run(ARTIFACT_DIR=tmp_path / "told", **saved, EVAL_MAX_SECONDS=500, OMP_NUM_THREADS=2)
        assert told.result["clocks"]["scoring"]["budget"] == 500 and torch.get_num_threads() == 2
        for i, empty in enumerate(({}, dict(EVAL_MAX_SECONDS="", OMP_NUM_THREADS=""))):
            torch.set_num_threads(2)
            outcome = run(ARTIFACT_DIR=tmp_path / str(i), **saved, **empty)
            assert outcome.result["clocks"]["scoring"]["budget"] == 0 and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


# ---- Hostile files -----------------------------------------------------------------------------------------


def artifact_of(streams: bytes, words: bytes = b"") -> bytes:
    """An artifact with one stream that stands for these bytes, and with a checksum that is right."""
    packed = brotli.compress(streams)
    body = len(packed).to_bytes(4, "little") + packed + bytes(4) + words
    return tg.ARTIFACT_MAGIC + tg.digest_of(body) + body


def streams_of(header: dict, content: bytes = b"") -> bytes:
    """What an artifact's streams stand for."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(4, "little") + text + content


def one_matrix(rows: int, columns: int) -> bytes:
    """An artifact with a matrix of this size, all zeros."""
    sizes = dict(rows=rows, columns=columns, row_width=rows, column_width=columns)
    tensors = [[f"0.q.{kind}", "int8", [size]] for kind, size in sizes.items()]
    header = {"settings": tiny_config().to_save(), "tensors": tensors}
    return artifact_of(streams_of(header, bytes(2 * (rows + columns))))


def with_setting(name: str, value) -> bytes:
    """An artifact without tensors, of a model with this setting."""
    return tg.pack_artifact({"settings": {**tiny_config().to_save(), name: value}}, {})


@pytest.mark.parametrize("blob,says", [
    (artifact_of(bytes(400_000_000)), "too long"), (artifact_of(b""), "damaged"),
    (artifact_of(b"\xff" * 8), "damaged"), (one_matrix(20_000, 20_000), "too large"),
    (artifact_of(b"\xff\xff\xff\x7f" + b"[" * 100_000), "damaged"),
    (artifact_of(streams_of({"a": "[" * 100_000})), "damaged"),
    (tg.ARTIFACT_MAGIC + tg.digest_of(b"\xff" * 9) + b"\xff" * 9, "decoder failed"),
    (with_setting("model_dim", 10**9), "parameters, too many"),
    (with_setting("model_dim", 10**400), "not a whole number"),
    (with_setting("num_layers", 999), "embed.rows"), (with_setting("mlp_mult", 1e300), "out of range"),
    (with_setting("mlp_mult", float("nan")), "not a number"),
    (with_setting("ttt_eval_seq_len", 10**15), "out of range"),
    (with_setting("vocab_size", "1\n2"), "not a whole number"),
    (with_setting("model_dim", [[1]]), "not a whole number"),
    (with_setting("surprise\x1b[2J\n", 1), "whose settings differ: surprise")], ids=range(16))
def test_hostile_artifacts_end_in_one_line(run, tmp_path, blob, says):
    """Some kilobytes that stand for gigabytes, or settings that would fill the memory."""
    path = tmp_path / ARTIFACT
    path.write_bytes(blob)
    settings = {name: None for name in TINY}
    error = run(EVAL_ONLY_PATH=path, **settings).error
    assert error.isprintable() and says in error


def test_damage_under_a_right_checksum_ends_in_one_line(finished, tmp_path):
    """Bytes of the artifact changed at random: what cannot be read is refused, and by no other exception."""
    blob = finished.artifact.read_bytes()
    start = len(tg.ARTIFACT_MAGIC) + tg.DIGEST_BYTES
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        body = bytearray(blob[start:])
        body[rng.integers(min(len(body), 3000))] ^= 1 << rng.integers(8)
        try:
            tg.unpack_artifact(tg.ARTIFACT_MAGIC + tg.digest_of(bytes(body)) + bytes(body), tmp_path)
        except tg.UserError:
            refused += 1
    assert refused > 30


def test_a_compressed_checkpoint_is_refused(run, finished, tmp_path):
    """It may stand for any number of bytes."""
    with zipfile.ZipFile(finished.checkpoint) as honest, \
            zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in honest.namelist():
            bomb.writestr(name, honest.read(name))
        bomb.writestr("archive/zeros", bytes(10_000_000))
    error = run(EVAL_ONLY_PATH=tmp_path / "x.pt").error
    assert "x.pt" in error and "compressed" in error


def test_names_cannot_write_on_the_console(run, tmp_path):
    """Line breaks and control characters of paths and values are escaped."""
    for settings in (dict(DATA_DIR="a\nb\x1b[2J"), dict(EVAL_ONLY_PATH="a\nerror: b"), dict(ATTENTION="x\ry"),
                     dict(PRESET="\x07"), dict(TTT_SITES="qkv\n")):
        assert run(**settings).error.isprintable()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_what_is_slow_to_import_is_imported_early_on_a_gpu(monkeypatch, on_gpu):
    """And stops nothing if it cannot be; here a mistake ends the run before anything needs it."""
    imported, pools = [], []

    def fail(name, *remedy):
        imported.append(name)
        raise tg.UserError("damaged")

    class Pool(ThreadPoolExecutor):
        def __init__(self, *args):
            super().__init__(*args)
            pools.append(self)

    ranks = tg.Ranks()
    ranks.on_gpu = on_gpu
    monkeypatch.setattr(tg.Ranks, "join", lambda: ranks)
    monkeypatch.setattr(tg, "lazy_import", fail)
    monkeypatch.setattr(tg, "ThreadPoolExecutor", Pool)
    assert tg.main({"SEED": "x"}) == 2
    for pool in pools:
        pool.shutdown()
    assert imported == on_gpu * ["torch._dynamo"]


def test_a_buffer_of_half_the_size_has_room_for_a_span():
    settings = dict(TRAIN_BATCH_TOKENS=1024, TRAIN_SEQ_LEN=128)
    assert tg.split_step(tiny_config(**settings), 1) == (8, 128)
    with pytest.raises(tg.UserError, match="at least 256, by TRAIN_SEQ_LEN=128 and SMALL_BATCH_FRAC=0.5"):
        tg.split_step(tiny_config(**settings, SMALL_BATCH_FRAC=0.5), 1)


def test_loops_that_never_begin():
    assert not tg.Config(enable_looping_at=1.0).loops_at(1.0) and not tg.Config(num_loops=0).loops_at(1.0)
    assert tg.Config(enable_looping_at=0.3).loops_at(0.3)
