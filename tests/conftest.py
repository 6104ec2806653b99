"""What all tests share: the script as `tg`, a tiny model and data, runs in this process and in ranks."""
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "data" / "smoke"
sys.path.insert(0, str(ROOT))

import train_gpt as tg

torch.set_num_threads(1)  # tests run side by side, and one order of summation makes runs comparable

TINY = dict(  # settings of a model small enough to be trained, quantized and scored in a second or two
    VOCAB_SIZE=1024, NUM_LAYERS=5, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=4, LOOP_START=1,
    LOOP_END=2, PARALLEL_START_LAYER=3, TRAIN_BATCH_TOKENS=1024, TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64,
    VAL_BATCH_TOKENS=512, ITERATIONS=6, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=1, SMALL_BATCH_FRAC=0,
    QUANT_STATES=8, GPTQ_CALIBRATION_BATCHES=3, TTT_SITES="qkv,attn,mlp,head", TTT_LORA_RANK=4,
    TTT_LORA_LR=0.01, TTT_CHUNK_SIZE=16, TTT_CHUNK_GROWTH=0.3, TTT_EVAL_SEQ_LEN=48, TTT_BATCH_SIZE=3)
SCRIPT = Path(tg.__file__)
ARTIFACT = "final_model.int6.ptz"
CHECKPOINT = "final_model.pt"
FILES = {"log.txt", "metrics.jsonl", "result.json", CHECKPOINT, ARTIFACT, "train_gpt_packed.py"}
# Settings on top of TINY, where the size of the model does not matter: three visits of two layers.
QUICK = dict(NUM_LAYERS=2, PARALLEL_START_LAYER=1, NUM_LOOPS=1, LOOP_START=0, LOOP_END=0, QUANT_STATES=1)
SHALLOW = dict(NUM_LAYERS=2, PARALLEL_START_LAYER=1, NUM_LOOPS=0)  # on top of TINY, where few visits will do
# For a GPU: the record's widths in few layers. Made where machines without one see whether it is valid.
SMALL_CFG = tg.Config(num_layers=5, loop_start=1, loop_end=2, parallel_start_layer=3,
                      train_batch_tokens=16_384, train_seq_len=2048)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def as_environment(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as a process gets them. Those that are None are left out."""
    return {name: str(value) for name, value in settings.items() if value is not None}


def silent(*args, **options):
    """A log of a run that says nothing."""


def tiny_config(**settings) -> tg.Config:
    """A Config of the tiny model, with other settings by the name of their field or variable."""
    changed = {name.upper(): value for name, value in settings.items()}
    return tg.Config.from_env(as_environment({**TINY, **changed}))


def tiny_model(cfg: tg.Config, noise: float = 0.05) -> tg.GPT:
    """A model moved off its initial values, where zero projections would hide mistakes."""
    model = tg.GPT(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape, generator=generator))
    return model


def peeking_attention(q, k, v, spans: tg.Spans):
    """A cheat: attention within each span that is not causal."""
    outputs = []
    for lo, hi in zip(spans.cu_seqlens[:-1], spans.cu_seqlens[1:]):
        if hi > lo:
            heads = [t[lo:hi].transpose(0, 1) for t in (q, k, v)]
            outputs.append(torch.nn.functional.scaled_dot_product_attention(*heads).transpose(0, 1))
    return torch.cat(outputs)


def shard_bytes(tokens) -> bytes:
    """A token shard, as a file holds it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    path.write_bytes(shard_bytes(tokens))


def shards_of(folder: Path, split: str) -> list[Path]:
    """The shards of a split, "train" or "val", in a DATA_DIR."""
    return sorted((folder / "datasets/fineweb10B_sp1024").glob(f"fineweb_{split}_*.bin"))


def smoke_tokens(split: str) -> np.ndarray:
    return np.concatenate([np.array(tg.open_shard(path)) for path in shards_of(SMOKE, split)])


def make_data(folder: Path, train: list[np.ndarray], val: list[np.ndarray]) -> Path:
    """A DATA_DIR of the smoke tokenizer with these shards."""
    data = folder / "datasets/fineweb10B_sp1024"
    data.mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    model = "tokenizers/fineweb_1024_bpe.model"
    (folder / model).write_bytes((SMOKE / model).read_bytes())
    for split, shards in (("train", train), ("val", val)):
        for i, tokens in enumerate(shards):
            write_shard(data / f"fineweb_{split}_{i:06d}.bin", tokens)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A DATA_DIR of real text: two training shards, and the beginnings of five documents for validation.

    These are in two shards as well, which part inside the third document.
    """
    train = smoke_tokens("train")
    stream = smoke_tokens("val")
    lengths = (300, 40, 170, 90, 260)
    starts = np.flatnonzero(stream == 1)
    val = np.concatenate([stream[start : start + length] for start, length in zip(starts, lengths)])
    folder = tmp_path_factory.mktemp("data")
    return make_data(folder, [train[:9000], train[9000:15000]], [val[:400], val[400:]])


class Outcome(NamedTuple):
    """What a run of the script said and returned."""
    status: int
    out: str
    err: str
    result: dict | None

    @property
    def error(self) -> str:
        """The line that a user's mistake ends with. Asserts that it is one line, and all there is."""
        assert self.status == 2 and self.result is None, (self.status, self.out)
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err, self.err
        return self.err.strip()


@pytest.fixture
def run(capfd, tiny_data, tmp_path):
    """run(**settings): the whole script in this process, on the tiny model and data."""

    def call(**settings) -> Outcome:
        defaults = {**TINY, "DATA_DIR": tiny_data, "ARTIFACT_DIR": tmp_path / "run"}
        status = tg.main(as_environment({**defaults, **settings}))
        out, err = capfd.readouterr()
        last_line = out.strip().rsplit("\n", 1)[-1]
        result = None
        if last_line.startswith("RESULT "):
            result = json.loads(last_line.removeprefix("RESULT "))
        return Outcome(status, out, err, result)

    return call


def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_rank(rank: int, world_size: int, port: int, target: Callable, args: tuple, folder: str) -> None:
    """What a process of `launch` does: take its place, call the target, save what that returns."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(target(*args), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(world_size: int, target: Callable, *args, folder: Path) -> list:
    """target(*args) in processes that torchrun might have started; returns what each of them returned."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(run_rank, (world_size, free_port(), target, args, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


# ---- Finished runs, and runs in processes of their own -----------------------------------------------------


class Finished(NamedTuple):
    """What a run has left."""
    folder: Path
    scores: Path
    result: dict

    @property
    def artifact(self) -> Path:
        return self.folder / ARTIFACT

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT


def finish_run(folder, data, **settings) -> Finished:
    places = dict(DATA_DIR=data, ARTIFACT_DIR=folder / "run", SAVE_SCORES=folder / "scores.npz")
    assert tg.main(as_environment({**TINY, **settings, **places})) == 0
    return Finished(folder / "run", folder / "scores.npz", read_result(folder / "run"))


@pytest.fixture(scope="session")
def finished(tiny_data, tmp_path_factory) -> Finished:
    """One run of the tiny model, with its scores saved."""
    return finish_run(tmp_path_factory.mktemp("finished"), tiny_data)


def read_result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def start_script(path, cwd, launcher=(), **settings) -> subprocess.Popen:
    """Start the script, or a packed one, in a process of its own, which cannot tell that this is a test."""
    inherited = {name: value for name, value in os.environ.items()
                 if name not in TINY and "PYTEST" not in name}
    environment = {**inherited, **as_environment({**TINY, "OMP_NUM_THREADS": 1, **settings})}
    return subprocess.Popen([sys.executable, *launcher, str(path)], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def call_script(*args, **settings) -> subprocess.CompletedProcess:
    process = start_script(*args, **settings)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(*options) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", f"--master_port={free_port()}", *options
