"""Train, quantize and score a small GPT for the 16 MB / 10 minute language-model challenge, in one file.

    SEED=0 torchrun --standalone --nproc_per_node=8 train_gpt.py          # a record run on 8 Hopper GPUs
    PRESET=smoke python train_gpt.py                                      # the same pipeline, tiny, on a CPU
    EVAL_ONLY_PATH=runs/x/final_model.pt torchrun ... train_gpt.py        # score a checkpoint, an artifact

A run is a list of phases, and `compete` at the end of the file reads like it. Two clocks of 600 s count:

    setup      settings, files and tools are checked; the script is packed, so that its size is known
    warm-up    every training shape is compiled and run on random tokens; then all state is put back, bitwise
    train      Muon and AdamW; layers 3-5 repeat from .35 of the clock on                   | training clock
    calibrate  X'X at the input of every matrix, on training batches                        |
    export     GPTQ, container, Brotli; the artifact is written, read back, and is the model from here on
    score      validation files are opened only now; plain scores of both sets of weights   | scoring clock
    adapt      score-first test-time training of per-document adapters: the headline        |

Every setting is an environment variable (see Config), and the defaults are the record. The score rests on
the order above, on `adapt`, which scores a chunk and only then learns from it, and on `Tally`, which wants
every target once. Shapes: T packed tokens, D model width, H query and K key/value heads of width E.
"""
import time

START = time.perf_counter()  # before torch loads: phases count from the start of the process

import base64
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import shutil
import sys
import traceback
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

CAP_BYTES = 16_000_000  # decimal: code + model, as files
CLOCK_SECONDS = 600  # of training, and of scoring
BUFFERS_PER_STEP = 8  # a step's tokens are packed into this many buffers, shared out among ranks

class UserError(Exception):
    """A mistake in settings, files or machine. Its text is one line that names what to change."""

@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever foreign or damaged bytes provoke becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} was not made by this script, or is damaged: {error!r:.200}") from error

def tool(name: str, remedy: str = "pip install -r requirements.txt") -> Any:
    """Import a dependency at its first use, so that importing this file needs only torch and numpy."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}): {remedy}") from error

# ---- Settings ----------------------------------------------------------------------------------------------

PRESETS = {  # defaults to start from; any variable overrides them
    "": {},
    "smoke": dict(  # the whole pipeline on the bundled Wikipedia text, four minutes on two CPU cores
        DATA_DIR="data/smoke", VOCAB_SIZE=1024, NUM_LAYERS=7, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2,
        ROPE_DIMS=8, LOOP_START=2, LOOP_END=3, PARALLEL_START_LAYER=5, TRAIN_BATCH_TOKENS=2048,
        TRAIN_SEQ_LEN=256, EVAL_SEQ_LEN=256, TTT_EVAL_SEQ_LEN=256, VAL_BATCH_TOKENS=4096, ITERATIONS=400,
        MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=1, TRAIN_LOG_EVERY=20, MATRIX_LR=0.08, MUON_MOMENTUM=0.9,
        MUON_MOMENTUM_WARMUP_START=0.85, QUANT_STATES=8, GPTQ_CALIBRATION_BATCHES=64, TTT_BATCH_SIZE=8,
        TTT_CHUNK_SIZE=32, TTT_LORA_RANK=8, TTT_LORA_LR=0.004, TTT_SITES="qkv,attn,mlp,head"),
}
DROPPED = {  # settings of this script's ancestors that would change nothing here, and so are refused
    "always on, as in the record": "TIE_EMBEDDINGS XSA_LAST_N SKIP_GATES_ENABLED LN_SCALE MUON_ROW_NORMALIZE",
    "replaced by TTT_SITES": "TTT_K_LORA TTT_MLP_LORA TTT_O_LORA",
    "not part of this system": "ROPE_TRAIN_SEQ_LEN ROPE_YARN PARALLEL_FINAL_LANE MUON_BETA2 TTT_OPTIMIZER "
                               "TTT_BETA1 TTT_GRAD_STEPS COMPRESSOR CONTROL_TENSOR_NAME_PATTERNS",
    "replaced by MODEL_DIM": "EMBEDDING_DIM",
    "replaced by TIED_EMBED_LR": "EMBED_LR HEAD_LR",
    "replaced by the windows of test-time training (TTT_CHUNK_SIZE)": "SLIDING_WINDOW_ENABLED EVAL_STRIDE",
    "replaced by VAL_DOC_FRACTION": "TTT_EVAL_BATCHES",
    "replaced by SAVE_SCORES": "TTT_OUTPUT_DIR",
    "steps follow from sensitivity and cap": "MATRIX_BITS EMBED_BITS MATRIX_CLIP_SIGMAS ATTN_CLIP_SIGMAS "
                                             "MLP_CLIP_SIGMAS EMBED_CLIP_SIGMAS",
}

def knob(default, low=None, high=None):
    """A setting: its default, and the smallest and largest value it may take."""
    return dataclasses.field(default=default, metadata=dict(low=low, high=high))

@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting. The field train_seq_len is the environment variable TRAIN_SEQ_LEN, and so on."""

    # the run
    preset: str = knob("")  # smoke: tiny settings for a CPU; any variable overrides them
    seed: int = knob(1337, 0, 2**63 - 1)  # of weights, shard order and adapters
    run_id: str = knob("")  # name of the run; default: date, time and seed
    artifact_dir: str = knob("")  # where the run leaves its files; default: runs/RUN_ID
    data_dir: str = knob("./data")  # looked up from the working directory, then beside the script
    eval_only_path: str = knob("")  # score this artifact (.int6.ptz) or checkpoint (.pt); do not train
    save_scores: str = knob("")  # write the nll of every target to this .npz
    attention: str = knob("auto")  # auto, flash3, varlen or sdpa
    # data and batches
    vocab_size: int = knob(8192, 1, 65536)  # pieces of the tokenizer; part of the data files' names
    train_batch_tokens: int = knob(786_432, 8)  # tokens of an optimizer step, over all ranks
    train_seq_len: int = knob(2048, 1)  # longest span of a document that training sees as one context
    val_batch_tokens: int = knob(524_288, 1)  # plain evaluation: 8 forwards of one rank, or one of 8 ranks
    eval_seq_len: int = knob(2048, 1)  # longest span of a document in plain evaluation
    val_doc_fraction: float = knob(1.0, 1e-9, 1.0)  # score only this first part of the validation documents
    # model
    num_layers: int = knob(11, 1, 1000)  # layers with weights of their own
    model_dim: int = knob(512, 1)  # width of the residual stream
    num_heads: int = knob(8, 1)  # query heads
    num_kv_heads: int = knob(4, 1)  # key/value heads
    mlp_mult: float = knob(4.0, 1e-3)  # hidden width of the MLP over MODEL_DIM
    rope_dims: int = knob(16, 0)  # dims of each head that know the position
    rope_base: float = knob(10_000.0, 1.0)  # longest wavelength of the rotation over 2 pi
    qk_gain_init: float = knob(5.0, 0.0)  # initial gain of each query head
    logit_softcap: float = knob(30.0, 1e-3, 40.0)  # logits stay within plus and minus this
    tied_embed_init_std: float = knob(0.005, 0.0)  # initial standard deviation of the embedding
    num_loops: int = knob(2, 0, 100)  # extra passes over layers LOOP_START to LOOP_END
    loop_start: int = knob(3, 0)  # first layer of the loop
    loop_end: int = knob(5, 0)  # last layer of the loop
    enable_looping_at: float = knob(0.35, 0.0, 1.0)  # fraction of training from which the loop runs; 1: never
    parallel_start_layer: int = knob(8, 0)  # from this layer on attention and MLP have a stream each
    # schedule
    iterations: int = knob(20_000, 1)  # most optimizer steps
    max_wallclock_seconds: float = knob(600.0, 0.0)  # training clock, calibration included; 0: count steps
    warmup_steps: int = knob(3, 1)  # untimed steps of each loop form before training, undone afterwards
    warmdown_frac: float = knob(0.85, 0.0, 1.0)  # last fraction of training, in which learning rates fall
    min_lr: float = knob(0.1, 0.0, 1.0)  # floor of the learning rates, relative to their peak
    train_log_every: int = knob(500, 1)  # steps between log lines
    val_loss_every: int = knob(0, 0)  # steps between plain validations during training; 0: never
    # optimizers
    matrix_lr: float = knob(0.026, 0.0)  # Muon, for all matrices of the layers
    muon_momentum: float = knob(0.97, 0.0, 1.0)  # Nesterov
    muon_momentum_warmup_start: float = knob(0.92, 0.0, 1.0)  # momentum of the first step
    muon_momentum_warmup_steps: int = knob(1500, 0)  # steps to full momentum; in short runs .31 of the run
    muon_backend_steps: int = knob(5, 1)  # Newton-Schulz iterations
    muon_wd: float = knob(0.095, 0.0)  # weight decay, decoupled like all others
    tied_embed_lr: float = knob(0.03, 0.0)  # AdamW, for the embedding
    embed_wd: float = knob(0.085, 0.0)  # weight decay of the embedding
    scalar_lr: float = knob(0.02, 0.0)  # AdamW, for gains, scales, gates and mixes
    adam_wd: float = knob(0.02, 0.0)  # weight decay of these
    beta1: float = knob(0.9, 0.0, 0.999999)  # AdamW
    beta2: float = knob(0.99, 0.0, 0.999999)  # AdamW
    adam_eps: float = knob(1e-8, 0.0)  # AdamW
    grad_clip_norm: float = knob(0.3, 0.0)  # of the global gradient after reduction; 0: no clipping
    ema_decay: float = knob(0.9965, 0.0, 0.999999)  # of the exported average of weights; less in short runs
    # quantization
    quant_states: int = knob(64, 1, 64)  # of the trellis, 1 to 64 by TRELLIS: more search longer, err less
    gptq_calibration_batches: int = knob(16, 1)  # training buffers behind the Hessians, over all ranks
    gptq_reserve_seconds: float = knob(4.0, 0.0)  # of the training clock, kept for them; 1 GPU wants 10
    # test-time training
    ttt_enabled: bool = knob(True)  # 0: the plain score of the quantized model is the headline
    ttt_sites: str = knob("qkv,attn,head")  # which of qkv, attn, mlp and head have adapters
    ttt_lora_rank: int = knob(80, 1)  # of every adapter
    ttt_lora_lr: float = knob(2e-4, 0.0)  # AdamW, for adapters
    ttt_chunk_size: int = knob(24, 1)  # tokens scored between two updates, at the beginning of a document
    ttt_chunk_growth: float = knob(1 / 64, 0.0, 1.0)  # or this much of what came before, if that is more
    ttt_eval_seq_len: int = knob(3072, 1)  # longest window, chunk included
    ttt_batch_size: int = knob(64, 1)  # documents that advance together on a rank
    ttt_weight_decay: float = knob(0.5, 0.0)  # of adapters
    ttt_beta2: float = knob(0.99, 0.0, 0.999999)  # AdamW, for adapters; beta 1 is 0
    eval_max_seconds: float = knob(600.0, 0.0)  # scoring clock; the rest keeps its plain score; 0: none

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, saved: Mapping[str, Any] = {}) -> "Config":
        """Settings by `env`, else as `saved` with a model, else by the preset, else the record's.

        UserError names a variable that is dropped, misspelt or malformed.
        """
        knobs = {f.name.upper(): f for f in dataclasses.fields(cls)}
        for why, names in DROPPED.items():
            for name in names.split():
                if name in env:
                    raise UserError(f"{name} is not a setting of this script ({why}): unset it")
        for name in set(env) - set(knobs):
            close = difflib.get_close_matches(name.upper(), knobs, 1, cutoff=0.9)
            if close or name.startswith(("TTT_", "GPTQ_", "MUON_")):
                hint = f"did you mean {close[0]}?" if close else "unset it or look up its name"
                raise UserError(f"{name} is not a setting of this script: {hint}")
        if unknown := [name for name in saved if name.upper() not in knobs]:
            raise UserError(f"EVAL_ONLY_PATH: another version of this script made it: what is {unknown[0]}?")
        if (preset := env.get("PRESET", "")) not in PRESETS:
            raise UserError(f"PRESET={preset!r} is none of {[*PRESETS]}")
        given = {name: str(int(value) if isinstance(value, bool) else value) for name, value in (
            *PRESETS[preset].items(), *((name.upper(), value) for name, value in saved.items()),
            *((name, value) for name, value in env.items() if name in knobs and value != ""))}
        return cls(**{n.lower(): parse_setting(n, raw, type(knobs[n].default)) for n, raw in given.items()})

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if low is not None and not low <= value <= (math.inf if high is None else high):
                raise UserError(f"{f.name.upper()}={value} is out of range, from {low} to {high or math.inf}")
        loops, buffer = self.num_loops > 0, self.train_batch_tokens // BUFFERS_PER_STEP
        for wrong, names, why in (
            (self.attention not in ("auto", *ATTENTION), "attention", "is none of auto flash3 varlen sdpa"),
            (self.model_dim % self.num_heads or self.num_heads % self.num_kv_heads,
             "model_dim num_heads num_kv_heads", "must each be a multiple of the next"),
            (self.rope_dims % 2 or self.rope_dims > self.head_dim, "rope_dims model_dim num_heads",
             "must give an even number of dims of a head"),
            (self.model_dim * self.mlp_mult % 1, "model_dim mlp_mult", "give a fractional width"),
            (loops and not self.loop_start <= self.loop_end < min(self.num_layers, self.parallel_start_layer),
             "loop_start loop_end num_layers parallel_start_layer", "must be in order, the loop apart"),
            (self.train_batch_tokens % BUFFERS_PER_STEP or self.train_seq_len > buffer,
             "train_batch_tokens train_seq_len", "a step must be 8 buffers of at least a span each"),
            (self.quant_states not in TRELLIS, "quant_states", f"is none of {[*TRELLIS]}"),
            (self.eval_seq_len > self.val_batch_tokens, "val_batch_tokens eval_seq_len",
             "a batch must hold a span"),
            (self.ttt_chunk_size > self.ttt_eval_seq_len, "ttt_eval_seq_len ttt_chunk_size",
             "a window must hold a chunk"),
            (not self.ttt_sites or self.ttt_sites != ",".join(
                site for site in SITES if site in self.ttt_sites.split(",")),
             "ttt_sites", "is none of qkv,attn,mlp,head, or not in this order"),
            (0 < self.max_wallclock_seconds <= self.gptq_reserve_seconds,
             "max_wallclock_seconds gptq_reserve_seconds", "the reserve leaves nothing to train in"),
        ):
            if wrong:
                given = ", ".join(f"{name.upper()}={getattr(self, name)}" for name in names.split())
                raise UserError(f"{given}: {why}")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.model_dim * self.mlp_mult)

    @property
    def loops_at_end(self) -> bool:
        return self.num_loops > 0 and self.enable_looping_at < 1

    def pick(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def to_save(self) -> dict[str, Any]:
        """What is kept with a model, so that it can be scored again as it was."""
        return self.pick(f.name for f in dataclasses.fields(self) if f.name not in LOCAL_SETTINGS)

# Settings without which saved weights do not mean what they meant; on which quantization depends; of one run
MODEL_SETTINGS = """seed vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult rope_dims rope_base
    logit_softcap num_loops loop_start loop_end enable_looping_at parallel_start_layer""".split()
QUANT_SETTINGS = "seed train_batch_tokens train_seq_len quant_states gptq_calibration_batches".split()
LOCAL_SETTINGS = """preset run_id artifact_dir data_dir eval_only_path save_scores attention val_doc_fraction
    val_loss_every train_log_every eval_max_seconds""".split()

def parse_setting(name: str, raw: str, kind: type) -> Any:
    """One environment variable as bool, int, float or str."""
    with contextlib.suppress(KeyError, ValueError):
        value = {"0": False, "1": True}[raw] if kind is bool else kind(raw)
        if kind is not float or math.isfinite(value):
            return value
    what = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{name}={raw!r} is not {what}")

# ---- Ranks, files, log -------------------------------------------------------------------------------------

class Ranks:
    """The processes of a run: which one this is, where it computes, and the collectives the script needs.

    One process is the degenerate case of the same code: its collectives return what they were given.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: str = "cpu"):
        self.rank, self.world, self.device, self.is_main = rank, world, torch.device(device), rank == 0
        self.on_gpu = self.device.type == "cuda"

    @classmethod
    def join(cls) -> "Ranks":
        """Take the place that torchrun assigned; without it, be alone."""
        place = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
        rank, world, local = (int(os.environ.get(name, default)) for name, default in place)
        gpus = torch.cuda.device_count()
        if gpus and local >= gpus:
            raise UserError(f"--nproc_per_node is too large: this machine has {gpus} GPUs, none for {local}")
        if gpus:
            torch.cuda.set_device(local)
        if world > 1:  # gloo beside NCCL: what the host has to know must not wait for the GPU
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        return cls(rank, world, f"cuda:{local}" if gpus else "cpu")

    def synchronize(self) -> None:
        """Wait until the device has done all that it was sent."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """The owner's values on all ranks, in place."""
        if self.world > 1:
            dist.broadcast(tensor, owner)
        return tensor

    def max(self, value: float) -> float:
        """Largest value of any rank, through the host."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

def deal(costs: Iterable[float], world: int) -> np.ndarray:
    """Owner of every item: in order, each goes to the rank with the least to do so far."""
    load, owners = np.zeros(world), []
    for cost in costs:
        owners.append(load.argmin())
        load[owners[-1]] += cost
    return np.array(owners, dtype=np.int64)

def write_file(path: Path, data: bytes) -> None:
    """Write all of a file or none of it: to a name aside, to the disk, then rename."""
    path = path.resolve()
    part = path.with_name(path.name + ".part")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is not a file")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error

def read_file(path: Path) -> bytes:
    """All of a file; UserError names one that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error

def compiled_graphs() -> int:
    """How many graphs torch.compile has made so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0

@dataclasses.dataclass
class Phase:
    """A part of the run and the clock it counts against: "training", "scoring" or none."""
    name: str
    clock: str
    began: float = dataclasses.field(default_factory=time.perf_counter)
    seconds: float = 0.0  # when finished
    graphs: int = 0  # compiled in it, when finished

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

class RunLog:
    """What a run leaves to read, by rank 0: log.txt, metrics.jsonl and some sixty lines on the console."""

    def __init__(self, cfg: Config, ranks: Ranks):
        default = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-seed{cfg.seed}"
        self.run_id = ranks.share(cfg.run_id or default)
        self.folder = Path(cfg.artifact_dir or Path("runs", self.run_id))
        self.ranks, self.files, problem = ranks, {}, None
        self.phases = [Phase("imports", "", START, time.perf_counter() - START)]  # and finding ranks
        try:
            if ranks.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                if (self.folder / "result.json").exists():
                    raise OSError(0, "it holds the result of another run")
                self.files = {name: open(self.folder / name, "w") for name in ("log.txt", "metrics.jsonl")}
        except OSError as error:
            problem = f"ARTIFACT_DIR={self.folder} cannot be used: {error.strerror}"
        if problem := ranks.share(problem):
            raise UserError(problem)

    def write(self, name: str, line: str) -> None:
        if self.files:
            try:
                print(line, file=self.files[name], flush=True)
            except OSError as error:
                raise UserError(f"cannot write {self.folder / name}: {error.strerror}") from error

    def __call__(self, message: str, console: bool = True) -> None:
        """Add lines to the log and, unless told otherwise, to the console."""
        self.write("log.txt", message)
        if console and self.files:
            with contextlib.suppress(BrokenPipeError):  # of a reader that has gone
                print(message, flush=True)

    def metrics(self, kind: str, **values: Any) -> None:
        self.write("metrics.jsonl", json.dumps({"kind": kind, **values}))

    @contextlib.contextmanager
    def phase(self, name: str, clock: str = "") -> Iterator[Phase]:
        if clock:  # counts from when all ranks are here to when all are done
            self.ranks.max(0.0)
        phase = Phase(name, clock, graphs=-compiled_graphs())
        self.phases.append(phase)
        yield phase
        self.ranks.synchronize()
        phase.seconds = self.ranks.max(phase.elapsed()) if clock else phase.elapsed()
        phase.graphs += compiled_graphs()

    def spent(self, clock: str) -> float:
        """Seconds of all finished phases of a clock."""
        return sum(phase.seconds for phase in self.phases if phase.clock == clock)

class Run(NamedTuple):
    """What every phase needs."""
    cfg: Config
    ranks: Ranks
    log: RunLog
    ops: "Ops"

# ---- Data --------------------------------------------------------------------------------------------------
# A shard is a header of 256 little-endian int32 (magic, version, token count) and then uint16 tokens. Every
# document starts with BOS. A span is what attention sees as one context: a document or a piece of a long one.

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
IGNORE = -1  # target of a position that predicts nothing

class DataFiles(NamedTuple):
    """Where the data of a run are."""
    tokenizer: Path
    train: list[Path]
    val: list[Path]

def find_data(cfg: Config, train: bool) -> DataFiles:
    """Locate tokenizer and shards by name, opening nothing. UserError says what is missing and where."""
    roots = dict.fromkeys(root / cfg.data_dir for root in (Path.cwd(), Path(__file__).resolve().parent))
    name = f"datasets/fineweb10B_sp{cfg.vocab_size}"
    root = next((root for root in roots if (root / name).is_dir()), None)
    if root is None:
        raise UserError(f"DATA_DIR={cfg.data_dir}: no {name} in any of {[*map(str, roots)]}; fetch it by "
                        "data/download.py or make it by data/prepare.py")
    shards = lambda kind: sorted((root / name).glob(f"fineweb_{kind}_*.bin"))
    files = DataFiles(root / f"tokenizers/fineweb_{cfg.vocab_size}_bpe.model", shards("train"), shards("val"))
    for what, missing in (("tokenizer " + str(files.tokenizer), not files.tokenizer.is_file()),
                          (f"{root / name}/fineweb_train_*.bin", train and not files.train),
                          (f"{root / name}/fineweb_val_*.bin", not files.val)):
        if missing:
            raise UserError(f"DATA_DIR={cfg.data_dir}: there is no {what}")
    if [path.name for path in files.val] != [f"fineweb_val_{i:06}.bin" for i in range(len(files.val))]:
        raise UserError(f"{root / name}/fineweb_val_*.bin are not numbered from 000000 without a gap")
    return files

def open_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of a shard, (count,) uint16. UserError if it is not what its header says."""
    try:
        size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is not a token shard: it does not start with {SHARD_MAGIC}, {SHARD_VERSION}")
    count, held = int(header[2]), (size - HEADER_BYTES) / 2
    if count <= 0 or held != count:
        what = "empty" if count <= 0 else "truncated" if held < count else "over-long"
        raise UserError(f"{path} is {what}: its header says {count} tokens, it holds {held:g}; make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))

def check_tokens(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    if tokens.size and tokens.max() >= vocab_size:
        raise UserError(f"{path} holds token {tokens.max()}, VOCAB_SIZE={vocab_size}: another tokenizer's")

class Tokenizer(NamedTuple):
    """What scoring needs to know of each piece, (vocab_size,)."""
    bos: int
    size: np.ndarray  # bytes of the piece, without the space it begins with
    spaced: np.ndarray  # it begins with a space
    special: np.ndarray  # control, unknown or unused: no text

    def target_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that every token but the first adds to the text, (len - 1,).

        The space a piece begins with counts unless the token before is no text. This is the challenge's rule,
        and exact but for a document that begins with a space: of that it counts one byte too few.
        """
        before, now = tokens[:-1], tokens[1:]
        return self.size[now] + (self.spaced[now] & ~self.special[before])

def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a SentencePiece model. UserError if it is damaged, of another size or breaks that rule."""
    data = read_file(path)
    try:
        sp = tool("sentencepiece").SentencePieceProcessor()
        sp.LoadFromSerializedProto(data)
        pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a SentencePiece model, or damaged") from error
    if len(pieces) != vocab_size or sp.bos_id() < 0:
        raise UserError(f"{path} has {len(pieces)} pieces and BOS id {sp.bos_id()}; wanted are VOCAB_SIZE="
                        f"{vocab_size} pieces and a BOS to start every document")
    special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(vocab_size)])
    size, spaced = np.zeros(vocab_size, dtype=np.int64), np.zeros(vocab_size, dtype=bool)
    for i, piece in enumerate(pieces):
        text = piece.removeprefix("\u2581")
        if "\u2581" in text and not special[i]:
            raise UserError(f"{path}: piece {i} has a space inside, so the usual rule cannot count its bytes")
        if not special[i]:
            size[i], spaced[i] = (1, False) if sp.is_byte(i) else (len(text.encode()), text != piece)
    return Tokenizer(sp.bos_id(), size, spaced, special)

class Seqs(NamedTuple):
    """Spans of a packed buffer, in the form of FlashAttention's varlen functions."""
    cu_seqlens: Tensor  # (spans + 1,) int32 boundaries; repeated ones are empty spans
    positions: Tensor  # (T,) index of each token within its span
    max_seqlen: int  # no span is longer

class Batch(NamedTuple):
    """A packed buffer, which is what a forward takes."""
    tokens: Tensor  # (T,)
    targets: Tensor  # (T,) the token to predict, or IGNORE
    seqs: Seqs

def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a NamedTuple with all tensors in it, on the device; the host does not wait."""
    if isinstance(value, tuple):
        return type(value)(*(to_device(v, device) for v in value))
    pinned = isinstance(value, Tensor) and device.type == "cuda"
    return value.pin_memory().to(device, non_blocking=True) if pinned else value

def tensors_in(value: Any) -> list[Tensor]:
    """Of a NamedTuple, and of those in it, in order."""
    if isinstance(value, tuple):
        return [tensor for v in value for tensor in tensors_in(v)]
    return [value] if isinstance(value, Tensor) else []

def span_bounds(starts: np.ndarray, total: int, max_len: int) -> np.ndarray:
    """Boundaries of the documents at `starts` in a buffer of `total`, cut into spans of at most max_len."""
    starts = np.union1d(starts, 0)
    pieces = -(-np.diff(starts, append=total) // max_len)
    nth_piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.append(np.repeat(starts, pieces) + nth_piece * max_len, total)

def make_batch(tokens: np.ndarray, targets: np.ndarray, bounds: np.ndarray, max_spans: int,
               max_len: int) -> Batch:
    """A batch whose shapes follow from len(tokens) and max_spans alone, so that compiled code always fits.

    If there are more than max_spans spans, only the targets of the first ones count; the rest is cut evenly.
    """
    total = len(tokens)
    if len(bounds) - 1 > max_spans:
        places = np.arange(len(bounds)) - (bounds - total) // max_len  # if all that follows is cut evenly
        keep = bounds[: np.flatnonzero(places <= max_spans)[-1] + 1]
        bounds = np.concatenate([keep, np.arange(keep[-1] + max_len, total, max_len), [total]])
        targets = np.where(np.arange(total) < keep[-1], targets, IGNORE)
    positions = np.arange(total) - np.repeat(bounds[:-1], np.diff(bounds))
    cu_seqlens = np.append(bounds, np.full(max_spans + 1 - len(bounds), total))  # filled up with empty spans
    whole = lambda a: torch.from_numpy(a.astype(np.int64))
    seqs = Seqs(torch.from_numpy(cu_seqlens.astype(np.int32)), whole(positions), max_len)
    return Batch(whole(tokens), whole(targets), seqs)

def first_part(batch: Batch, count: int) -> Batch:
    """The first `count` positions of a batch."""
    seqs = batch.seqs
    seqs = Seqs(seqs.cu_seqlens.clamp(max=count), seqs.positions[:count], seqs.max_seqlen)
    return Batch(batch.tokens[:count], batch.targets[:count], seqs)

class PackedLoader:
    """Training buffers: the documents of a step, cut into spans, dealt to buffers of equal work and size.

    Attention's work grows with the square of a span: end to end as they come, the fullest of a step's eight
    buffers holds 9 % more of it than the mean, and the other GPUs wait. Shards are in a seeded order every
    epoch. Buffer n follows from shards, seed and n alone. So there is no cursor to save and restore, any
    rank can make any buffer, and a step sees the same data however many ranks share it.
    """

    def __init__(self, paths: list[Path], bos: int, cfg: Config, buffer_tokens: int):
        self.paths, self.bos, self.cfg, self.buffer_tokens = paths, bos, cfg, buffer_tokens
        self.shards = [open_shard(path) for path in paths]
        self.epoch_tokens = sum(map(len, self.shards))
        self.per_step = cfg.train_batch_tokens // buffer_tokens
        self.step = functools.lru_cache(1)(self.step)  # all buffers of a step are cut from it
        for path, shard in zip(paths, self.shards):
            if not (shard[:1_000_000] == bos).any():
                raise UserError(f"{path} has no BOS (id {bos}) in its first million tokens: wrong tokenizer")
        # The fullest buffer of some 16 steps and 4 to spare fix the number of spans: an empty one costs 13 us
        # of attention, forward and backward; a buffer that is fuller still loses its last targets.
        steps = max(1, self.epoch_tokens // cfg.train_batch_tokens)
        sampled = (len(self.layout(step * self.per_step + i)[2]) - 1
                   for step in range(0, steps, -(-steps // 16)) for i in range(self.per_step))
        self.max_spans = max(*sampled, -(-buffer_tokens // cfg.train_seq_len)) + 4

    def read(self, start: int, count: int) -> tuple[np.ndarray, list[int]]:
        """`count` tokens of the endless stream from `start` on, and where among them shards begin."""
        pieces, seams, have = [], [], 0
        while have < count:
            epoch, skip = divmod(start + have, self.epoch_tokens)
            for index in np.random.default_rng((self.cfg.seed, epoch)).permutation(len(self.shards)):
                piece = self.shards[index][skip : skip + count - have].astype(np.int64)
                if len(piece):
                    check_tokens(piece, self.cfg.vocab_size, self.paths[index])
                    seams += [have] if skip == 0 else []
                    pieces.append(piece)
                    have += len(piece)
                skip = max(0, skip - len(self.shards[index]))
        return np.concatenate(pieces), seams

    def step(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets of step n; bounds of its spans as dealt (shards part them); way back of each."""
        total = self.cfg.train_batch_tokens
        stream, seams = self.read(n * total, total + 1)
        tokens, targets = stream[:-1], stream[1:].copy()
        for seam in seams:  # the first token of a shard follows from nothing, unless it is a BOS
            if seam and stream[seam] != self.bos:
                targets[seam - 1] = IGNORE
        starts = np.union1d(np.flatnonzero(tokens == self.bos), np.array(seams, dtype=np.int64))
        bounds = span_bounds(starts[starts < total], total, self.cfg.train_seq_len)
        lengths = np.diff(bounds)
        longest_first = np.argsort(-lengths, kind="stable")
        hands = deal(lengths[longest_first], self.per_step)  # equal in length and, so, nearly in squares
        order = np.argsort(hands[np.argsort(longest_first)], kind="stable")  # in each as they came
        ends = np.cumsum(lengths[order])
        return tokens, targets, np.append(0, ends), bounds[order] - ends + lengths[order]

    def layout(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets and span boundaries of buffer n."""
        (step, place), size = divmod(n, self.per_step), self.buffer_tokens
        tokens, targets, bounds, back = self.step(step)
        inside = np.clip(bounds - place * size, 0, size)
        come_from = np.arange(place * size, (place + 1) * size) + np.repeat(back, np.diff(inside))
        return tokens[come_from], targets[come_from], np.unique(inside)

    def digest(self) -> str:
        """SHA-256 of all shards' names, lengths, first and last tokens; to read them whole takes too long."""
        parts = [(path.name, len(shard), shard[:4096].tobytes(), shard[-4096:].tobytes())
                 for path, shard in zip(self.paths, self.shards)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def buffer(self, n: int) -> Batch:
        return make_batch(*self.layout(n), self.max_spans, self.cfg.train_seq_len)

    def buffers(self, numbers: Iterator[int], device: torch.device) -> Iterator[Batch]:
        """Buffers on the device, two of them read and packed ahead by a thread while the device computes."""
        with ThreadPoolExecutor(1) as pool:
            ahead = deque(pool.submit(self.buffer, n) for n in itertools.islice(numbers, 2))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self.buffer, n) for n in itertools.islice(numbers, 1))
                yield to_device(batch, device)

class Validation(NamedTuple):
    """The validation stream in its own order. Target j is token j + 1, so a document's last one is a BOS."""
    tokens: np.ndarray  # (N,)
    token_bytes: np.ndarray  # (N - 1,) of every target
    starts: np.ndarray  # (documents,) first token of each, its BOS, and number of its first target
    lengths: np.ndarray  # (documents,) targets of each
    begin_with_space: int  # documents whose first byte is not counted
    sha256: str = ""  # of the files' tokens

def load_validation(paths: list[Path], tokenizer: Tokenizer, cfg: Config) -> Validation:
    """Read all validation shards as one stream. UserError if that is not documents of this tokenizer."""
    shards = [open_shard(path) for path in paths]
    for path, shard in zip(paths, shards):
        check_tokens(shard, cfg.vocab_size, path)
    tokens = np.concatenate(shards)
    digest, tokens = hashlib.sha256(tokens.tobytes()).hexdigest(), tokens.astype(np.int64)
    starts = np.flatnonzero(tokens == tokenizer.bos)
    if not len(starts) or starts[0] != 0:
        raise UserError(f"{paths[0]} does not begin with BOS (id {tokenizer.bos}): another tokenizer's")
    count = max(1, round(cfg.val_doc_fraction * len(starts)))
    tokens, starts = tokens[: starts[count]] if count < len(starts) else tokens, starts[:count]
    token_bytes = tokenizer.target_bytes(tokens)
    if not token_bytes.sum():
        raise UserError(f"{paths[0]}: the validation documents hold no text")
    first = tokens[np.minimum(starts + 1, len(tokens) - 1)]
    return Validation(tokens, token_bytes, starts, np.diff(starts, append=len(token_bytes)),
                      int(tokenizer.spaced[first].sum()), digest)

# ---- Attention ---------------------------------------------------------------------------------------------
# Causal within each span, nothing across spans, scale 1/sqrt(E); (T, H, E) all. Chosen once, and logged.

def flash3_attention(q: Tensor, k: Tensor, v: Tensor, seqs: Seqs) -> Tensor:
    """FlashAttention-3 (Hopper), package flash_attn_3; bf16 or fp16."""
    from flash_attn_interface import flash_attn_varlen_func
    cu, longest = seqs.cu_seqlens, seqs.max_seqlen
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest,
                                  max_seqlen_k=longest, causal=True)

@functools.cache
def varlen_options() -> dict[str, Any]:
    """How this PyTorch wants to be told "causal": its signature has changed."""
    known = inspect.signature(tool("torch.nn.attention.varlen").varlen_attn).parameters
    return {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}

def varlen_attention(q: Tensor, k: Tensor, v: Tensor, seqs: Seqs) -> Tensor:
    """PyTorch's own varlen attention (NVIDIA GPUs from Ampere on); bf16 or fp16."""
    from torch.nn.attention.varlen import varlen_attn
    cu, longest = seqs.cu_seqlens, seqs.max_seqlen
    return varlen_attn(q, k, v, cu, cu, longest, longest, **varlen_options())

def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, seqs: Seqs) -> Tensor:
    """Scaled dot-product attention, neighbouring spans of one length at a time; any device and dtype."""
    outputs, lo = [], 0
    for length, run in itertools.groupby(seqs.cu_seqlens.diff().tolist()):
        if length:
            hi = lo + length * len(list(run))
            heads = [t[lo:hi].unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v)]
            y = F.scaled_dot_product_attention(*heads, is_causal=True)
            outputs.append(y.transpose(1, 2).flatten(0, 1))
            lo = hi
    return torch.cat(outputs)

ATTENTION = {"flash3": flash3_attention, "varlen": varlen_attention, "sdpa": sdpa_attention}

def choose_attention(name: str, device: torch.device) -> Callable:
    """What ATTENTION names; for "auto" the fastest that this machine has. UserError if it cannot run here."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if name == "auto":
        flash = capability[0] == 9 and importlib.util.find_spec("flash_attn_interface")
        name = "flash3" if flash else "varlen" if capability[0] >= 8 else "sdpa"
    if name == "flash3":
        tool("flash_attn_interface", "install flash-attn-3 as README says, or set ATTENTION=varlen")
    if name == "flash3" and capability[0] != 9 or name == "varlen" and capability[0] < 8:
        need = "a Hopper" if name == "flash3" else "an Ampere or newer"
        raise UserError(f"ATTENTION={name} needs {need} GPU, here is {device_name(device)}: use sdpa")
    return ATTENTION[name]

def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"

# ---- Kernels (Hopper, Triton) ------------------------------------------------------------------------------
# Four pieces of a layer that PyTorch alone carries through memory too often. Each in this order: mathematics
# in PyTorch, which runs where there is no Triton and which tests compare with; kernel, both ways; operators,
# which torch.compile takes as they are; autograd. Values are bf16 in memory and fp32 in registers.

NORM_EPS = torch.finfo(torch.float32).eps  # in every dtype: an embedding of std .005 has mean square 2.5e-5

def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm of the last dim, fp32."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=NORM_EPS)

def operator(fake: Callable) -> Callable:
    """Make a function the operator MODULE::NAME, fed contiguous tensors; `fake` allocates its outputs."""
    def dense(a: Any) -> Any:
        return a.contiguous() if isinstance(a, Tensor) else [*map(dense, a)] if isinstance(a, list) else a

    def register(launch: Callable) -> Callable:
        @functools.wraps(launch)
        def contiguous(*args):
            return launch(*map(dense, args))
        module = __name__.strip("_").replace(".", "_")  # for two copies in one process
        op = torch.library.custom_op(f"{module}::{launch.__name__}", contiguous, mutates_args=())
        op.register_fake(fake)
        return op
    return register

def keep_tensors(ctx, inputs: tuple, output: Any) -> None:
    """For autograd: the gradient of an operator follows from the tensors among its inputs."""
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))

def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()  # the smallest that is not below n

def multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2

# MLP sublayer     y = x + a, n = norm(y) depth, out = y + f(n up') down'      f(p) = leaky_relu(p, .5)^2
# Two kernels, join and a product whose epilogue applies f; backward, its epilogue applies f' and join_grad
# ends. The product keeps no p: act is rounded to an even last bit where p > 0, to an odd one elsewhere, and
# f'(p) = 2 sqrt(act) or -sqrt(act). So act errs by twice a rounding, as if p had been rounded before f.

def activation(pre: Tensor) -> Tensor:
    return F.leaky_relu(pre, 0.5).square()

def mlp_reference(x: Tensor, a: Tensor | None, up: Tensor, down: Tensor,
                  depth: Tensor) -> tuple[Tensor, Tensor]:
    """(T, D) twice, (M, D), (D, M), () -> out and n, (T, D) both; without a, out is what to add to x."""
    y = x if a is None else x + a
    n = (norm(y) * depth).to(x.dtype)
    out = F.linear(activation(F.linear(n, up)), down)
    return out if a is None else y + out, n

@functools.cache
def join_kernel():
    """A program takes BLOCK tokens; WIDTH is D or the next power of two."""
    triton, tl = tool("triton"), tool("triton.language")

    @triton.jit
    def join_program(x, a, depth, n, r, out, T, D, EPS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
                     WIDTH: tl.constexpr, BACKWARD: tl.constexpr):
        # forward: writes y = x + a to out if there is an a, then n and r, with n = y r depth
        # backward: x and a hold the gradients of n and, if there was an a, of y; writes that of x to out
        d, t = tl.arange(0, WIDTH)[None, :], tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at, inside, scale = t[:, None] * D + d, (t[:, None] < T) & (d < D), tl.load(depth).to(tl.float32)
        y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            unit = tl.load(n + at, mask=inside, other=0.0).to(tl.float32) / scale
            y -= unit * (tl.sum(y * unit, 1) / D)[:, None]
            y *= (tl.load(r + t, mask=t < T) * scale)[:, None]
        if ADD:
            y += tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
        if ADD or BACKWARD:
            tl.store(out + at, y.to(x.dtype.element_ty), mask=inside)
        if not BACKWARD:
            rms = tl.rsqrt(tl.sum(y * y, 1) / D + EPS)
            tl.store(r + t, rms, mask=t < T)
            tl.store(n + at, (y * (rms * scale)[:, None]).to(x.dtype.element_ty), mask=inside)

    return join_program

def launch_join(x: Tensor, a: Tensor | None, depth: Tensor, n: Tensor, r: Tensor, out: Tensor,
                backward: bool) -> None:
    """Run the kernel, one way or the other."""
    (T, D), block = x.shape, 4
    join_kernel()[(-(-T // block),)](x, a, depth, n, r, out, T, D, EPS=NORM_EPS, ADD=a is not None,
                                     BLOCK=block, WIDTH=power_of_2(D), BACKWARD=backward)

@functools.cache
def mlp_kernel():
    """The kernel, made at its first use so that importing this file needs no Triton."""
    triton, tl = tool("triton"), tool("triton.language")

    @triton.jit
    def mlp_program(a_desc, b_desc, act_desc, out_desc, M, N, K, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
                    PROGRAMS: tl.constexpr, BACKWARD: tl.constexpr):
        # forward: a (M, K), b (N, K), writes act to out (M, N); UNIT is its last bit in fp32
        # backward: a (M, K), b (K, N), reads act, writes out (M, N)
        tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        BITS: tl.constexpr = tl.int32 if UNIT == 1 else tl.int16
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=not BACKWARD):
            group = tile // (GROUP_M * tiles_n)  # GROUP_M rows of tiles run together, so that b stays in L2
            rows = min(tiles_m - group * GROUP_M, GROUP_M)
            within = tile % (GROUP_M * tiles_n)
            m = (group * GROUP_M + within % rows) * BLOCK_M
            n = (within // rows) * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                a = a_desc.load([m, k])
                if BACKWARD:
                    acc = tl.dot(a, b_desc.load([k, n]), acc)
                else:
                    acc = tl.dot(a, b_desc.load([n, k]).T, acc)
            if BACKWARD:
                act = act_desc.load([m, n])
                root, odd = tl.sqrt(act.to(tl.float32)), act.to(BITS, bitcast=True) & 1
                out_desc.store([m, n], (acc * tl.where(odd == 0, 2 * root, -root)).to(out_desc.dtype))
            else:
                odd = tl.where(acc > 0, 0, UNIT)
                acc = tl.where(acc > 0, acc, 0.5 * acc)
                bits = ((acc * acc).to(tl.int32, bitcast=True) + (UNIT - odd)) & (-2 * UNIT) | odd
                out_desc.store([m, n], bits.to(tl.float32, bitcast=True).to(out_desc.dtype))

    return mlp_program

def launch_mlp(a: Tensor, b: Tensor, act: Tensor | None = None) -> Tensor:
    """Run the product, forward if act is None; (M, K) and b -> (M, N)."""
    descriptor = tool("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor
    backward, (m, k) = act is not None, a.shape
    n = b.size(1) if backward else b.size(0)
    out = a.new_empty(m, n)
    bm, bn, bk = (128, 256, 64) if a.is_cuda else (32, 32, 32)  # a CPU tensor: Triton's interpreter
    tile, programs = [bm, bn], multiprocessors(a)
    mlp_kernel()[(min(programs, -(-m // bm) * -(-n // bn)),)](
        descriptor(a, [bm, bk]), descriptor(b, [bk, bn] if backward else [bn, bk]),
        descriptor(act if backward else out, tile), descriptor(out, tile), m, n, k,
        UNIT=1 << 16 if a.dtype == torch.bfloat16 else 1, BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk, GROUP_M=8,
        PROGRAMS=programs, BACKWARD=backward, num_stages=3, num_warps=8)
    return out

@operator(lambda x, a, up, down, depth: (torch.empty_like(x), torch.empty_like(x), x.new_empty(
    x.size(0), dtype=torch.float32), x.new_empty(x.size(0), up.size(0))))
def fused_mlp(x: Tensor, a: Tensor | None, up: Tensor, down: Tensor,
              depth: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, n, the rms norm's factor r (T,), act)"""
    n, r = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    y = n if a is None else torch.empty_like(x)
    launch_join(x, a, depth, n, r, y, backward=False)
    act = launch_mlp(n, up)
    return F.linear(act, down) if a is None else y.addmm_(act, down.T), n, r, act

@operator(lambda dout, down, act: torch.empty_like(act))
def mlp_grad(dout: Tensor, down: Tensor, act: Tensor) -> Tensor:
    """Of n up'."""
    return launch_mlp(dout, down, act)

@operator(lambda dn, dy, depth, n, r: torch.empty_like(n))
def join_grad(dn: Tensor, dy: Tensor | None, depth: Tensor, n: Tensor, r: Tensor) -> Tensor:
    """Of x, and of a."""
    launch_join(dn, dy, depth, n, r, dx := torch.empty_like(n), backward=True)
    return dx

class FusedMLP(torch.autograd.Function):
    """mlp_reference by these kernels; frozen weights cost no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor | None, up: Tensor, down: Tensor,
                depth: Tensor) -> tuple[Tensor, Tensor]:
        out, n, r, act = fused_mlp(x, a, up, down, depth)
        ctx.set_materialize_grads(False)
        ctx.adds = a is not None
        ctx.save_for_backward(up, down, depth, n, r, act)
        return out, n

    @staticmethod
    def backward(ctx, dout: Tensor, dn: Tensor) -> tuple[Tensor | None, ...]:
        up, down, depth, n, r, act = ctx.saved_tensors
        dpre = mlp_grad(dout, down, act)
        dn = dpre @ up if dn is None else dn + dpre @ up
        dx = join_grad(dn, dout if ctx.adds else None, depth, n, r)
        return (dx, dx if ctx.adds else None, dpre.T @ n if ctx.needs_input_grad[2] else None,
                dout.T @ act if ctx.needs_input_grad[3] else None, None)

# Heads     one product apart into heads; q and k normed and rotated, q times its gain

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position on the first dims of each head (T, heads, E); the others know no position."""
    n = cos.size(-1)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)

def split_heads(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
                K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T, (H + 2K) E), (H,), (longest, 1, R / 2) twice, (T,) -> q, k, v (T, H, E) and own values (T, K, E)

    Keys and values are repeated for every query head: FlashAttention-3 then need not add up their gradients.
    """
    H = len(gain)
    cos, sin = cos[positions], sin[positions]
    q, k, v = qkv.unflatten(1, (H + 2 * K, -1)).split((H, K, K), dim=1)
    q = (rotate(norm(q), cos, sin) * gain[:, None]).to(qkv.dtype)
    k = rotate(norm(k), cos, sin).to(qkv.dtype)
    return q, *(x.repeat_interleave(H // K, dim=1) for x in (k, v)), v

@functools.cache
def heads_kernel():
    """A program takes one of the H + 2K heads of BLOCK tokens."""
    triton, tl = tool("triton"), tool("triton.language")

    @triton.jit
    def heads_program(qkv, gain, cos, sin, positions, q, k, v, own, dqkv, dgain, T, K, G: tl.constexpr,
                      E: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
                      BACKWARD: tl.constexpr):
        # forward: writes the heads; backward: reads their gradients there, writes dqkv and, by program, dgain
        h, H, d = tl.program_id(0), K * G, tl.arange(0, E)[None, :]
        t = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
        if h < H:
            one = q + (t * H + h) * E
        elif h < H + K:
            one = k + (t * H + (h - H) * G) * E
        else:
            one = v + (t * H + (h - H - K) * G) * E
        row, normed = (t * (H + 2 * K) + h) * E, h < H + K
        mine = own + (t * K + h - H - K) * E + d
        partner, turns = tl.where(d < R // 2, d + R // 2, d - R // 2), (t < T) & (d < R) & normed
        angle = tl.load(positions + t, mask=t < T, other=0) * (R // 2) + tl.minimum(d, partner)
        c = tl.load(cos + angle, mask=turns, other=1.0)
        s = tl.load(sin + angle, mask=turns, other=0.0) * tl.where(d < R // 2, 1.0, -1.0)
        x = tl.load(qkv + row + d, mask=t < T, other=0.0).to(tl.float32)
        r = tl.where(normed, tl.rsqrt(tl.sum(x * x, 1) / E + EPS), 1.0)[:, None]
        scale = r * tl.load(gain + h, mask=h < H, other=1.0).to(tl.float32)
        if BACKWARD:
            dy = tl.load(mine, mask=(t < T) & (h >= H + K), other=0.0).to(tl.float32)
            across = tl.zeros_like(dy)
            for g in tl.static_range(G):  # of a query head there is one
                there = (h >= H) | (g == 0)
                dy += tl.load(one + g * E + d, mask=(t < T) & there, other=0.0).to(tl.float32)
                across += tl.load(one + g * E + partner, mask=turns & there, other=0.0).to(tl.float32)
            n, dn = x * r, dy * c - across * s
            along = tl.where(normed, tl.sum(n * dn, 1), 0.0)[:, None]
            tl.store(dgain + tl.program_id(1) * H + h, tl.sum(along), mask=h < H)
            tl.store(dqkv + row + d, (scale * (dn - n * (along / E))).to(dqkv.dtype.element_ty), mask=t < T)
        else:
            across = tl.load(qkv + row + partner, mask=turns, other=0.0).to(tl.float32)
            y = ((x * c + across * s) * scale).to(qkv.dtype.element_ty)
            tl.store(mine, y, mask=(t < T) & (h >= H + K))
            for g in tl.static_range(G):
                tl.store(one + g * E + d, y, mask=(t < T) & ((h >= H) | (g == 0)))

    return heads_program

HEADS_BLOCK = 16

def launch_heads(heads: Sequence[Tensor], inputs: tuple[Tensor, ...], *grads: Tensor) -> None:
    """Forward, into the heads q, k, v, own; or, with dqkv and dgain, backward from what is there."""
    (T, H, E), K, R = heads[0].shape, heads[3].size(1), 2 * inputs[2].size(-1)
    heads_kernel()[H + 2 * K, -(-T // HEADS_BLOCK)](
        *inputs, *heads, *(grads or [None] * 2), T, K, G=H // K, E=E, R=R, EPS=NORM_EPS, BLOCK=HEADS_BLOCK,
        BACKWARD=bool(grads), num_warps=2)

def heads_like(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
               K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, H = qkv.size(0), gain.size(0)  # len() would tie compiled code to this T
    return tuple(qkv.new_empty(T, heads, qkv.size(1) // (H + 2 * K)) for heads in (H, H, H, K))

@operator(heads_like)
def fused_heads(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
                K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """split_heads in one pass."""
    heads = heads_like(qkv, gain, cos, sin, positions, K)
    launch_heads(heads, (qkv, gain, cos, sin, positions))
    return heads

@operator(lambda dheads, qkv, gain, *rest: (torch.empty_like(qkv), torch.empty_like(gain)))
def fused_heads_grad(dheads: list[Tensor], qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor,
                     positions: Tensor) -> tuple[Tensor, Tensor]:
    """(dqkv, dgain)"""
    dqkv, blocks = torch.empty_like(qkv), -(-len(qkv) // HEADS_BLOCK)
    dgain = gain.new_empty(blocks, len(gain), dtype=torch.float32)
    launch_heads(dheads, (qkv, gain, cos, sin, positions), dqkv, dgain)
    return dqkv, dgain.sum(0).to(gain.dtype)

fused_heads.register_autograd(
    lambda ctx, *grads: (*fused_heads_grad(list(grads), *ctx.saved_tensors), *[None] * 4),
    setup_context=keep_tensors)

# Exclusive self-attention     what a head got from attention, less its part along the token's own value

def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """(T, H, E), (T, K, E) -> (T, H, E)"""
    grouped = y.float().unflatten(1, (v.size(1), -1))  # query heads by key/value head
    own = F.normalize(v.float(), dim=-1).unsqueeze(2)
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(1, 2).to(y.dtype)

@functools.cache
def exclude_kernel():
    """A program takes one key/value head of BLOCK tokens and its G query heads."""
    triton, tl = tool("triton"), tool("triton.language")

    @triton.jit
    def exclude_program(y, v, out, dz, dv, T, K, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
                        BACKWARD: tl.constexpr):
        # forward: writes z = y - (y.u) u, where u = v / |v|, to out; backward: dy to out, and dv
        d, t = tl.arange(0, E)[None, :], (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
        head = t * K + tl.program_id(0)
        u = tl.load(v + head * E + d, mask=t < T, other=0.0).to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(u * u, 1)[:, None]), 1e-12)
        u /= length
        du = tl.zeros_like(u)
        for g in tl.static_range(G):
            at = (head * G + g) * E + d
            a = tl.load(y + at, mask=t < T, other=0.0).to(tl.float32)
            along = tl.sum(a * u, 1)[:, None]
            if BACKWARD:
                da = tl.load(dz + at, mask=t < T, other=0.0).to(tl.float32)
                dalong = tl.sum(da * u, 1)[:, None]
                du -= dalong * a + along * da
                a, along = da, dalong
            tl.store(out + at, (a - along * u).to(out.dtype.element_ty), mask=t < T)
        if BACKWARD:
            du -= tl.sum(du * u, 1)[:, None] * u
            tl.store(dv + head * E + d, (du / length).to(dv.dtype.element_ty), mask=t < T)

    return exclude_program

def launch_exclude(y: Tensor, v: Tensor, out: Tensor, *grads: Tensor) -> None:
    """Forward, z into `out`; or, with dz and dv, backward, dy into it."""
    (T, H, E), K, block = y.shape, v.size(1), 16
    exclude_kernel()[K, -(-T // block)](y, v, out, *(grads or [None] * 2), T, K, G=H // K, E=E, BLOCK=block,
                                        BACKWARD=bool(grads))

@operator(lambda y, v: torch.empty_like(y))
def fused_exclude(y: Tensor, v: Tensor) -> Tensor:
    """exclude_self in one pass."""
    launch_exclude(y, v, z := torch.empty_like(y))
    return z

@operator(lambda dz, y, v: (torch.empty_like(y), torch.empty_like(v)))
def fused_exclude_grad(dz: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    launch_exclude(y, v, dy := torch.empty_like(y), dz, dv := torch.empty_like(v))
    return dy, dv

fused_exclude.register_autograd(lambda ctx, dz: fused_exclude_grad(dz, *ctx.saved_tensors),
                                setup_context=keep_tensors)

# Entry of a layer     what the decoder merges in from a skip, the mix with the embedding, the norm

def merge(x: Tensor, skip: Tensor | None, scale: Tensor | None, gate: Tensor | None) -> Tensor:
    """(T, D), then nothing or (T, D), (D,), (D,): the gate's share of the stream, the rest from the skip."""
    return x if skip is None else torch.lerp(scale * skip, x, gate.sigmoid())

def enter(x: Tensor, x0: Tensor, mix: Tensor, depth: Tensor, apart: bool,
          *skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(T, D) twice, (2, D), (), then as merge -> stream, what the layer reads, and x0 for the next visit.

    The stream goes on mixed or, where it is one of two lanes, `apart` from the mix that the layer reads.
    """
    x = merge(x, *skip)
    mixed = mix[0] * x + mix[1] * x0
    return x if apart else mixed, (norm(mixed) * depth).to(x.dtype), x0

@functools.cache
def enter_kernel():
    """A program takes BLOCK tokens at a time; WIDTH is D or the next power of two."""
    triton, tl = tool("triton"), tool("triton.language")

    @triton.jit
    def enter_program(x, x0, mix, depth, skip, scale, gate, out, normed, dx0_next, dx, dx0, dskip, sums, T, D,
                      EPS: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                      BACKWARD: tl.constexpr):
        # forward: writes out and normed; backward: reads their gradients there, writes dx, dx0, dskip and, by
        # program, the gradients of mix, scale and the gate's sigmoid, summed over tokens
        d = tl.arange(0, WIDTH)
        m = tl.load(mix + d, mask=d < D, other=0.0).to(tl.float32)
        m0 = tl.load(mix + D + d, mask=d < D, other=0.0).to(tl.float32)
        if skip is not None:
            s = tl.load(scale + d, mask=d < D, other=0.0).to(tl.float32)
            share = tl.sigmoid(tl.load(gate + d, mask=d < D, other=0.0).to(tl.float32))
        dm = tl.zeros((WIDTH,), tl.float32)
        dm0, ds, dshare = dm, dm, dm
        for block in range(tl.program_id(0), tl.cdiv(T, BLOCK), tl.num_programs(0)):
            t = (block * BLOCK + tl.arange(0, BLOCK))[:, None]
            at, inside = t * D + d, (t < T) & (d < D)
            a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            a0 = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
            u = a
            if skip is not None:
                k = tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
                u = k * s + (a - k * s) * share
            y = u * m + a0 * m0
            r = tl.rsqrt(tl.sum(y * y, 1)[:, None] / D + EPS)
            scaled = r * tl.load(depth).to(tl.float32)
            if BACKWARD:
                dn = tl.load(normed + at, mask=inside, other=0.0).to(tl.float32)
                dout = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
                g = scaled * (dn - y * (tl.sum(dn * y, 1)[:, None] * r * r / D))
                if not APART:
                    g += dout
                dm += tl.sum(g * u, 0)
                dm0 += tl.sum(g * a0, 0)
                if dx0_next is not None:
                    g0 = g * m0 + tl.load(dx0_next + at, mask=inside, other=0.0).to(tl.float32)
                    tl.store(dx0 + at, g0.to(x.dtype.element_ty), mask=inside)
                g = g * m + dout if APART else g * m
                if skip is not None:
                    tl.store(dskip + at, (g * (1 - share) * s).to(x.dtype.element_ty), mask=inside)
                    ds += tl.sum(g * (1 - share) * k, 0)
                    dshare += tl.sum(g * (a - k * s), 0)
                    g *= share
                tl.store(dx + at, g.to(x.dtype.element_ty), mask=inside)
            else:
                tl.store(out + at, (u if APART else y).to(x.dtype.element_ty), mask=inside)
                tl.store(normed + at, (y * scaled).to(x.dtype.element_ty), mask=inside)
        if BACKWARD:
            mine = sums + tl.program_id(0) * 4 * D + d
            tl.store(mine, dm, mask=d < D)
            tl.store(mine + D, dm0, mask=d < D)
            tl.store(mine + 2 * D, ds, mask=d < D)
            tl.store(mine + 3 * D, dshare, mask=d < D)

    return enter_program

ENTER_BLOCK = 4

def launch_enter(inputs: Sequence, apart: bool, out: Tensor, normed: Tensor, programs: int,
                 *grads: Tensor | None) -> None:
    """Forward, into out and normed; or, with dx0_next, dx, dx0, dskip, sums, backward from what is there."""
    (T, D), backward = out.shape, bool(grads)
    enter_kernel()[(programs,)](*inputs, out, normed, *(grads or [None] * 5), T, D, EPS=NORM_EPS, APART=apart,
                                BLOCK=1 if backward else ENTER_BLOCK, WIDTH=power_of_2(D),
                                BACKWARD=backward, num_warps=1 if backward else 4)

@operator(lambda x, *rest: (torch.empty_like(x), torch.empty_like(x)))
def fused_enter(x: Tensor, x0: Tensor, mix: Tensor, depth: Tensor, apart: bool, skip: Tensor | None,
                scale: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two tensors of enter that are computed, in one pass."""
    out, normed, programs = torch.empty_like(x), torch.empty_like(x), -(-len(x) // ENTER_BLOCK)
    launch_enter((x, x0, mix, depth, skip, scale, gate), apart, out, normed, programs)
    return out, normed

@operator(lambda dout, dnormed, dx0_next, apart, inputs: (
    torch.empty_like(dout), dout.new_empty(0) if dx0_next is None else torch.empty_like(dout),
    dout.new_empty(0) if inputs[4] is None else torch.empty_like(dout),
    dout.new_empty(4, dout.size(1), dtype=torch.float32)))
def fused_enter_grad(dout: Tensor, dnormed: Tensor, dx0_next: Tensor | None, apart: bool,
                     inputs: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx0, dskip, the gradients of mix, scale and the gate's sigmoid (4, D)); empty what is not there.

    dx0_next is what later visits want of x0; None if nobody wants a gradient of it.
    """
    x, skip = inputs[0], inputs[4]
    programs = min(len(x), (12 if skip is None else 8) * multiprocessors(x))
    dx, dx0, dskip = (x.new_empty(0) if of is None else torch.empty_like(x) for of in (x, dx0_next, skip))
    sums = x.new_empty(programs, 4, x.size(1), dtype=torch.float32)
    launch_enter(inputs, apart, dout, dnormed, programs, dx0_next, dx, dx0, dskip, sums)
    return dx, dx0, dskip, (sums.new_ones(1, programs) @ sums.flatten(1)).view(4, -1)  # sum(0), but fast

class FusedEnter(torch.autograd.Function):
    """enter in one pass. x0 goes through, so that its gradient is added up in passing and not by itself."""

    @staticmethod
    def forward(ctx, x: Tensor, x0: Tensor, mix: Tensor, depth: Tensor, apart: bool,
                *skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.apart = apart
        ctx.save_for_backward(x, x0, mix, depth, *skip)
        return *fused_enter(x, x0, mix, depth, apart, *skip), x0.view_as(x0)

    @staticmethod
    def backward(ctx, dout: Tensor, dnormed: Tensor, dx0_next: Tensor) -> tuple[Tensor | None, ...]:
        _, _, mix, _, skip, _, gate = inputs = ctx.saved_tensors
        dx0_next = dx0_next if ctx.needs_input_grad[1] else None
        dx, dx0, dskip, sums = fused_enter_grad(dout, dnormed, dx0_next, ctx.apart, list(inputs))
        dmix, dscale, dshare = sums.to(mix.dtype).split((2, 1, 1))
        grads = dx, None if dx0_next is None else dx0, dmix, None, None
        if skip is None:
            return *grads, None, None, None
        return *grads, dskip, dscale[0], torch.ops.aten.sigmoid_backward(dshare[0], gate.sigmoid())

# Head     logits = x embed', z = softcap tanh(logits / softcap), nll = log sum exp z - z[target]
# The kernel writes the gradient of its nll over the logits of a row: as the nll of a row is multiplied by one
# number only, so are the row's gradients, and that factor joins x and dx, which are 16 times smaller.

def softcapped_nll(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """(T, V), (T,) -> (T,) fp32. As z stays below softcap, a sum of exponentials needs no maximum."""
    z = softcap * torch.tanh(logits.float() / softcap)
    hit = targets[:, None] == torch.arange(logits.size(1), device=logits.device)
    nll = softcap + (z - softcap).exp().sum(-1).log() - z.where(hit, 0.0).sum(-1)
    return nll.where(targets != IGNORE, 0.0)

@functools.cache
def nll_kernel():
    """A program takes a row; WIDTH is V or the next power of two."""
    triton, tl = tool("triton"), tool("triton.language")

    @triton.jit
    def nll_program(logits, targets, nll, V, SOFTCAP: tl.constexpr, WIDTH: tl.constexpr):
        v, target = tl.arange(0, WIDTH), tl.load(targets + tl.program_id(0))
        row = logits + tl.program_id(0).to(tl.int64) * V + v
        share = 1 / (1 + tl.exp(tl.load(row, mask=v < V, other=0.0).to(tl.float32) * (-2 / SOFTCAP)))
        z = 2 * SOFTCAP * (share - 1)  # less softcap, since tanh(x) = 2 sigmoid(2x) - 1
        p = tl.where(v < V, tl.exp(z), 0.0)
        total, hit, counts = tl.sum(p, 0), v == target, tl.where(target >= 0, 1.0, 0.0)
        tl.store(nll + tl.program_id(0), counts * (tl.log(total) - tl.sum(tl.where(hit, z, 0.0), 0)))
        grad = (p * (counts / total) - tl.where(hit, counts, 0.0)) * (4 * share * (1 - share))
        tl.store(row, grad.to(logits.dtype.element_ty), mask=v < V)

    return nll_program

@operator(lambda x, embed, targets, softcap: (x.new_empty(x.size(0), dtype=torch.float32),
                                              x.new_empty(x.size(0), embed.size(0))))
def fused_nll(x: Tensor, embed: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """(nll (T,), its gradient with respect to the logits (T, V))"""
    logits, nll = F.linear(x, embed), x.new_empty(len(x), dtype=torch.float32)
    V = len(embed)
    nll_kernel()[(len(x),)](logits, targets, nll, V, SOFTCAP=softcap, WIDTH=power_of_2(V), num_warps=8)
    return nll, logits

class FusedHead(torch.autograd.Function):
    """softcapped_nll of x (T, D) times embed (V, D), by the kernel."""

    @staticmethod
    def forward(ctx, x: Tensor, embed: Tensor, targets: Tensor, softcap: float) -> Tensor:
        nll, dlogits = fused_nll(x, embed, targets, softcap)
        ctx.save_for_backward(x, embed, dlogits)
        return nll

    @staticmethod
    def backward(ctx, dnll: Tensor) -> tuple[Tensor | None, ...]:
        x, embed, dlogits = ctx.saved_tensors
        weighted = lambda t: (t * dnll[:, None]).to(x.dtype)
        return weighted(dlogits @ embed), dlogits.T @ weighted(x), None, None

# ---- Model -------------------------------------------------------------------------------------------------
# Weights live in banks: one tensor stacks a matrix over all layers, so that Muon shards it over ranks and EMA
# and collectives touch 13 tensors. A Layer is views into the banks in compute dtype; a Plan is the order of
# visits to layers; a tap sees or changes what linears compute: by it, calibration and test-time training use
# this same forward.

class Plan(NamedTuple):
    """Order of visits. One of the encoder leaves a skip; one of the decoder takes the latest that is left."""
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

def depth_plan(cfg: Config, looped: bool) -> Plan:
    """All layers in order; looped, with the middle ones again: 0 1 2 3 4 5 3 4 | 5 3 4 5 6 7 8 9 10."""
    order = list(range(cfg.num_layers))
    if looped:
        order[cfg.loop_start : cfg.loop_end + 1] *= cfg.num_loops + 1
    half = len(order) // 2
    return Plan(tuple(order[:half]), tuple(order[half:]))

class Layer(NamedTuple):
    """The weights of one layer."""
    qkv: Tensor  # (D + 2KE, D)
    o: Tensor  # (D, D), times attn_scale
    up: Tensor  # (M, D)
    down: Tensor  # (D, M), times mlp_scale
    q_gain: Tensor  # (H,)
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    resid_mix: Tensor  # (2, D) of the stream and of the embedding, on entry
    lane_keep: Tensor  # (2,) how much each lane keeps of itself
    lane_post: Tensor  # (2, 2) [attention or MLP, lane]: how much of each a lane takes up
    depth_scale: Tensor  # () 1/sqrt(layer + 1): deeper layers see smaller inputs

class Skip(NamedTuple):
    """A U-net connection, as a visit of the decoder takes it up; or none."""
    x: Tensor | None = None  # (T, D) what the mirrored visit of the encoder left
    scale: Tensor | None = None  # (D,)
    gate: Tensor | None = None  # (D,)

class Context(NamedTuple):
    """What all visits of one forward share."""
    cfg: Config
    attend: Callable
    fused: bool
    cos: Tensor  # (longest, 1, rope_dims / 2)
    sin: Tensor
    seqs: Seqs

def untapped(site: str, x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
    """What a tap puts in place of: sees input and output of a site, returns the output to go on with."""
    return y

def attention(x: Tensor, w: Layer, see: Callable, ctx: Context) -> Tensor:
    """Attention sublayer (T, D) -> (T, D), times its residual scale."""
    split, exclude = (fused_heads, fused_exclude) if ctx.fused else (split_heads, exclude_self)
    qkv = see("qkv", x, F.linear(x, w.qkv))
    q, k, v, own = split(qkv, w.q_gain, ctx.cos, ctx.sin, ctx.seqs.positions, ctx.cfg.num_kv_heads)
    y = exclude(ctx.attend(q, k, v, ctx.seqs), own).flatten(1)
    return see("attn", x, see("o", y, F.linear(y, w.o)), w.attn_scale)

def mlp(x: Tensor, a: Tensor | None, w: Layer, see: Callable, ctx: Context) -> Tensor:
    """Add the MLP sublayer, times its residual scale, to x + a (T, D); without a, return it alone."""
    if ctx.fused:
        y, normed = FusedMLP.apply(x, a, w.up, w.down, w.depth_scale)
    else:  # mlp_reference, for taps to see inside
        x = x if a is None else x + a
        normed = (norm(x) * w.depth_scale).to(x.dtype)
        hidden = activation(see("up", normed, F.linear(normed, w.up)))
        y = see("down", hidden, F.linear(hidden, w.down))
        y = y if a is None else x + y
    return see("mlp", normed, y, w.mlp_scale)

def block(x: Tensor, lane: Tensor | None, x0: Tensor, skip: Skip, w: Layer, see: Callable,
          ctx: Context) -> tuple[Tensor, Tensor | None, Tensor]:
    """One visit of a layer. `lane` is the MLP's stream once the lanes have parted; returns x, lane and x0."""
    go = FusedEnter.apply if ctx.fused else enter
    x, normed, x0 = go(x, x0, w.resid_mix, w.depth_scale, lane is not None, *skip)
    a = attention(normed, w, see, ctx)
    if lane is None:  # the MLP reads what attention wrote
        return mlp(x, a, w, see, ctx), None, x0
    m = mlp(lane, None, w, see, ctx)  # each reads one, writes to both
    return (w.lane_keep[0] * x + w.lane_post[0, 0] * a + w.lane_post[1, 0] * m,
            w.lane_keep[1] * lane + w.lane_post[0, 1] * a + w.lane_post[1, 1] * m, x0)

def head(x: Tensor, lane: Tensor | None, embed: Tensor, targets: Tensor, see: Callable,
         ctx: Context) -> Tensor:
    """Negative log-likelihood of each target (T,), fp32, under a normalised distribution; 0 for IGNORE."""
    x = norm(x if lane is None else 0.5 * (x + lane)).to(x.dtype)
    if ctx.fused and see is untapped:
        return FusedHead.apply(x, embed, targets, ctx.cfg.logit_softcap)
    return softcapped_nll(see("head", x, F.linear(x, embed)), targets, ctx.cfg.logit_softcap)

def start(embedded: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What enters the first layer, twice: as x and, in memory of its own, as x0."""
    x = norm(embedded).to(dtype)
    return x, x.clone()

def cast_banks(qo: Tensor, kv: Tensor, up: Tensor, down: Tensor, attn_scale: Tensor, mlp_scale: Tensor,
               dtype: torch.dtype) -> list[Tensor]:
    """The banks as products want them: [qkv, o, up, down], the residual scales multiplied in."""
    (q, o), (k, v) = qo.chunk(2), kv.chunk(2)
    return [torch.cat([p.to(dtype) for p in (q, k, v)], dim=1), (o * attn_scale[:, :, None]).to(dtype),
            up.to(dtype), (down * mlp_scale[:, :, None]).to(dtype)]

def adamw_(tensors: list[Tensor], live: list[Tensor], grads: Sequence[Tensor], second_moments: list[Tensor],
           started: Tensor, lr: float, decay: float, beta2: float) -> None:
    """AdamW without a first moment, in place; second moments are yet to be divided by `started`."""
    for t, seen, grad, moment in zip(tensors, live, grads, second_moments):
        moment.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        t.mul_(1 - lr * decay).addcdiv_(grad, (moment / started).sqrt() + 1e-10, value=-lr)
        seen.copy_(t)

class Ops(NamedTuple):
    """The functions that do the work of a forward. As they stand here they run anywhere."""
    attend: Callable = sdpa_attention
    fused: bool = False  # kernels in place of PyTorch; taps then do not see inside the MLP
    cast: Callable = cast_banks
    start: Callable = start
    block: Callable = block
    head: Callable = head
    update: Callable = adamw_  # of adapters

    @classmethod
    def choose(cls, cfg: Config, device: torch.device) -> "Ops":
        """The fastest that this machine has, not compiled."""
        widths = cfg.vocab_size, cfg.model_dim, cfg.kv_dim, cfg.head_dim, cfg.mlp_dim, cfg.ttt_lora_rank
        if device.type == "cuda" and any(width % 8 for width in widths):
            raise UserError("VOCAB_SIZE, MODEL_DIM, NUM_HEADS, NUM_KV_HEADS, MLP_MULT and TTT_LORA_RANK give "
                            f"widths {widths}: a GPU wants multiples of 8")
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        fits = cfg.head_dim & (cfg.head_dim - 1) == 0  # the kernels' heads are powers of 2 wide
        return cls(choose_attention(cfg.attention, device),
                   fused=hopper and fits and importlib.util.find_spec("triton") is not None)

    @property
    def compilable(self) -> bool:
        return self.attend is not sdpa_attention

    def compiled(self, any_length: bool = False) -> "Ops":
        """Parts compiled one by one, as 17 visits make only 5 graphs; for one T, or for any."""
        if not self.compilable:
            return self
        torch._dynamo.config.recompile_limit = 64
        run_cast, run_start, run_block, run_head = (
            torch.compile(f, fullgraph=True, dynamic=None if any_length else False)
            for f in (cast_banks, start, block, head))
        if not any_length:
            return self._replace(cast=run_cast, start=run_start, block=run_block, head=run_head)
        free = lambda *tensors: [torch._dynamo.maybe_mark_dynamic(t, 0) for t in tensors if t is not None]

        def block_of_any_length(x, lane, x0, skip, w, see, ctx):
            free(x, lane, x0, skip.x, ctx.seqs.positions)
            return *run_block(x, lane, x0, skip, w, see, ctx)[:2], x0  # itself, as the compiler's is a view

        def head_of_any_length(x, lane, embed, targets, see, ctx):
            free(x, lane, targets)
            return run_head(x, lane, embed, targets, see, ctx)

        update = torch.compile(adamw_, fullgraph=True, dynamic=False)
        return self._replace(block=block_of_any_length, head=head_of_any_length, update=update)

def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32

class GPT(nn.Module):
    """The network. Parameters are fp32; a forward computes in bf16 on a GPU, in fp32 on a CPU."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        L, D, M, KV = cfg.num_layers, cfg.model_dim, cfg.mlp_dim, cfg.kv_dim
        bank = lambda *shape: nn.Parameter(torch.empty(shape))
        self.embed = bank(cfg.vocab_size, D)  # tied: also the output projection
        self.qo_bank, self.kv_bank = bank(2 * L, D, D), bank(2 * L, KV, D)  # all q, then all o; k, then v
        self.up_bank, self.down_bank = bank(L, M, D), bank(L, D, M)
        self.q_gain, self.attn_scale, self.mlp_scale = bank(L, cfg.num_heads), bank(L, D), bank(L, D)
        self.resid_mix, self.lane_keep, self.lane_post = bank(L, 2, D), bank(L, 2), bank(L, 2, 2)
        skips = len(depth_plan(cfg, looped=True).encoder)
        self.skip_scale, self.skip_gate = bank(skips, D), bank(skips, D)  # row: visit of the decoder
        longest = max(cfg.train_seq_len, cfg.eval_seq_len, cfg.ttt_eval_seq_len)
        freq = cfg.rope_base ** -(torch.arange(0, cfg.rope_dims, 2, dtype=torch.float64) / cfg.rope_dims)
        angle = torch.outer(torch.arange(longest, dtype=torch.float64), freq)[:, None]
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.register_buffer("depth_scale", torch.arange(1.0, L + 1).rsqrt(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """All initial values; every sublayer starts by adding nothing, as its output projection is zero.

        embed  N(0, tied_embed_init_std)    q k v up  orthogonal    o down  0    q_gain  qk_gain_init
        attn_scale mlp_scale skip_scale lane_post  1    resid_mix  1, 0    lane_keep  1.1    skip_gate  0
        """
        generator = torch.Generator().manual_seed(self.cfg.seed)
        self.embed.normal_(std=self.cfg.tied_embed_init_std, generator=generator)
        for name, matrix in self.named_matrices():
            if name.endswith((".o", ".down")):
                matrix.zero_()
            else:
                nn.init.orthogonal_(matrix, generator=generator)
        for ones in (self.attn_scale, self.mlp_scale, self.skip_scale, self.lane_post):
            ones.fill_(1.0)
        self.q_gain.fill_(self.cfg.qk_gain_init)
        self.resid_mix.copy_(torch.tensor([1.0, 0.0])[:, None])
        self.lane_keep.fill_(1.1)
        self.skip_gate.zero_()

    def named_matrices(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of every matrix of the layers; this and `layers` are what knows the banks' layout."""
        (q, o), (k, v) = self.qo_bank.chunk(2), self.kv_bank.chunk(2)
        for i in range(self.cfg.num_layers):
            for name, bank in dict(q=q, k=k, v=v, o=o, up=self.up_bank, down=self.down_bank).items():
                yield f"{i}.{name}", bank[i]

    def layers(self, dtype: torch.dtype, ops: Ops) -> list[Layer]:
        """Views of all layers. Banks are cast and unbound once: the gradient of an index is a whole bank."""
        stacks = ops.cast(self.qo_bank, self.kv_bank, self.up_bank, self.down_bank, self.attn_scale,
                          self.mlp_scale, dtype)
        stacks += [p.to(dtype) for p in (self.q_gain, self.attn_scale, self.mlp_scale, self.resid_mix,
                                         self.lane_keep, self.lane_post)]
        return [Layer(*views) for views in zip(*(stack.unbind(0) for stack in (*stacks, self.depth_scale)))]

    def forward(self, batch: Batch, plan: Plan, ops: Ops = Ops(), tap: Callable | None = None) -> Tensor:
        """Negative log-likelihood of every target, (T,) fp32.

        Training averages it, evaluation scores it, test-time training does first this and then that. A tap is
        called as tap(visit, layer), -1 for the head, and returns what takes the place of `untapped` there.
        """
        cfg, dtype = self.cfg, compute_dtype(self.embed.device)
        see = tap or (lambda visit, layer: untapped)
        embedded = see(-1, -1)("start", batch.tokens, F.embedding(batch.tokens, self.embed))
        x, x0 = ops.start(embedded, dtype)
        ctx = Context(cfg, ops.attend, ops.fused, self.cos, self.sin, batch.seqs)
        layers = self.layers(dtype, ops)
        merges = list(zip(self.skip_scale.to(dtype).unbind(0), self.skip_gate.to(dtype).unbind(0)))
        skips, lane = [], None
        for visit, i in enumerate(plan.encoder + plan.decoder):
            j = visit - len(plan.encoder)  # visit of the decoder; negative in the encoder
            if j >= 0 and i >= cfg.parallel_start_layer and lane is None:
                lane = x  # the lanes part before the skip is merged: skips feed the attention lane only
            skip = Skip(skips.pop(), *merges[j]) if j >= 0 and skips else Skip()
            x, lane, x0 = ops.block(x, lane, x0, skip, layers[i], see(visit, i), ctx)
            if j < 0:
                skips.append(x if visit + 1 < len(plan.encoder) else x.clone())  # it is x there, too
        return ops.head(x, lane, self.embed.to(dtype), batch.targets, see(-1, -1), ctx)

# ---- Taps: calibration and test-time training --------------------------------------------------------------

def calibration_tap(hessians: dict[str, Tensor], fishers: dict[str, Tensor]) -> Callable:
    """Adds up over tokens, all visits of a layer together, what quantization wants to know; plain Ops only.

    Without gradients H = sum of x x' over the inputs x of each matrix: "3.qkv" (q, k and v have one input),
    "3.o", "3.up", "3.down", and "embed" for the tied head. With gradients g of its outputs, on their way
    back: sum of g^2, by output; and as "start", by row of the embedding, that of what is looked up there.
    """
    names = {"qkv": "{}.qkv", "o": "{}.o", "up": "{}.up", "down": "{}.down", "head": "embed",
             "start": "start"}

    def tap(visit: int, layer: int) -> Callable:
        def see(site: str, x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
            if site not in names:
                return y
            name = names[site].format(layer)
            if y.requires_grad:
                def add(g: Tensor) -> None:
                    g, sums = g.float().square(), fishers[name]
                    sums.index_add_(0, x, g.sum(1)) if site == "start" else sums.add_(g.sum(0))
                y.register_hook(add)
            elif site != "start":
                x = x.float()
                if name not in hessians:
                    hessians[name] = x.new_zeros(x.size(1), x.size(1))
                    fishers[name] = x.new_zeros(y.size(1))
                hessians[name].addmm_(x.T, x)
            return y
        return see

    return tap

def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """(T, in), (slots, in, out) -> (T, out): rows to ends[0] by the first matrix, to ends[1] by the next."""
    if x.is_cuda:
        return getattr(F, "grouped_mm", torch._grouped_mm)(x, weights, offs=ends)
    bounds = [0] + ends.tolist()
    return torch.cat([x[lo:hi] @ w for lo, hi, w in zip(bounds, bounds[1:], weights) if hi > lo])

SITES = {"qkv": ("q", "k", "v"), "attn": ("attn",), "mlp": ("mlp",), "head": ("head",)}  # and their adapters

class AdapterSight(NamedTuple):
    """Adds B A x to what a site computes; the rows of x belong to the slots, in order."""
    adapters: dict[str, tuple[Tensor, Tensor]]  # A (slots, rank, in), B (slots, out, rank)
    ends: Tensor  # (slots,) int32, where each slot's rows end

    def __call__(self, site: str, x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
        pairs = [self.adapters[name] for name in SITES.get(site, ()) if name in self.adapters]
        if not pairs:
            return y
        add = [grouped_linear(grouped_linear(x, A.mT, self.ends), B.mT, self.ends) for A, B in pairs]
        add = torch.cat(add, dim=-1) if len(add) > 1 else add[0]
        return y + (add if scale is None else scale * add)

class Adapters:
    """Low-rank adapters and their AdamW state for as many documents as there are slots, all independent.

    They are named after what they span, by TTT_SITES: q, k, v; attn and mlp (whole sublayers, fed their
    normalised input); head. A[site] (visits, slots, rank, in) starts from a draw that follows from SEED
    alone, the same for each document; B[site] (visits, slots, out, rank) from zero. Forwards see `live`, in
    bf16 on a GPU. Beta 1 is 0, so there is no first moment.
    """

    def __init__(self, cfg: Config, visits: int, device: torch.device):
        self.cfg, slots, rank, D = cfg, cfg.ttt_batch_size, cfg.ttt_lora_rank, cfg.model_dim
        outs = {"q": D, "k": cfg.kv_dim, "v": cfg.kv_dim, "attn": D, "mlp": D, "head": cfg.vocab_size}
        generator = torch.Generator().manual_seed(cfg.seed)
        draws = {site: torch.empty(1 if site == "head" else visits, 1, rank, D).uniform_(
            -(D**-0.5), D**-0.5, generator=generator).to(device) for site in outs}
        self.draw = {name: draws[name] for site in cfg.ttt_sites.split(",") for name in SITES[site]}
        self.A = {site: a.new_empty(len(a), slots, rank, D) for site, a in self.draw.items()}
        self.B = {site: a.new_empty(len(a), slots, outs[site], rank) for site, a in self.draw.items()}
        self.tensors = [*self.A.values(), *self.B.values()]
        self.second_moments = [torch.empty_like(t) for t in self.tensors]
        self.live = [t.to(compute_dtype(device), copy=True).requires_grad_() for t in self.tensors]
        self.updates = torch.zeros(slots, device=device)
        self.recorded: dict[int, tuple] = {}  # rounds as CUDA graphs, by number of positions
        if device.type == "cuda":
            self.pool, self.played = torch.cuda.graph_pool_handle(), torch.cuda.Event()
        self.enter(range(slots))

    @torch.no_grad()
    def enter(self, slots: Iterable[int]) -> None:
        """Make slots as new: of the documents that were there nothing stays."""
        if not (slots := list(slots)):
            return
        slots = to_device(torch.tensor(slots, dtype=torch.long), self.updates.device)
        for site, draw in self.draw.items():
            self.A[site][:, slots] = draw
            self.B[site][:, slots] = 0
        for tensor, live, moment in zip(self.tensors, self.live, self.second_moments):
            live[:, slots] = tensor[:, slots].to(live.dtype)
            moment[:, slots] = 0
        self.updates[slots] = 0

    def tap(self, ends: Tensor) -> Callable:
        """The tap of one forward, whose rows belong to slots as `ends` says."""
        As, Bs = self.live[: len(self.A)], self.live[len(self.A) :]
        pairs = {site: list(zip(A.unbind(0), B.unbind(0))) for site, A, B in zip(self.A, As, Bs)}
        at = lambda visit, sites: AdapterSight({site: pairs[site][visit] for site in sites}, ends)
        head, inner = [site for site in pairs if site == "head"], [site for site in pairs if site != "head"]
        return lambda visit, layer: at(0, head) if visit < 0 else at(visit, inner)

    def learn(self, loss: Tensor, update: Callable = adamw_) -> None:
        """One AdamW step on the sum of the documents' losses, of which each moves its own adapters only."""
        grads, cfg = torch.autograd.grad(loss, self.live), self.cfg
        with torch.no_grad():
            self.updates += 1
            started = 1 - cfg.ttt_beta2**self.updates  # by document: the second moment began at zero
            update(self.tensors, self.live, grads, self.second_moments, started[:, None, None],
                   cfg.ttt_lora_lr, cfg.ttt_weight_decay, cfg.ttt_beta2)

# ---- Optimizers --------------------------------------------------------------------------------------------

def orthogonalize(G: Tensor, steps: int) -> Tensor:
    """Newton-Schulz: bring the singular values of each matrix of a bank into .68 .. 1.13, in G's dtype.

    https://kellerjordan.github.io/posts/muon/; these coefficients give up convergence to 1 for speed near 0.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X

@dataclasses.dataclass
class Shard:
    """Communication buffers of one bank, in the dtype that travels."""
    full: Tensor  # (world * rows, ...) the gradient on its way out, the update on its way back
    mine: Tensor  # (rows, ...) this rank's share of the reduced gradient; a lone rank's is all of `full`
    pending: Any = None  # the collective under way

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None

class Muon(torch.optim.Optimizer):
    """Momentum, equal row norms, orthogonalization, for banks of matrices stacked along dim 0.

    Every rank owns a contiguous slice of each bank. A step has phases:
      1. send()  sends the gradient of a bank out (reduce-scatter, sum), while backward goes on
      2. step()  orthogonalizes the own slice of each bank and sends the update back (all-gather), while
                 the next bank is at work
      3. step()  applies the updates
    One rank owns all. Momentum is fp32 and in state_dict(); bf16 travels on a GPU, fp32 on a CPU.
    """

    def __init__(self, banks: list[nn.Parameter], ranks: Ranks, **defaults: float):
        super().__init__(sorted(banks, key=lambda p: -p.numel()), defaults)
        self.ranks, self.shards = ranks, {}
        for p in self.param_groups[0]["params"]:
            rows = -(-len(p) // ranks.world)  # the last ranks may own padding: zeros, whose update is zero
            full = p.new_zeros(ranks.world * rows, *p.shape[1:], dtype=compute_dtype(p.device))
            self.shards[p] = Shard(full, torch.zeros_like(full[:rows]) if ranks.world > 1 else full)
            self.state[p]["momentum"] = torch.zeros_like(full[:rows], dtype=torch.float32)

    @torch.no_grad()
    def send(self, p: Tensor) -> None:
        """Phase 1 of a bank whose gradient is whole; does nothing while that is on its way."""
        shard = self.shards[p]
        if shard.pending is not None:
            return
        shard.full[: len(p)] = p.grad
        if self.ranks.world > 1:
            shard.pending = dist.reduce_scatter_tensor(shard.mine, shard.full, async_op=True)

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Of this rank's slices of the reduced gradients."""
        for shard in self.shards.values():
            shard.wait()
        return torch.stack(torch._foreach_norm([s.mine.float() for s in self.shards.values()])).square().sum()

    @torch.no_grad()
    def step(self, grad_scale: Tensor | float = 1.0) -> None:
        """Phases 2 and 3, with gradients times grad_scale."""
        (group,) = self.param_groups
        for p, shard in self.shards.items():
            shard.wait()
            grad = shard.mine.float() * grad_scale
            momentum = self.state[p]["momentum"].mul_(group["momentum"]).add_(grad)
            update = grad + group["momentum"] * momentum  # Nesterov
            update = update / update.norm(dim=-1, keepdim=True).clamp(min=1e-7)
            update = orthogonalize(update.to(shard.full.dtype), group["backend_steps"])
            if self.ranks.world > 1:
                shard.pending = dist.all_gather_into_tensor(shard.full, update.contiguous(), async_op=True)
            else:
                shard.full.copy_(update)
        for p, shard in self.shards.items():
            shard.wait()
            tall = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard.full[: len(p)], alpha=-group["lr"] * tall)

class Optimizers:
    """Muon for the banks and AdamW for the rest, as one: reduce over ranks, clip by the global norm, step."""

    MUON = ("qo_bank", "kv_bank", "up_bank", "down_bank")
    EMBED = ("embed",)
    SCALARS = ("q_gain", "attn_scale", "mlp_scale", "resid_mix", "lane_keep", "lane_post", "skip_scale",
               "skip_gate")

    def __init__(self, model: GPT, ranks: Ranks, cfg: Config):
        parameters, assigned = dict(model.named_parameters()), self.MUON + self.EMBED + self.SCALARS
        if sorted(assigned) != sorted(parameters):
            raise ValueError(f"parameters without exactly one optimizer: {set(parameters) ^ set(assigned)}")
        tables = self.MUON, self.EMBED, self.SCALARS
        muon, embed, scalars = ([parameters[name] for name in names] for names in tables)
        self.cfg, self.ranks, self.replicated = cfg, ranks, embed + scalars
        self.muon = Muon(muon, ranks, lr=cfg.matrix_lr, momentum=cfg.muon_momentum, weight_decay=cfg.muon_wd,
                         backend_steps=cfg.muon_backend_steps)
        self.adamw = torch.optim.AdamW(
            [dict(params=embed, lr=cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
             dict(params=scalars, lr=cfg.scalar_lr, weight_decay=cfg.adam_wd)],
            betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=ranks.on_gpu)
        self.peaks = [group["lr"] for group in self.groups]

    @property
    def groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self, lr_scale: float, momentum: float) -> None:
        """Update from this rank's share of the gradients, then forget them."""
        for p in (*self.muon.shards, *self.replicated):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # of what this depth does not use
        for bank in self.muon.shards:
            self.muon.send(bank)
        grads = [p.grad.view(-1) for p in self.replicated]
        if self.ranks.world > 1:  # the small ones travel as one
            packed = self.ranks.sum_(torch.cat(grads))
            torch._foreach_copy_(grads, packed.split([len(grad) for grad in grads]))
        grad_scale = self.clip_scale(grads)
        torch._foreach_mul_(grads, grad_scale)
        for group, peak in zip(self.groups, self.peaks):
            group["lr"] = peak * lr_scale
        self.muon.param_groups[0]["momentum"] = momentum
        self.muon.step(grad_scale)
        self.adamw.step()
        self.zero_grad()

    def clip_scale(self, replicated: list[Tensor]) -> Tensor:
        """What brings the norm of the whole reduced gradient to grad_clip_norm at most; same on all ranks."""
        squares = self.ranks.sum_(self.muon.squared_norm())
        total = (squares + torch.stack(torch._foreach_norm(replicated)).square().sum()).sqrt()
        limit = self.cfg.grad_clip_norm or math.inf
        return (limit / (total + 1e-6)).clamp(max=1.0)

    def zero_grad(self) -> None:
        """Forget all gradients, also those that are on their way."""
        self.muon.zero_grad()
        self.adamw.zero_grad()
        for shard in self.muon.shards.values():
            shard.wait()

class Ema:
    """Exponential moving average of all weights, which is what gets exported.

    The decay climbs as (t + 1) / (t + 18), the average of the last 1/17 of any run, up to ema_decay, which it
    reaches where the record ends. From the start, .9965 would be far too slow for a short run.
    """

    def __init__(self, model: GPT, decay: float):
        self.decay, self.steps, self.weights = decay, 0, [p.detach() for p in model.parameters()]
        self.average = [weight.clone() for weight in self.weights]

    def update(self) -> None:
        decay = min(self.decay, (self.steps + 1) / (self.steps + 18))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)
        self.steps += 1

    def copy_to_model(self) -> None:
        torch._foreach_copy_(self.weights, self.average)

# ---- Training ----------------------------------------------------------------------------------------------

def lr_scale(progress: float, cfg: Config) -> float:
    """Learning rates over their peaks: 1, then linear towards 0 in the last warmdown_frac, down to min_lr."""
    return 1.0 if progress < 1 - cfg.warmdown_frac else max((1 - progress) / cfg.warmdown_frac, cfg.min_lr)

def muon_momentum(step: int, progress: float, cfg: Config) -> float:
    """A linear ramp of muon_momentum_warmup_steps or, if that is sooner, over the first .31 of the run."""
    warm = min(1.0, max(step / max(1, cfg.muon_momentum_warmup_steps), progress / 0.31))
    return cfg.muon_momentum_warmup_start + (cfg.muon_momentum - cfg.muon_momentum_warmup_start) * warm

def split_step(cfg: Config, world: int) -> tuple[int, int]:
    """(buffers that a rank computes in a step, tokens of a buffer). UserError if ranks cannot share a step.

    A buffer is an eighth of a step where ranks divide 8, so that 1, 2, 4 and 8 of them see the same data.
    """
    if cfg.train_batch_tokens % world:
        fits = ", ".join(str(n) for n in range(1, 65) if cfg.train_batch_tokens % n == 0)
        raise UserError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} cannot be shared by {world} ranks: "
                        f"--nproc_per_node times --nnodes may be {fits}")
    share = cfg.train_batch_tokens // world
    count = next(n for n in range(-(-BUFFERS_PER_STEP // world), share + 1) if share % n == 0)
    if share // count < cfg.train_seq_len:
        raise UserError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} gives {world} ranks buffers of "
                        f"{share // count} tokens, less than TRAIN_SEQ_LEN={cfg.train_seq_len}")
    return count, share // count

@contextlib.contextmanager
def preserved(model: GPT, optimizers: Optimizers) -> Iterator[None]:
    """Put weights, optimizer state and random state back, bitwise, at the end of the block."""
    parts = model, optimizers.muon, optimizers.adamw
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    with torch.random.fork_rng([torch.cuda.current_device()] if optimizers.ranks.on_gpu else []):
        yield
    for part, state in zip(parts, states):
        part.load_state_dict(state)
    optimizers.zero_grad()

class Trainer:
    """The model of a run with its optimizers and its data, and the loop over them."""

    def __init__(self, run: Run, model: GPT, loader: PackedLoader):
        self.run, self.model, self.loader = run, model, loader
        self.cfg, self.ranks, self.log = run.cfg, run.ranks, run.log
        self.local_buffers, _ = split_step(run.cfg, run.ranks.world)
        self.optimizers = Optimizers(model, run.ranks, run.cfg)
        self.ops = run.ops.compiled()
        self.plans = [depth_plan(run.cfg, looped) for looped in (False, True)]
        self.steps = 0

    def step(self, batches: Iterable[Batch], plan: Plan, scale: float, momentum: float) -> Tensor:
        """One optimizer step; returns this rank's share of its mean loss, (), still on the device."""
        loss = torch.zeros((), device=self.ranks.device)
        for left, batch in zip(reversed(range(self.local_buffers)), batches):
            nll = self.model(batch, plan, self.ops)
            count = (batch.targets != IGNORE).sum().clamp(min=1)
            share = nll.sum() / count / (self.local_buffers * self.ranks.world)
            last = left == 0 and self.ranks.world > 1
            with contextlib.ExitStack() as hooks:
                for bank in self.optimizers.muon.shards if last else ():  # leaves as soon as it is whole
                    hooks.enter_context(bank.register_post_accumulate_grad_hook(self.optimizers.muon.send))
                share.backward()  # shares add up to the mean over all buffers of all ranks
            loss += share.detach()
        self.optimizers.step(scale, momentum)
        return loss

    def warm_up(self) -> None:
        """Compile and run both loop forms on random tokens, and leave no trace of it."""
        cfg, loader, rng = self.cfg, self.loader, np.random.default_rng(0)
        tokens = rng.integers(0, cfg.vocab_size, loader.buffer_tokens + 1)
        bounds = span_bounds(np.arange(0, loader.buffer_tokens, 600), loader.buffer_tokens, cfg.train_seq_len)
        batch = make_batch(tokens[:-1], tokens[1:], bounds, loader.max_spans, cfg.train_seq_len)
        batch = to_device(batch, self.ranks.device)
        with preserved(self.model, self.optimizers):
            for plan in self.plans if cfg.loops_at_end else self.plans[:1]:
                for _ in range(cfg.warmup_steps):
                    self.step([batch] * self.local_buffers, plan, 1.0, cfg.muon_momentum)

    def own_buffers(self) -> Iterator[int]:
        """Numbers of the buffers that this rank computes, step after step."""
        return itertools.count(self.ranks.rank, self.ranks.world)

    def train(self, validate: Callable[[Plan], "Score"]) -> None:
        """Step until the training clock less its reserve is spent, or `iterations` done; leave the average.

        All ranks go by the largest of their clocks, so learning rates agree and all stop together. It stands
        still during `validate`, the plain score of now. The host is two steps ahead of the GPU at most.
        """
        cfg, ranks, log = self.cfg, self.ranks, self.log
        budget = cfg.max_wallclock_seconds and cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
        batches = self.loader.buffers(self.own_buffers(), ranks.device)
        ema, records, marks, looped = Ema(self.model, cfg.ema_decay), [], deque(), False
        with log.phase("train", "training") as phase:
            while True:
                if len(marks) == 2:
                    marks.popleft().synchronize()
                seconds = ranks.max(phase.elapsed())
                progress = max(self.steps / cfg.iterations, seconds / budget if budget else 0.0)
                ahead = (1 + len(marks)) * seconds / max(1, self.steps)  # of the clock, once one more is sent
                done = progress >= 1 or 0 < budget < seconds + ahead
                if records and (done or self.steps <= 3 or self.steps % cfg.train_log_every == 0):
                    self.report(records, seconds, progress)
                    records = []
                every = self.steps and cfg.val_loss_every
                if every and (done or self.steps % every == 0):
                    self.ranks.synchronize()  # what was sent before belongs to training
                    since = time.perf_counter()
                    current = validate(self.plans[looped])
                    log(f"step:{self.steps}/{cfg.iterations} {current}")
                    log.metrics("validation", step=self.steps, val_loss=current.loss, val_bpb=current.bpb)
                    phase.began += time.perf_counter() - since
                if done:
                    break
                if not looped and cfg.num_loops and progress >= cfg.enable_looping_at:
                    looped = True
                    log(f"layer_loop:enabled step:{self.steps} frac:{progress:.3f}")
                scale, momentum = lr_scale(progress, cfg), muon_momentum(self.steps, progress, cfg)
                share = itertools.islice(batches, self.local_buffers)
                loss = self.step(share, self.plans[looped], scale, momentum)
                ema.update()
                self.steps += 1
                records.append(dict(step=self.steps, loss=loss, seconds=seconds, lr=scale, looped=looped))
                if ranks.on_gpu:
                    marks.append(torch.cuda.current_stream().record_event())
            ema.copy_to_model()

    def report(self, records: list[dict], seconds: float, progress: float) -> None:
        """Log the latest step, and all since the last report to metrics.jsonl; losses are over all ranks."""
        losses = self.ranks.sum_(torch.stack([record["loss"] for record in records])).tolist()
        if not all(map(math.isfinite, losses)):
            raise UserError(f"train_loss is {losses[-1]} at step {self.steps}, training diverged: lower "
                            "MATRIX_LR, TIED_EMBED_LR or SCALAR_LR")
        for record, loss in zip(records, losses):
            self.log.metrics("step", **{**record, "loss": loss})
        progress = min(progress, 1.0)
        speed = len(records) * self.cfg.train_batch_tokens / max(seconds - records[0]["seconds"], 1e-9)
        self.log(f"step:{self.steps}/{self.cfg.iterations} train_loss:{losses[-1]:.4f} "
                 f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / self.steps:.2f}ms "
                 f"tok/s:{speed:.0f} done:{progress:.1%} eta:{seconds / progress - seconds:.0f}s")

class Calibration(NamedTuple):
    """Sums over calibration tokens, which say what an error in a weight costs; see calibration_tap."""
    hessians: dict[str, Tensor]  # (in, in)
    fishers: dict[str, Tensor]  # (out,), and "start": (vocab_size,)

@torch.no_grad()
def calibrate(run: Run, model: GPT, loader: PackedLoader, first: int) -> Calibration:
    """Statistics of gptq_calibration_batches training buffers from `first` on, gradients of a quarter each.

    Buffers are dealt to ranks and sums added up, so the number of ranks does not matter. Freezes the model.
    """
    cfg, ranks, plan = run.cfg, run.ranks, depth_plan(run.cfg, run.cfg.loops_at_end)
    found = Calibration({}, {"start": model.embed.new_zeros(cfg.vocab_size)})
    plain, tap = run.ops._replace(fused=False), calibration_tap(*found)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 holds bf16 inputs exactly and sums in fp32
    own = list(range(first + ranks.rank, first + cfg.gptq_calibration_batches, ranks.world))
    model.requires_grad_(False).embed.requires_grad_()  # for gradients to go all the way
    for batch in loader.buffers(iter(own or [first]), ranks.device):  # without any, one to know the shapes
        model(batch, plan, plain, tap=tap)
        with torch.enable_grad():
            nll = model(first_part(batch, -(-len(batch.tokens) // 4)), plan, plain, tap=tap)
            torch.autograd.grad(nll.sum(), model.embed)
    model.embed.requires_grad_(False)
    torch.set_float32_matmul_precision(precision)
    for sums in found:
        for name, value in sums.items():
            sums[name] = ranks.sum_(value if own else value.zero_())
    if not all(value.isfinite().all() for sums in found for value in sums.values()):
        raise UserError("not all activations and gradients are finite after training: lower MATRIX_LR")
    return found

# ---- Quantization and the artifact -------------------------------------------------------------------------
# A weight is (code + shift) * 2^(row / 8) * 2^(column / 8), shift 0 or 1/2. To second order an error costs
# in loss the square of its step times what its output's gradients (F, by row) and its input's energy (d, by
# column, of what GPTQ cannot move onto later columns) make of it; and bits fall by one as the step doubles.
# So a step is one number, the step of the run, over sqrt(F d): a bit then buys the same loss everywhere.
# (Rows of the embedding go by a root of that, and none by less than 1/4 of the common.) That number is
# searched until the artifact meets the cap.
#
# Shifts cost no bytes: along a row they follow from which codes were odd before, by a convolutional code
# (trellis-coded quantization, https://doi.org/10.1109/26.46532). The best sequence of codes is searched; its
# errors cost a quarter less, at the same length, than those of codes rounded one by one.
#
# Codes are nearly Gaussian, of a width that follows from row and column: by it they are sorted into contexts,
# each coded by a range coder with the counts of its codes. First whether each is odd, which tells the shifts;
# then, given both, the rest.
#
# The artifact is a magic, the BLAKE2b digest of what follows, Brotli streams, each after its length, and
# after a length of 0 the range coder's words. The streams together hold a JSON header (settings; name, dtype,
# shape of tensors) after its length, then raw bytes.

ARTIFACT_MAGIC, DIGEST_BYTES = b"PGOLF003", 16
STREAM_BYTES = 1 << 18  # a stream ends with the tensor that fills it; streams are compressed in parallel
WIDTHS, TOP, TOLL = 64, 127, 1 / 15  # classes of width; largest code; see gptq, the square of its errors
# By number of states, the parity checks of shifts and of odd codes: https://doi.org/10.1109/TIT.1982.1056454
TRELLIS = {1: (0, 0), 4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24)}

def column_energies(H: Tensor) -> tuple[Tensor, Tensor]:
    """For GPTQ, of H (in, in), sum of x x' over inputs: (U, d).

    U (in, in), upper, is the Cholesky factor of the inverse of H, d (in,) 1 / its diagonal^2.
    """
    H = H + torch.diag((H.diagonal() == 0).float())
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    return U, U.diagonal() ** -2

def following(state: Any, odd: Any, states: int) -> Any:
    """The state of the trellis after a code. A code's shift is half the lowest bit of the state before it."""
    shifts, codes = TRELLIS[states]
    return (state >> 1) ^ (state & 1) * (shifts >> 1) ^ odd * (codes >> 1)

def gptq(W: Tensor, U: Tensor, states: int = 1, toll: float = 0, top: int = TOP, block: int = 128) -> Tensor:
    """Round W (..., out, in) column by column, moving the error of each onto later ones: code + shift, fp32.

    With one state to whole numbers of at most `top` (https://arxiv.org/abs/2210.17323). With more, the best
    way to each state is followed, with errors of its own; after every `block` columns the best of all is
    kept. U (..., in, in) as column_energies gives it, in units of W's columns. For its length a value pays
    `toll` times what an error of 1 costs, times its square over the mean square of its row and column.
    """
    W, made, odds = W.clone(), torch.empty_like(W), min(states, 2)
    every = torch.arange(states, device=W.device)
    lowest = (every[:, None] & 1) / 2 + every[:odds]  # (states, odds), even and odd; others are `odds` apart
    after = torch.stack([following(every, odd, states) for odd in range(odds)], dim=1)
    before = after.flatten().argsort(stable=True).view(states, odds)  # ways to a state: state * odds + odd
    square = W.square().mean(-1, keepdim=True).clamp(min=1e-6)
    toll = toll / (square * (W.square() / square).mean(-2, keepdim=True).clamp(min=1e-6))
    state = W.new_zeros(W.shape[:-1], dtype=torch.long)
    for lo in range(0, W.size(-1), block):
        hi = min(lo + block, W.size(-1))
        ways = W[..., None, lo:hi].repeat_interleave(states, dim=-2)  # (..., out, states, block)
        cost = torch.full_like(ways[..., 0], math.inf).scatter_(-1, state[..., None], 0.0)
        for j in range(lo, hi):
            due, u = ways[..., j - lo, None], U[..., j, j, None, None, None]
            value = lowest + odds * ((due - lowest) / odds).round().clamp(-(top // odds), top // odds)
            error = (due - value) / u
            paid = cost[..., None] + error.square() + toll[..., j, None, None] * (value / u).square()
            cost, which = paid.flatten(-2)[..., before].min(-1)
            chosen = before[every, which]
            ways = ways.gather(-2, (chosen // odds)[..., None].expand_as(ways))
            ways[..., j - lo :] -= (error.flatten(-2).gather(-1, chosen)[..., None]
                                    * U[..., None, None, j, j:hi])
        state = cost.argmin(-1)
        best = ways.gather(-2, state[..., None, None].expand_as(ways[..., :1, :])).squeeze(-2)
        made[..., lo:hi] = (2 * best).round() / 2
        errors = torch.linalg.solve_triangular(U[..., lo:hi, lo:hi], W[..., lo:hi] - made[..., lo:hi],
                                               upper=True, left=False)
        W[..., hi:] -= errors @ U[..., lo:hi, hi:]
    return made

def shifts(odd: np.ndarray, states: int) -> np.ndarray:
    """Which codes are odd, (out, in) uint8 of 0 and 1 -> which are shifted, likewise."""
    state, found = np.zeros(len(odd), dtype=np.uint8), np.empty_like(odd.T, order="C")
    for shifted, odd_ones in zip(found, np.ascontiguousarray(odd.T)):
        shifted[:] = state & 1
        state = following(state, odd_ones, states)
    return found.T

def octaves(x: Tensor, parts: int) -> Tensor:
    """Logarithm to base 2, in parts of an octave, as int8."""
    return (parts * x.log2()).round().clamp(-TOP, TOP).to(torch.int8)

class Quantizer:
    """Matrices of one shape, stacked as (n, out, in), with what GPTQ needs to know of them at any step."""

    def __init__(self, names: list[str], weights: list[Tensor], hessians: list[Tensor], fishers: list[Tensor],
                 looked_up: Tensor | None = None):
        self.names, found = names, [column_energies(H) for H in hessians]
        U, d = (torch.stack(part) for part in zip(*found))
        dead = torch.stack([H.diagonal() == 0 for H in hessians])
        mean = d.log2().mean(1, keepdim=True)
        self.columns = octaves((mean - d.log2()).exp2().sqrt(), 8)
        by_column = self.scale(self.columns)[:, None]
        self.W, self.U = torch.stack(weights).masked_fill(dead[:, None], 0) / by_column, U / by_column
        cost = torch.stack(fishers) * mean.exp2()
        if looked_up is not None:  # the embedding is read twice: as head and, by token, at the start
            cost = cost + looked_up
        common = cost.mean(1, keepdim=True)
        cost = cost.maximum(common / 16)  # few tokens tell of a rare one
        self.cost = cost.sqrt() if looked_up is None else (cost * common) ** 0.25  # (n, out): of an error
        self.phase = torch.arange(self.W.size(1), device=U.device) * 0.618 % 1
        self.finest = torch.ceil(8 * (self.W.abs().amax(2) / TOP).clamp(min=2.0**-15).log2())

    @staticmethod
    def scale(octaves: Tensor) -> Tensor:
        return (octaves.float() / 8).exp2()

    def width(self) -> Tensor:
        """(total,): for each matrix the sum over weights of log2 of what is left of it in steps of size 1."""
        spread = self.W.square().mean(2).sqrt() * self.cost
        return spread.clamp(min=1e-9).log2().sum() * self.W.size(2)

    def codes(self, step: float, states: int) -> dict[str, Tensor]:
        """NAME.codes, int16 (out, in), 2 (code + shift); NAME.rows, NAME.columns; what tells their width."""
        wanted = 8 * (step / self.cost).log2() + self.phase  # rounded by turns: the size has no jumps
        rows = wanted.floor().maximum(self.finest).clamp(-TOP, TOP).to(torch.int8)
        by_row, by_column = self.scale(rows)[:, :, None], self.scale(self.columns)[:, None]
        codes = gptq(self.W / by_row, self.U, states, TOLL)
        made = codes * by_row * by_column
        row_width = octaves(made.square().mean(2).sqrt().clamp(min=2.0**-31), 4)
        even = made / self.scale(2 * row_width.float())[:, :, None]
        column_width = octaves(even.square().mean(1).sqrt().clamp(min=2.0**-31), 4)
        parts = dict(codes=(2 * codes).to(torch.int16), rows=rows, columns=self.columns,
                     row_width=row_width, column_width=column_width)
        return {f"{name}.{kind}": values[i] for i, name in enumerate(self.names)
                for kind, values in parts.items()}

def coded(tensors: Iterable[str]) -> list[str]:
    return [name.removesuffix(".rows") for name in tensors if name.endswith(".rows")]  # names of matrices

@torch.no_grad()
def make_quantizers(run: Run, model: GPT, found: Calibration) -> tuple[list[Quantizer], dict[str, tuple]]:
    """Of this rank's matrices, those of one shape together; and of every matrix its owner and its shape."""
    matrices, groups = {"embed": model.embed, **dict(model.named_matrices())}, {}
    visits = sum(depth_plan(run.cfg, run.cfg.loops_at_end), ())
    owners = deal([W.numel() * W.size(1) for W in matrices.values()], run.ranks.world).tolist()
    for (name, W), owner in zip(matrices.items(), owners):
        if owner == run.ranks.rank:
            layer, _, kind = name.rpartition(".")
            site = f"{layer}.qkv" if kind in tuple("qkv") else name
            fisher, D, K = found.fishers[site], run.cfg.model_dim, run.cfg.kv_dim
            if layer:  # both sums are over visits, their product should be
                fisher = fisher / visits.count(int(layer))
            if kind in ("o", "down"):  # calibration saw them times their residual scale
                fisher = fisher * (model.attn_scale if kind == "o" else model.mlp_scale)[int(layer)].square()
            part = dict(q=slice(0, D), k=slice(D, D + K), v=slice(D + K, None)).get(kind, slice(None))
            group = groups.setdefault((W.shape, kind == "embed"), ([], [], [], []))
            for one, values in zip(group, (name, W, found.hessians[site], fisher[part])):
                one.append(values)
    own = []
    for (shape, is_embed), group in groups.items():
        tokens = found.hessians["embed"].trace() / shape[1]  # of mean square 1
        own.append(Quantizer(*group, found.fishers["start"] * tokens / shape[1] if is_embed else None))
    return own, {name: (owner, W.shape) for (name, W), owner in zip(matrices.items(), owners)}

@torch.no_grad()
def quantize(run: Run, model: GPT, own: list[Quantizer], owners: dict[str, tuple], step: float,
             ) -> dict[str, Tensor]:
    """All tensors of the artifact, on the CPU of every rank: those of Quantizer.codes; the rest as fp16.

    Of their 10 bits after the first, 6 are kept: what they multiply errs by more.
    """
    made = {}
    for quantizer in own:
        made |= quantizer.codes(step, run.cfg.quant_states)
    short = lambda p: ((p.half().view(torch.int16) + 8) & -16).view(torch.half)
    tensors = {name: short(p).cpu() for name, p in model.named_parameters() if name in Optimizers.SCALARS}
    for name, (owner, (rows, columns)) in owners.items():
        for kind, shape in dict(codes=(rows, columns), rows=(rows,), columns=(columns,), row_width=(rows,),
                                column_width=(columns,)).items():
            dtype = torch.int16 if kind == "codes" else torch.int8
            part = made.get(f"{name}.{kind}", model.embed.new_empty(shape, dtype=dtype))
            part = part.contiguous().view(torch.int8)  # collectives have no int16
            tensors[f"{name}.{kind}"] = run.ranks.copy_(part, owner).view(dtype).cpu()
    return tensors

def widths_of(tensors: dict[str, Tensor]) -> np.ndarray:
    """Classes of width of all codes, uint8: quarters of an octave, as rows and columns tell them."""
    wide = lambda name: tensors[name].numpy().astype(np.int16)
    found = [np.zeros(0, dtype=np.uint8)]
    for name in coded(tensors):
        row = 2 * wide(f"{name}.row_width") - wide(f"{name}.rows")
        column = 2 * wide(f"{name}.column_width") - wide(f"{name}.columns")
        wanted = (row[:, None] + column) // 2 + 24
        found.append(wanted.clip(0, WIDTHS - 1).astype(np.uint8).ravel())
    return np.concatenate(found)

def coding_models(counts: np.ndarray) -> Iterator[tuple[int, int, Any]]:
    """(context, smallest code in it, model of a code less that; None if it has one code only)."""
    model = tool("constriction").stream.model
    for context, row in enumerate(counts):
        if len(there := np.flatnonzero(row)):
            lo, hi = int(there[0]), int(there[-1])
            shares = row[lo : hi + 1] / row.sum()  # of integers: the same on every machine
            yield context, lo, model.Categorical(shares, perfect=False) if lo < hi else None

def encode(coder: Any, codes: np.ndarray, contexts: np.ndarray, total: int) -> np.ndarray:
    """Append (count,) codes of at most TOP, each in one of `total` contexts; returns the counts of codes."""
    symbols = codes[np.argsort(contexts, kind="stable")].astype(np.int32) + TOP
    counts = np.bincount(contexts.astype(np.int64) * (2 * TOP + 1) + codes + TOP,
                         minlength=total * (2 * TOP + 1)).reshape(total, -1)
    ends = counts.sum(1).cumsum()
    for context, lo, model in coding_models(counts):
        if model is not None:
            coder.encode(symbols[ends[context] - counts[context].sum() : ends[context]] - lo, model)
    return counts

def decode(coder: Any, counts: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """The codes, int8, that `encode` was given; ValueError if there cannot be so many."""
    if counts.min() < 0 or not np.array_equal(counts.sum(1), np.bincount(contexts, minlength=len(counts))):
        raise ValueError("counts of codes are wrong")
    symbols, ends = np.empty(len(contexts), dtype=np.int8), counts.sum(1).cumsum()
    for context, lo, model in coding_models(counts):
        many = int(counts[context].sum())
        found = np.zeros(many, dtype=np.int32) if model is None else coder.decode(model, many)
        symbols[ends[context] - many : ends[context]] = found + lo - TOP
    codes = np.empty_like(symbols)
    codes[np.argsort(contexts, kind="stable")] = symbols
    return codes

def encode_codes(tensors: dict[str, Tensor]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All codes as words of the range coder, uint32; and counts, of odd ones and of the rest, by context."""
    coder, widths = tool("constriction").stream.queue.RangeEncoder(), widths_of(tensors)
    codes = [tensors[f"{name}.codes"].numpy().ravel() for name in coded(tensors)]
    codes = np.concatenate([np.zeros(0, dtype=np.int16), *codes])
    counts = {"odd_counts": encode(coder, codes >> 1 & 1, widths, WIDTHS),
              "counts": encode(coder, codes >> 2, 4 * widths + (codes & 3), 4 * WIDTHS)}
    return coder.get_compressed(), counts

def pack_artifact(settings: dict, tensors: dict[str, Tensor]) -> bytes:
    """The artifact as bytes, which follow from the arguments alone."""
    brotli, (words, counts) = tool("brotli"), encode_codes(tensors)
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".codes")}
    tensors |= {name: torch.from_numpy(table.astype(np.int32)) for name, table in counts.items()}
    listing = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    header = json.dumps({**settings, "tensors": listing}, separators=(",", ":")).encode()
    streams = [len(header).to_bytes(4, "little") + header]
    for tensor in tensors.values():
        if len(streams[-1]) >= STREAM_BYTES:
            streams.append(b"")
        streams[-1] += tensor.contiguous().numpy().tobytes()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Brotli lets go of the interpreter lock
        packed = list(pool.map(functools.partial(brotli.compress, quality=11, lgwin=24), streams))
    body = b"".join(len(p).to_bytes(4, "little") + p for p in packed) + bytes(4)
    body += words.astype("<u4").tobytes()
    return ARTIFACT_MAGIC + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest() + body

def unpack_artifact(blob: bytes, path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and tensors of an artifact. UserError if it is none, or not whole."""
    start = len(ARTIFACT_MAGIC) + DIGEST_BYTES
    body = blob[start:]
    if blob[:start] != ARTIFACT_MAGIC + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest():
        raise UserError(f"{path} is not an artifact of this script, or damaged: magic or checksum is wrong")
    with reading(str(path)):
        return parse_artifact(body)

def parse_artifact(body: bytes) -> tuple[dict, dict[str, Tensor]]:
    """Settings and tensors of what follows an artifact's checksum; any exception if that is foreign."""
    brotli, data, offset = tool("brotli"), bytearray(), 0
    while size := int.from_bytes(body[offset : offset + 4], "little"):
        data += brotli.decompress(body[offset + 4 : offset + 4 + size])
        offset += 4 + size
    words = np.frombuffer(body, dtype="<u4", offset=offset + 4).astype(np.uint32)
    start = 4 + int.from_bytes(data[:4], "little")
    settings, tensors, data = json.loads(data[4:start]), {}, torch.frombuffer(data, dtype=torch.uint8)
    for name, dtype, shape in settings.pop("tensors"):
        end = start + math.prod(shape) * getattr(torch, dtype).itemsize
        tensors[name] = data[start:end].clone().view(getattr(torch, dtype)).view(shape)
        start = end
    coder, widths = tool("constriction").stream.queue.RangeDecoder(words), widths_of(tensors)
    odd_counts, counts = (tensors.pop(name).numpy().astype(np.int64) for name in ("odd_counts", "counts"))
    shapes = {n: (len(tensors[f"{n}.rows"]), len(tensors[f"{n}.columns"])) for n in coded(tensors)}
    ends = np.cumsum([rows * columns for rows, columns in shapes.values()], dtype=int)[:-1]
    codes = decode(coder, odd_counts, widths).astype(np.uint8)
    for part, shape in zip(np.split(codes, ends), shapes.values()):  # views
        part[:] = 2 * part + shifts(part.reshape(shape), settings["settings"]["quant_states"]).ravel()
    codes = 4 * decode(coder, counts, 4 * widths + codes).astype(np.int16) + codes  # too much for an int8
    if not coder.maybe_exhausted():
        raise ValueError("words are left")
    for part, (name, shape) in zip(np.split(codes, ends), shapes.items()):
        tensors[f"{name}.codes"] = torch.from_numpy(part).view(shape)
    return settings, tensors

@torch.no_grad()
def restore(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Fill the model with an artifact's weights; UserError if it has others."""
    with reading("the artifact"):
        for name, target in (*model.named_parameters(), *model.named_matrices()):
            if name in Optimizers.MUON:  # filled matrix by matrix
                continue
            if (value := tensors.get(name)) is None:
                codes, rows, columns = (tensors[f"{name}.{kind}"] for kind in ("codes", "rows", "columns"))
                value = codes / 2 * Quantizer.scale(rows)[:, None] * Quantizer.scale(columns)
            if value.shape != target.shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}")
            target.copy_(value)

def fingerprint(model: GPT, cfg: Config) -> str:
    """Of the weights and the settings of quantization: says what an artifact was made from."""
    digest = hashlib.blake2b(repr(cfg.pick(QUANT_SETTINGS)).encode(), digest_size=DIGEST_BYTES)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()

def export(run: Run, model: GPT, found: Calibration, code_bytes: int, path: Path) -> bytes:
    """Quantize, write the artifact, return it as read back; the step is the finest that fits, to .05 %."""
    cfg, ranks, best, sizes = run.cfg, run.ranks, b"", []
    settings = {"settings": cfg.to_save(), "made_from": fingerprint(model, cfg)}
    own, owners = make_quantizers(run, model, found)
    weights = sum(p.numel() for p in model.parameters())
    width = ranks.sum_(sum((q.width() for q in own), torch.zeros((), device=ranks.device))).item() / weights
    bits = min(8 * (CAP_BYTES - code_bytes) / weights, 10.0)
    step = 2 ** (width + 2.05 - bits)  # of a Gaussian, a code has log2 std + 2.05 bits
    too_fine, fits, boost = 0.0, math.inf, 1.0  # steps
    for _ in range(30):
        tensors = quantize(run, model, own, owners, step)
        blob = pack_artifact(settings, tensors) if ranks.is_main else b""
        sizes.append(code_bytes + ranks.share(len(blob)))
        run.log(f"artifact: with a step of {step:.4g} code + model are {sizes[-1]} bytes of {CAP_BYTES}")
        if sizes[-1] <= CAP_BYTES:
            best, fits = max(best, blob, key=len), min(fits, step)
        else:
            too_fine = max(too_fine, step)
        if 0.9995 * CAP_BYTES <= sizes[-1] <= CAP_BYTES or sizes[-3:] == sizes[-1:] * 3:
            break  # as full as may be; or any step gives this size
        move = 8 * (sizes[-1] - 0.9998 * CAP_BYTES) / weights * boost  # octaves: a bit each, or less
        step, boost = step * 2 ** max(-8.0, min(move, 8.0)), 2 * boost
        if too_fine and fits < math.inf and not too_fine < step < fits:
            step = math.sqrt(too_fine * fits)
    if not ranks.share(len(best)):
        raise UserError(f"the model does not fit into {CAP_BYTES} bytes: lower MODEL_DIM or NUM_LAYERS")
    if ranks.is_main:
        write_file(path, best)
    return ranks.share(read_file(path) if ranks.is_main else b"")

def save_checkpoint(model: GPT, cfg: Config, steps: int, path: Path) -> None:
    """Write the weights before quantization, and what calibrating again needs to know."""
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    file = io.BytesIO()
    torch.save({"settings": cfg.to_save(), "steps": steps, "weights": weights}, file)
    write_file(path, file.getvalue())

def read_saved(path: Path) -> dict[str, Any]:
    """An artifact (settings, artifact) or a checkpoint (settings, weights, steps), else UserError."""
    data = read_file(path)
    with reading(f"EVAL_ONLY_PATH={path}"):
        if data.startswith(ARTIFACT_MAGIC):
            return dict(settings=unpack_artifact(data, path)[0]["settings"], artifact=data)
        if damaged := zipfile.ZipFile(io.BytesIO(data)).testzip():
            raise UserError(f"EVAL_ONLY_PATH={path} is damaged: the checksum of its {damaged} is wrong")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return dict(settings=dict(saved["settings"]), weights=saved["weights"], steps=int(saved["steps"]))

def open_saved(run: Run, model: GPT, saved: dict[str, Any]) -> tuple[bytes, int]:
    """(artifact, 0), or of a checkpoint, with which the model is filled, (artifact, steps).

    A checkpoint's artifact is the one beside it if made from it, else empty. UserError if settings forbid it.
    """
    cfg, path = run.cfg, Path(run.cfg.eval_only_path)
    if missing := [name for name in cfg.to_save() if name not in saved["settings"]]:
        raise UserError(f"EVAL_ONLY_PATH={path}: another version of this script made it: no {missing[0]}")
    settings = {name: value for name, value in saved["settings"].items() if value != getattr(cfg, name)}
    if wrong := [f"{name.upper()}={value}" for name, value in settings.items() if name in MODEL_SETTINGS]:
        raise UserError(f"EVAL_ONLY_PATH={path} was made with other settings, which are taken from it unless "
                        "set: unset them, or set " + " ".join(wrong))
    if settings:
        run.log("settings other than those of its run, which were: "
                + " ".join(f"{name}:{value}" for name, value in settings.items()))
    if "artifact" in saved:
        return saved["artifact"], 0
    with reading(f"EVAL_ONLY_PATH={path}"):
        model.load_state_dict(saved["weights"])
    beside = path.with_name("final_model.int6.ptz")
    blob = read_file(beside) if beside.is_file() else b""
    with contextlib.suppress(UserError):  # of another version, or damaged
        if blob and unpack_artifact(blob, beside)[0].get("made_from") == fingerprint(model, cfg):
            run.log(f"{beside} was made from {path} with these settings")
            return blob, saved["steps"]
    run.log(f"no {beside} made from {path} with these settings: calibrating again, for which training shards "
            "are needed")
    return b"", saved["steps"]

PACKED = '''"""train_gpt.py, packed: unpacks it to a real file, whose lines Triton can read, and runs that."""
import base64, hashlib, lzma, os, tempfile
SOURCE = lzma.decompress(base64.b85decode("%s"))
UNPACKED = os.path.join(tempfile.gettempdir(), "train_gpt_" + hashlib.sha256(SOURCE).hexdigest()[:32] + ".py")
try:
    with open(UNPACKED, "rb") as file:
        whole = file.read() == SOURCE
except OSError:
    whole = False
if not whole:
    with open(UNPACKED + str(os.getpid()), "wb") as file:
        file.write(SOURCE)
    os.replace(file.name, UNPACKED)
exec(compile(SOURCE, UNPACKED, "exec"))
'''

@functools.cache
def pack_script() -> bytes:
    """This script as it is shipped and counted: minified, LZMA, base85, self-extracting.

    Annotations of functions stay: Triton and custom_op read them. A packed script is returned as it is.
    """
    source = Path(__file__).read_bytes()
    if "UNPACKED" in globals():
        return source
    minifier = tool("python_minifier")
    keep = dict(remove_return_annotations=False, remove_argument_annotations=False)
    small = minifier.minify(source.decode(), remove_annotations=minifier.RemoveAnnotationsOptions(**keep),
                            remove_literal_statements=True, hoist_literals=False, rename_locals=False)
    squeezed = lzma.compress(small.encode(), format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return (PACKED % base64.b85encode(squeezed).decode()).encode()

# ---- Scores ------------------------------------------------------------------------------------------------

UNSCORED = -1.0  # among nll, which are negative by rounding at most

class Score(NamedTuple):
    """The one place where losses become a score."""
    nats: float
    targets: int
    text_bytes: int

    @classmethod
    def of(cls, nll: Tensor, val: Validation) -> "Score":
        """Of every target of the validation stream, summed in fp64."""
        return cls(nll.double().sum().item(), nll.numel(), int(val.token_bytes.sum()))

    @property
    def loss(self) -> float:
        return self.nats / self.targets

    @property
    def bpb(self) -> float:
        """Bits per byte of text."""
        return self.nats / (math.log(2) * self.text_bytes)

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f}"

PACK_MULTIPLE = 128  # of positions, as kernels and grouped products like it

def pack_spans(val: Validation, spans: list[tuple[int, int]], max_len: int, max_spans: int,
               multiple: int = PACK_MULTIPLE) -> tuple[Batch, np.ndarray]:
    """Stretches of targets [lo, hi) end to end, each a context of its own, and the target of every position.

    Filled up to a multiple of `multiple` with positions that have none (-1), and with empty spans.
    """
    which = np.concatenate([np.arange(lo, hi) for lo, hi in spans])
    total = -(-len(which) // multiple) * multiple
    bounds = span_bounds(np.cumsum([0] + [hi - lo for lo, hi in spans])[: None if total > len(which) else -1],
                         total, max_len)
    which = np.append(which, np.full(total - len(which), -1))
    tokens = np.where(which < 0, 0, val.tokens[which])
    targets = np.where(which < 0, IGNORE, val.tokens[which + 1])
    if len(bounds) - 1 > (room := max_spans + -(-multiple // max_len)):
        raise ValueError(f"{len(bounds) - 1} spans where {room} have room: some would not be scored")
    return make_batch(tokens, targets, bounds, room, max_len), which

class Tally:
    """The nll of every target of the validation stream, on this rank, and how often each was scored."""

    def __init__(self, targets: int, ranks: Ranks):
        self.ranks, self.nll = ranks, torch.zeros(targets, device=ranks.device)
        self.times = torch.zeros(targets, dtype=torch.int32, device=ranks.device)

    def add(self, where: Tensor, nll: Tensor) -> None:
        self.nll.index_add_(0, where, nll)
        self.times.index_add_(0, where, torch.ones_like(where, dtype=torch.int32))

    def gather(self, what: str, may_miss: bool = False) -> Tensor:
        """Of all ranks as one, (targets,) fp32 on the CPU; UNSCORED where there is none and may be none.

        Any other target that was not scored exactly once, or whose nll is not finite, ends the run.
        """
        times, nll = self.ranks.sum_(self.times), self.ranks.sum_(self.nll)
        if times.max() > 1 or not may_miss and times.min() < 1:
            raise RuntimeError(f"{what}: {int((times > 1).sum())} targets were scored more than once, "
                               f"{int((times < 1).sum())} never")
        if not nll.isfinite().all():
            raise UserError(f"{what}: {int((~nll.isfinite()).sum())} losses are not finite; if only here, "
                            "lower TTT_LORA_LR")
        return nll.where(times == 1, UNSCORED).cpu()

@torch.no_grad()
def evaluate(run: Run, model: GPT, val: Validation, plan: Plan) -> Tensor:
    """Plain nll of every target, (targets,): documents cut at eval_seq_len, nothing learned."""
    cfg, ranks = run.cfg, run.ranks
    tally = Tally(len(val.token_bytes), ranks)
    mine = np.flatnonzero(deal(val.lengths, ranks.world) == ranks.rank)
    spans = deque((lo, min(lo + cfg.eval_seq_len, start + length))
                  for start, length in zip(val.starts[mine].tolist(), val.lengths[mine].tolist())
                  for lo in range(start, start + length, cfg.eval_seq_len))
    while spans:
        some, room = [], max(cfg.eval_seq_len, cfg.val_batch_tokens // max(ranks.world, BUFFERS_PER_STEP))
        while spans and spans[0][1] - spans[0][0] <= room:
            some.append(spans.popleft())
            room -= some[-1][1] - some[-1][0]
        batch, which = pack_spans(val, some, cfg.eval_seq_len, len(some))
        which = to_device(torch.from_numpy(which[which >= 0]), ranks.device)
        tally.add(which, model(to_device(batch, ranks.device), plan, run.ops)[: len(which)])
    return tally.gather("plain evaluation")

# ---- Score-first test-time training ------------------------------------------------------------------------
# Every document on its own, with fresh adapters, in chunks from left to right. A chunk is scored with what
# earlier chunks of its document taught; that is final; then the adapters take one step on it. Documents share
# nothing, and nothing depends on where one ends before its end is read. They enter a fixed number of slots in
# validation order; when one ends, the next takes its slot. The windows of all slots are packed end to end.

Turn = tuple[int, int, int]  # slot, document, number of the chunk

def chunk_ends(longest: int, cfg: Config) -> np.ndarray:
    """Where chunks end, up to at least `longest`: (chunks,) targets after the beginning of any document.

    A chunk has ttt_chunk_size targets, or ttt_chunk_growth of what comes before it, whichever is more.
    """
    ends = [cfg.ttt_chunk_size]
    while ends[-1] < longest:
        size = max(cfg.ttt_chunk_size, int(ends[-1] * cfg.ttt_chunk_growth))
        ends.append(ends[-1] + min(size, cfg.ttt_eval_seq_len))
    return np.array(ends)

def schedule(lengths: list[int], slots: int, ends: np.ndarray) -> Iterator[tuple[list[int], list[Turn]]]:
    """Rounds: slots whose document is new, and a turn, which is a chunk, of every slot with a document."""
    waiting = (document for document, length in enumerate(lengths) if length)
    active: dict[int, tuple[int, int]] = {}
    while True:
        entering = dict(zip([slot for slot in range(slots) if slot not in active], waiting))
        active |= {slot: (document, 0) for slot, document in entering.items()}
        if not active:
            return
        yield list(entering), [(slot, *active[slot]) for slot in sorted(active)]
        active = {slot: (d, c + 1) for slot, (d, c) in active.items() if ends[c] < lengths[d]}

def window(c: int, length: int, ends: np.ndarray, context: int) -> tuple[int, int, int]:
    """[first, last) target of a document's window for chunk c, at most `context`, and the chunk's own first.

    Where it begins follows from c alone. Counting back from where the last chunk ends, as this script's
    ancestor does, lets what a token sees depend on how soon its document ends: a glimpse of the future.
    """
    end, own = int(ends[c]), int(ends[c - 1]) if c else 0
    return max(0, end - context), min(end, length), own

class Round(NamedTuple):
    """One chunk of every occupied slot."""
    batch: Batch
    ends: Tensor  # (slots,) int32: where each slot's rows end in the batch
    weight: Tensor  # (T,) in the loss to learn from: 1 / size in a chunk after which its document goes on
    scored: Tensor  # positions in the batch that belong to the chunks
    where: Tensor  # the targets that these are

def round_sizes(cfg: Config) -> range:
    """How many positions a round may have: 48 numbers or fewer, which it is filled up to."""
    most = cfg.ttt_batch_size * cfg.ttt_eval_seq_len
    step = PACK_MULTIPLE * -(-most // (48 * PACK_MULTIPLE))
    return range(step, most + step, step)

def make_round(val: Validation, turns: list[Turn], ends: np.ndarray, cfg: Config) -> Round:
    """Pack the windows of all turns; `ends` as chunk_ends gives it."""
    spans, scored, weights, sizes = [], [], [], np.zeros(cfg.ttt_batch_size, dtype=np.int64)
    for slot, d, c in turns:
        first, last, own = window(c, val.lengths[d], ends, cfg.ttt_eval_seq_len)
        in_chunk = np.arange(first, last) >= own
        spans.append((val.starts[d] + first, val.starts[d] + last))
        scored.append(in_chunk)
        weights.append(in_chunk * (last < val.lengths[d]) / (ends[c] - own))
        sizes[slot] = last - first
    batch, which = pack_spans(val, spans, cfg.ttt_eval_seq_len, cfg.ttt_batch_size, round_sizes(cfg).step)
    rows, positions = np.cumsum(sizes), np.flatnonzero(np.concatenate(scored))
    weight = np.concatenate(weights + [np.zeros(len(which) - rows[-1])]).astype(np.float32)
    rows[-1] = len(which)  # what fills up counts as the last slot's, and weighs nothing
    return Round(batch, torch.from_numpy(rows.astype(np.int32)), torch.from_numpy(weight),
                 torch.from_numpy(positions), torch.from_numpy(which[positions]))

def adapt(model: GPT, adapters: Adapters, plan: Plan, ops: Ops, this: Round) -> Tensor:
    """A round; returns the final nll of its positions. The rule of the game is the order of the two steps."""
    nll = model(this.batch, plan, ops, adapters.tap(this.ends))
    final = nll.detach().clone()  # 1. score, with adapters that have learned from earlier chunks only
    adapters.learn((nll * this.weight).sum(), ops.update)  # 2. then learn from what has just been scored
    return final

def record(model: GPT, adapters: Adapters, plan: Plan, ops: Ops, this: Round, size: int) -> None:
    """Keep `adapt` as a CUDA graph for rounds of `size` positions; nothing runs. `this`: one of any size."""
    of_size = lambda t: t.new_zeros(size)
    tokens, targets, (cu_seqlens, positions, longest) = this.batch
    batch = Batch(of_size(tokens), of_size(targets), Seqs(cu_seqlens, of_size(positions), longest))
    held, graph = Round(batch, this.ends, of_size(this.weight), None, None), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=adapters.pool, capture_error_mode="thread_local"):
        final = adapt(model, adapters, plan, ops, held)
    adapters.recorded[size] = graph, held, final

def play(model: GPT, adapters: Adapters, plan: Plan, ops: Ops, this: Round) -> Tensor:
    """`adapt` or, where it is recorded, its CUDA graph, which starts its 1,800 kernels at once."""
    if len(this.weight) not in adapters.recorded:
        return adapt(model, adapters, plan, ops, this)
    adapters.played.synchronize()  # the host is one round ahead, so that deadlines mean what they say
    graph, held, final = adapters.recorded[len(this.weight)]
    for mine, given in zip(tensors_in(held), tensors_in(this)):
        mine.copy_(given)
    graph.replay()
    adapters.played.record()
    return final

def rounds(run: Run, val: Validation) -> Iterator[tuple[list[int], Round, float, int]]:
    """(slots whose document is new, the round, fraction of work and documents done before it) of this rank.

    Documents are dealt to ranks whole and in order, by the tokens in their windows.
    """
    cfg, ranks, done, entered = run.cfg, run.ranks, 0, 0
    ends = chunk_ends(val.lengths.max(), cfg)
    sizes = np.minimum(ends, cfg.ttt_eval_seq_len)  # of windows, by chunk
    costs = np.cumsum(sizes)[np.searchsorted(ends, val.lengths)]
    mine = np.flatnonzero(deal(costs, ranks.world) == ranks.rank)
    for entering, turns in schedule(val.lengths[mine].tolist(), cfg.ttt_batch_size, ends):
        this = make_round(val, [(slot, mine[d], c) for slot, d, c in turns], ends, cfg)
        entered += len(entering)
        yield entering, to_device(this, ranks.device), done / costs[mine].sum(), entered - len(turns)
        done += sizes[[c for _, _, c in turns]].sum()

def score_documents(run: Run, model: GPT, val: Validation, adapters: Adapters, ops: Ops,
                    deadline: float) -> Tensor:
    """nll of every target by test-time training, (targets,); UNSCORED past the deadline (perf_counter)."""
    plan, began, lines = depth_plan(run.cfg, run.cfg.loops_at_end), time.perf_counter(), 1
    tally, late = Tally(len(val.token_bytes), run.ranks), False
    for entering, this, done, documents in rounds(run, val):
        if late := time.perf_counter() > deadline:
            break
        if done >= lines / 10 and run.ranks.is_main:  # ten lines about what this rank has so far
            lines, seconds, known = lines + 1, time.perf_counter() - began, tally.times.cpu().numpy() > 0
            bpb = Score(tally.nll.double().sum().item(), known.sum(), val.token_bytes[known].sum()).bpb
            run.log(f"ttt_progress: documents:{documents} tokens:{known.sum()} val_bpb:{bpb:.6f} "
                    f"done:{done:.0%} elapsed:{seconds:.0f}s eta:{seconds / done - seconds:.0f}s")
        adapters.enter(entering)
        tally.add(this.where, play(model, adapters, plan, ops, this)[this.scored])
    run.ranks.synchronize()
    seconds = time.perf_counter() - began
    slowest, busy = run.ranks.max(seconds), torch.tensor(seconds, device=run.ranks.device)
    share = run.ranks.sum_(busy).item() / run.ranks.world / slowest
    run.log(f"adapt: ranks busy {share:.1%} of {slowest:.1f} s")
    return tally.gather("test-time training", may_miss=run.ranks.max(late) > 0)

def rehearse(run: Run, model: GPT, adapters: Adapters, ops: Ops) -> None:
    """Compile and record what adaptation needs, on random tokens, before its clock; the adapters stay new."""
    cfg, slots, plan = run.cfg, run.cfg.ttt_batch_size, depth_plan(run.cfg, run.cfg.loops_at_end)
    ends = chunk_ends(cfg.ttt_eval_seq_len, cfg)
    length = int(ends[-1]) + 1
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, slots * length + 1)
    val = Validation(tokens, np.ones(len(tokens) - 1), np.arange(slots) * length, np.full(slots, length), 0)
    for c in (0, len(ends) // 2, len(ends) - 1):  # the last takes most memory, and may want 64-bit indices
        this = make_round(val, [(slot, slot, c) for slot in range(slots)], ends, cfg)
        adapt(model, adapters, plan, ops, this := to_device(this, run.ranks.device))
    if run.ranks.on_gpu:
        torch.cuda.empty_cache()  # recorded rounds have memory of their own, which the largest fills
        for size in reversed(round_sizes(cfg)):
            record(model, adapters, plan, ops, this, size)
    adapters.enter(range(slots))

# ---- The run -----------------------------------------------------------------------------------------------

def versions() -> dict[str, str]:
    """Of everything a score may depend on, from package metadata: nothing is imported for it."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in ("torch", "triton", "flash_attn_3", "numpy", "sentencepiece", "brotli", "constriction",
                    "python-minifier"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

def open_run(run: Run) -> dict[str, Any]:
    """Head of the log, packed script, checks of what would else fail late; returns the result's beginning."""
    cfg, ranks, log, ops = run
    source = Path(globals().get("UNPACKED", __file__)).read_text()
    digest = hashlib.sha256(source.encode()).hexdigest()
    settings = cfg.pick(f.name for f in dataclasses.fields(cfg))
    changed = {name: value for name, value in settings.items() if value != getattr(Config, name)}
    listed = lambda values: " ".join(f"{name}:{value}" for name, value in values.items()) or "none"
    log(f"run_id:{log.run_id} artifact_dir:{log.folder} code_sha256:{digest}")
    log("versions: " + " ".join(f"{name}:{version}" for name, version in versions().items()))
    log(f"settings other than the record's: {listed(changed)}")
    log.metrics("settings", **settings, world_size=ranks.world)
    log(f"all settings: {listed(settings)}", console=False)
    kernels, compiling = "Triton" if ops.fused else "PyTorch", "on" if ops.compilable else "off"
    log(f"device:{device_name(ranks.device)} world_size:{ranks.world} dtype:{compute_dtype(ranks.device)} "
        f"attention:{ops.attend.__name__} kernels:{kernels} compile:{compiling}")
    log("\n".join(("=" * 100, source, "=" * 100)), console=False)
    tool("brotli"), tool("constriction"), tool("sentencepiece")
    if cfg.save_scores and ranks.is_main and not os.access(Path(cfg.save_scores).resolve().parent, os.W_OK):
        raise UserError(f"SAVE_SCORES={cfg.save_scores}: its folder is missing or not writable")
    packed = ranks.share(pack_script() if ranks.is_main else b"")
    if ranks.is_main:
        write_file(log.folder / "train_gpt_packed.py", packed)
    return dict(run_id=log.run_id, seed=cfg.seed, settings=changed, versions=versions(), code_sha256=digest,
                packed_sha256=hashlib.sha256(packed).hexdigest(), code_bytes=len(packed),
                hardware=f"{ranks.world} x {device_name(ranks.device)}")

def train(run: Run, model: GPT, loader: PackedLoader, validate: Callable[[Plan], Score]) -> int:
    """Warm up and train; leaves the average of the weights in the model, returns the number of steps."""
    trainer = Trainer(run, model, loader)
    with run.log.phase("warm-up"):
        trainer.warm_up()
    run.log(f"buffers: {trainer.local_buffers} a step on a rank, {loader.buffer_tokens} tokens and at most "
            f"{loader.max_spans} spans each; first step after {time.perf_counter() - START:.1f} s")
    trainer.train(validate)
    tokens = trainer.steps * run.cfg.train_batch_tokens
    run.log(f"train: steps:{trainer.steps} tokens:{tokens} epochs:{tokens / loader.epoch_tokens:.2f}")
    return trainer.steps

def produce(run: Run, model: GPT, steps: int, files: DataFiles, bos: int, result: dict,
            validate: Callable[[Plan], Score]) -> bytes:
    """Train unless a checkpoint has its steps, calibrate, export; returns the artifact, keeps the weights."""
    cfg, ranks, log, _ = run
    local_buffers, buffer_tokens = split_step(cfg, ranks.world)
    loader = PackedLoader(files.train, bos, cfg, buffer_tokens)
    result["train_sha256"] = loader.digest()
    result["steps"] = steps or train(run, model, loader, validate)
    with log.phase("calibrate", "training"):
        found = calibrate(run, model, loader, result["steps"] * local_buffers * ranks.world)
    with log.phase("export"):
        if ranks.is_main and not steps:
            save_checkpoint(model, cfg, result["steps"], log.folder / "final_model.pt")
        return export(run, model, found, result["code_bytes"], log.folder / "final_model.int6.ptz")

def score(run: Run, model: GPT, val: Validation, result: dict) -> Tensor:
    """Plain score of the model as it is, then the adapted one, which is the headline; returns every nll."""
    cfg, ranks, log, ops = run
    with log.phase("score quantized", "scoring"):
        nll = evaluate(run, model, val, depth_plan(cfg, cfg.loops_at_end))
        plain = Score.of(nll, val)
        log(f"quantized {plain}")
    missed = nll.numel()
    if cfg.ttt_enabled:
        model.requires_grad_(False)
        with log.phase("prepare adaptation"):
            adapters = Adapters(cfg, len(sum(depth_plan(cfg, cfg.loops_at_end), ())), ranks.device)
            ops = ops.compiled(any_length=True)
            if ops.compilable:
                rehearse(run, model, adapters, ops)
        with log.phase("adapt", "scoring"):
            left = 0.99 * cfg.eval_max_seconds - log.spent("scoring") if cfg.eval_max_seconds else math.inf
            adapted = score_documents(run, model, val, adapters, ops, time.perf_counter() + left)
        missed = int((adapted == UNSCORED).sum())
        nll = torch.where(adapted == UNSCORED, nll, adapted)
        if missed:
            log(f"EVAL_MAX_SECONDS={cfg.eval_max_seconds:g} passed: {missed} targets keep their plain score, "
                "and the score depended on time")
    final = Score.of(nll, val)
    log(f"final {final}")
    result.update(val_loss=final.loss, val_bpb=final.bpb, val_loss_quantized=plain.loss,
                  val_bpb_quantized=plain.bpb, documents=len(val.starts), tokens=final.targets,
                  bytes=final.text_bytes, unadapted_tokens=missed, val_sha256=val.sha256)
    return nll

def caveats(run: Run, result: dict[str, Any]) -> list[str]:
    """What speaks against taking this result for a record's, measured by the challenge's limits."""
    cfg, ranks, log, _ = run
    training, scoring = log.spent("training"), log.spent("scoring")
    total, plain, graphs = (result[name] for name in ("total_bytes", "unadapted_tokens", "recompilations"))
    return [why for why, holds in (
        (f"preset {cfg.preset}", cfg.preset),
        (f"not trained by this run, which read {cfg.eval_only_path}", result["mode"] != "train"),
        (f"training took {training:.1f} s of {CLOCK_SECONDS}", training > CLOCK_SECONDS),
        (f"scoring took {scoring:.1f} s of {CLOCK_SECONDS}", scoring > CLOCK_SECONDS),
        (f"{total} bytes of {CAP_BYTES}", total > CAP_BYTES),
        (f"{plain} targets have their plain score", plain),
        (f"recompilations on the clocks: {graphs}", graphs),
        (f"VAL_DOC_FRACTION={cfg.val_doc_fraction}: not all documents", cfg.val_doc_fraction < 1),
        (f"VAL_LOSS_EVERY={cfg.val_loss_every}: validation was read during training", cfg.val_loss_every),
        ("not on 8 GPUs", not (ranks.on_gpu and ranks.world == 8))) if holds]

def summarize(run: Run, result: dict[str, Any]) -> None:
    """The table of phases, then the RESULT line: the last one, and the content of result.json."""
    cfg, ranks, log, _ = run
    budgets = {"training": cfg.max_wallclock_seconds, "scoring": cfg.eval_max_seconds}
    for phase in log.phases:
        log(f"phase {phase.name:20}{phase.seconds:9.1f} s  {phase.clock}".rstrip())
    result["phases"] = {phase.name: round(phase.seconds, 3) for phase in log.phases}
    result["clocks"] = {}
    for clock, budget in budgets.items():
        seconds = log.spent(clock)
        over = " EXCEEDED" if 0 < budget < seconds else ""
        log(f"clock {clock:20}{seconds:9.1f} s" + (f"  of {budget:g} s{over}" if budget else ""))
        result["clocks"][clock] = {"seconds": round(seconds, 3), "budget": budget}
    graphs = int(ranks.max(sum(phase.graphs for phase in log.phases if phase.clock)))
    result["recompilations"] = graphs
    log(f"recompilations on the clocks:{graphs}")
    result["seconds"] = round(time.perf_counter() - START, 3)
    result["caveats"] = caveats(run, result)
    log("caveats: " + ("; ".join(result["caveats"]) or "none"))
    if ranks.on_gpu:
        result["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    result = dict(sorted(result.items(), key=lambda item: not item[0].startswith("val_")))  # the score first
    log.metrics("result", **result)
    if ranks.is_main:
        write_file(log.folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    log("RESULT " + json.dumps(result))

def compete(run: Run, saved: dict[str, Any]) -> None:
    """The whole run; `saved` is what EVAL_ONLY_PATH holds, on rank 0."""
    cfg, ranks, log, _ = run
    with log.phase("setup"):
        result = open_run(run)
        model = GPT(cfg).to(ranks.device)
        parameters = sum(p.numel() for p in model.parameters())
        log(f"model_params:{parameters}")
        blob, steps = ranks.share(open_saved(run, model, saved) if saved else (b"", 0))
        result["mode"] = "checkpoint" if steps else "artifact" if blob else "train"
        for p in model.parameters():  # one host may have a file that another has not, or another LAPACK
            ranks.copy_(p.data)
        has_weights = bool(steps) or not blob  # or will have, after training
        files = find_data(cfg, train=not blob)
        tokenizer = load_tokenizer(files.tokenizer, cfg.vocab_size)
        result["tokenizer_sha256"] = hashlib.sha256(read_file(files.tokenizer)).hexdigest()
        free, need = shutil.disk_usage(log.folder).free if ranks.is_main else math.inf, 2**25 + 6 * parameters
        if free < need:
            raise UserError(f"ARTIFACT_DIR={log.folder}: {free >> 20} MiB are free, a run needs {need >> 20}")
    validation = functools.cache(lambda: load_validation(files.val, tokenizer, cfg))
    validate = lambda plan: Score.of(evaluate(run, model, validation(), plan), validation())
    if not blob:
        blob = produce(run, model, steps, files, tokenizer.bos, result, validate)
    result.update(model_sha256=hashlib.sha256(blob).hexdigest(), model_bytes=len(blob),
                  total_bytes=result["code_bytes"] + len(blob), cap_bytes=CAP_BYTES)
    log("bytes: code:{code_bytes} model:{model_bytes} total:{total_bytes} cap:{cap_bytes}".format(**result)
        + " EXCEEDED" * (result["total_bytes"] > CAP_BYTES))
    with log.phase("open validation"):
        val = validation()
        log(f"validation: documents:{len(val.starts)} tokens:{len(val.token_bytes)} "
            f"bytes:{val.token_bytes.sum()} documents_a_byte_short:{val.begin_with_space} (a space first)")
    if has_weights:
        with log.phase("score unquantized"):
            unquantized = validate(depth_plan(cfg, cfg.loops_at_end))
            log(f"unquantized {unquantized}")
        result.update(val_loss_unquantized=unquantized.loss, val_bpb_unquantized=unquantized.bpb)
    with log.phase("open artifact", "scoring"):
        restore(model, unpack_artifact(blob, Path("artifact"))[1])
    nll = score(run, model, val, result)
    summarize(run, result)
    if cfg.save_scores and ranks.is_main:  # last: a full disk then costs no result
        file, token_bytes = io.BytesIO(), val.token_bytes.astype(np.uint16)
        np.savez(file, nll=nll.numpy(), token_bytes=token_bytes, document_starts=val.starts)
        write_file(Path(cfg.save_scores), file.getvalue())

def main(env: Mapping[str, str] = os.environ) -> int:
    """Run; returns the exit status, 2 after a mistake of the user's and one line that says what to change."""
    log = None
    try:
        cfg = Config.from_env(env)
        ranks = Ranks.join()
        saved = read_saved(Path(cfg.eval_only_path)) if cfg.eval_only_path and ranks.is_main else {}
        cfg = ranks.share(Config.from_env(env, saved.get("settings", {})))  # all go by the first's
        log = RunLog(cfg, ranks)
        run = Run(cfg, ranks, log, Ops.choose(cfg, ranks.device))
        compete(run, saved)
        return 0
    except (UserError, torch.OutOfMemoryError) as error:
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            phase = log.phases[-1].name if log and log.phases else "setup"
            message = (f"out of GPU memory in phase {phase}: lower TRAIN_BATCH_TOKENS (training), "
                       "VAL_BATCH_TOKENS (plain scores) or TTT_BATCH_SIZE (adaptation)")
    if int(os.environ.get("RANK", 0)):  # what fails rank 0 too is said by it alone: its end ends the others
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2

if __name__ == "__main__":
    try:
        status = main()
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)  # at once: threads of collectives may abort a slow end, or keep other ranks waiting
