"""Shared by all tests: the script as module `tg`, a tiny model, a tiny DATA_DIR, in-process runs and launches of ranks."""
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "data" / "smoke"
sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402

torch.set_num_threads(1)  # tests run side by side, and one order of summation makes runs comparable

TINY = dict(  # environment of a model small enough to train, quantize and score in a second or two
    VOCAB_SIZE=1024, NUM_LAYERS=5, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=4, LOOP_START=1, LOOP_END=2,
    PARALLEL_START_LAYER=3, TRAIN_BATCH_TOKENS=1024, TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64, VAL_BATCH_TOKENS=512, ITERATIONS=6,
    MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=1, QUANT_STATES=8, GPTQ_CALIBRATION_BATCHES=3, TTT_SITES="qkv,attn,mlp,head",
    TTT_LORA_RANK=4, TTT_LORA_LR=0.01, TTT_CHUNK_SIZE=16, TTT_CHUNK_GROWTH=0.3, TTT_EVAL_SEQ_LEN=48, TTT_BATCH_SIZE=3)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped without one")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def tiny_config(**settings) -> tg.Config:
    """A Config of the tiny model; settings by field or variable name."""
    return tg.Config.from_env({k: str(v) for k, v in {**TINY, **{k.upper(): v for k, v in settings.items()}}.items()})


def tiny_model(cfg: tg.Config, noise: float = 0.05, **kwargs) -> tg.GPT:
    """A model moved off its initial values, where zero projections would hide mistakes."""
    model = tg.GPT(cfg, **kwargs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape, generator=generator))
    return model


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def smoke_tokens(split: str) -> np.ndarray:
    paths = sorted((SMOKE / "datasets/fineweb10B_sp1024").glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.array(tg.open_shard(path)) for path in paths])


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
    """A DATA_DIR of real text: two training shards; beginnings of five documents in two validation shards, cut inside one."""
    train, val = smoke_tokens("train"), smoke_tokens("val")
    starts = np.flatnonzero(val == 1)
    val = np.concatenate([val[start : start + n] for start, n in zip(starts, (300, 40, 170, 90, 260))])
    return make_data(tmp_path_factory.mktemp("data"), [train[:9000], train[9000:15000]], [val[:400], val[400:]])


class Outcome(NamedTuple):
    status: int
    out: str
    err: str
    result: dict | None

    @property
    def error(self) -> str:
        """The one line that a user's mistake ends with; asserts that it is one line, and all there is."""
        assert self.status == 2 and self.result is None, (self.status, self.out)
        assert self.err.startswith("error: ") and self.err.count("\n") == 1 and "Traceback" not in self.err, self.err
        return self.err.strip()


@pytest.fixture
def run(capfd, tiny_data, tmp_path):
    """run(**settings): the whole script in this process, on the tiny model and data."""

    def call(**settings) -> Outcome:
        env = {**TINY, "DATA_DIR": tiny_data, "ARTIFACT_DIR": tmp_path / "run", **settings}
        env = {name: str(value) for name, value in env.items() if value is not None}
        status = tg.main(env)
        out, err = capfd.readouterr()
        last = out.strip().rsplit("\n", 1)[-1]
        return Outcome(status, out, err, json.loads(last[7:]) if last.startswith("RESULT ") else None)

    return call


def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, world: int, port: int, target, args, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(target(*args), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(world: int, target, *args, folder: Path) -> list:
    """target(*args) in `world` processes that torchrun might have started; returns what each returned."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_rank, (world, free_port(), target, args, str(folder)), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
