"""Train, quantize and score a small GPT for the 16 MB / 10 minute language-model challenge, in one file.

    SEED=0 torchrun --standalone --nproc_per_node=8 train_gpt.py     # a record run on 8 Hopper GPUs
    PRESET=smoke python train_gpt.py                                 # the same pipeline, tiny, on a CPU
    EVAL_ONLY_PATH=runs/x/final_model.pt torchrun ... train_gpt.py   # score a checkpoint or an artifact again
    python train_gpt.py --help                                       # list all settings

Every setting is an environment variable, and the defaults are those of a record run. A run is a sequence of
phases; `run_phases`, near the end of the file, calls them in this order. Two clocks of 600 s count:

    setup                check settings, files and packages
    open training data   open the shards, and compare them with tokenizer and manifest
    warm-up              compile and run every training shape on random tokens, then restore all state
    train                Muon and AdamW; layers 3 to 5 repeat from 35 % of the clock on     | training clock
    calibrate            gather statistics for quantization on training batches             |
    export               pack the script, quantize and compress, write the artifact, read it back
    hash training data   wait for the hashes of the shards that were read
    open validation      not earlier, unless VAL_LOSS_EVERY asks for it, which is a caveat of the result
    count bytes          decode all validation documents: the table of bytes must agree with their text
    score unquantized    plain score of the averaged weights, for comparison
    open artifact        read the weights back from the artifact's bytes                    | scoring clock
    score quantized      plain score of these weights                                       |
    count n-grams        count what each document repeats                                   |
    prepare adaptation   compile and capture every shape on random tokens
    adapt                score-first test-time training for each document, mixed with the   | scoring clock
                         plain model and the document's n-grams: the headline
    report               add up the final score

Three things make the score count. Validation files are opened after the artifact has been written. `adapt`
scores a chunk of a document and only then learns from it. `Tally` ends the run if a target was scored twice,
or never; only past the scoring deadline may targets have no adapted score, and the log says so. docs/rules.md
holds each rule beside its test, and what remains arguable, such as the phases above that are on no clock.

    1 Settings               5 Hooks            9 Artifact                 13 The run
    2 Processes, log, files  6 Optimizers      10 Scores                    A Appendix: attention backends
    3 Data                   7 Training        11 Score-first adaptation      and Triton kernels, for what
    4 Model                  8 Quantization    12 Mixture                     section 4 marks with (kernel)

Letters in shapes and formulas, with their sizes in a record run:

    T  tokens of a buffer (98,304)   D  model width (512)   H  query heads (4)       V  vocabulary (8192)
    L  layers (11)                   M  MLP width (2048)    K  key/value heads (2)   E  width of a head (128)
    R  rotated dimensions of a head (32)

Arguments and results without a type are tensors or NumPy arrays, or as plain as their name says.
#1530 and the like are pull requests of https://github.com/openai/parameter-golf, the challenge.
"""
import time

PROCESS_START = time.perf_counter()  # before torch is loaded, so that phases count from here

import ast
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
import re
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

CAP_BYTES = 16_000_000  # code + model as files; decimal megabytes
CLOCK_SECONDS = 600  # of training, and again of scoring
MOST_PARAMETERS = 2**28  # more would leave half a bit for each; also bounds what a damaged file unpacks to

class UserError(Exception):
    """A mistake in settings, files or machine. Its text is one line that names what to change."""

@contextlib.contextmanager
def parsing(what: str) -> Iterator[None]:
    """Turn whatever foreign or damaged bytes raise into a UserError that names `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} was not made by this script, or is damaged: {error!r:.200}") from error

def lazy_import(name: str, remedy: str = "pip install -r requirements.txt") -> Any:
    """Import a package at its first use, so that importing this file needs only torch and numpy."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}): {remedy}") from error

# ---- 1 Settings --------------------------------------------------------------------------------------------

PRESETS = {  # sets of defaults; any variable overrides them
    "": {},
    "smoke": dict(  # the whole pipeline on the bundled Wikipedia text, four minutes on two CPU cores
        DATA_DIR="data/smoke-v3", VOCAB_SIZE=1024, NUM_LAYERS=7, MODEL_DIM=64, ROPE_DIMS=8,
        LOOP_START=2, LOOP_END=3, PARALLEL_START_LAYER=5, TRAIN_BATCH_TOKENS=2048,
        TRAIN_SEQ_LEN=256, EVAL_SEQ_LEN=256, TTT_EVAL_SEQ_LEN=256, VAL_BATCH_TOKENS=4096, ITERATIONS=400,
        MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=1, SMALL_BATCH_FRAC=0, TRAIN_LOG_EVERY=20, MATRIX_LR=0.08,
        MUON_MOMENTUM=0.9, MUON_MOMENTUM_WARMUP_START=0.85, QUANT_STATES=8, GPTQ_CALIBRATION_BATCHES=64,
        TTT_BATCH_SIZE=8, TTT_CHUNK_SIZE=32, TTT_LORA_RANK=8, TTT_LORA_LR=0.004,
        TTT_SITES="qkv,attn,mlp,head"),
    "single_gpu": dict(  # some two minutes of one Hopper GPU, to compare changes; by tools/sweep.py
        TRAIN_BATCH_TOKENS=196_608, TRAIN_BUFFERS=2, ITERATIONS=400, MAX_WALLCLOCK_SECONDS=0, MATRIX_LR=0.04,
        TIED_EMBED_LR=0.045, SCALAR_LR=0.03, SMALL_BATCH_FRAC=0, TRAIN_LOG_EVERY=50, TTT_ENABLED=0),
}
ADAPTER_SITES = {  # the sites of a forward pass that can have adapters, and the names of these
    "qkv": ("q", "k", "v"),
    "attn": ("attn",),
    "mlp": ("mlp",),
    "head": ("head",),
}

def knob(default, low=None, high=math.inf, *, kind="", choices=()):
    """A setting: its default, the range or the choices of its value, and of which kind it is.

    kind "run": concerns this run alone and is not saved with a model. "model": part of what a saved model is;
    scoring it again with another value is refused. "quantization": with another value the same weights give
    another artifact, so a checkpoint is calibrated and exported again. Any other setting is saved with a
    model and may be changed when that is scored again. A setting may be of two kinds.
    """
    return dataclasses.field(default=default, metadata=dict(low=low, high=high, kind=kind, choices=choices))

@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting. The field train_seq_len is the environment variable TRAIN_SEQ_LEN, and so on."""

    # the run
    preset: str = knob("", kind="run")  # smoke: tiny settings for a CPU; single_gpu: short runs to compare
    seed: int = knob(1337, 0, 2**63 - 1, kind="model quantization")  # weights, shard order, initial adapters
    run_id: str = knob("", kind="run")  # name of the run; default: date, time and seed
    artifact_dir: str = knob("", kind="run")  # folder for the run's files; default: runs/RUN_ID
    data_dir: str = knob("./data", kind="run")  # looked up from the working directory, then beside the script
    eval_only_path: str = knob("", kind="run")  # artifact (.int6.ptz) or checkpoint (.pt) to score again
    save_scores: str = knob("", kind="run")  # write the loss of every target to this .npz file
    attention: str = knob("auto", choices=("auto", "flash3", "varlen", "sdpa"), kind="run")  # implementation
    # data and batches
    vocab_size: int = knob(8192, 1, 65536, kind="model")  # pieces of the tokenizer; part of data file names
    train_batch_tokens: int = knob(786_432, 8, kind="quantization")  # tokens of a full step, all ranks
    train_buffers: int = knob(8, 1, kind="quantization")  # micro-batches that these fill, or more: split_step
    train_seq_len: int = knob(3072, 3, 2**24, kind="quantization")  # longest span in the end; first a third
    val_batch_tokens: int = knob(524_288, 1)  # plain evaluation: a forward takes this / max(8, ranks)
    eval_seq_len: int = knob(3072, 1, 2**24)  # longest context in plain evaluation
    val_doc_fraction: float = knob(1.0, 1e-9, 1.0, kind="run")  # score this first part of the documents only
    # model
    num_layers: int = knob(11, 1, 1000, kind="model")  # layers with weights of their own
    model_dim: int = knob(512, 1, kind="model")  # width of the residual stream
    num_heads: int = knob(4, 1, kind="model")  # query heads
    num_kv_heads: int = knob(2, 1, kind="model")  # key/value heads
    mlp_mult: float = knob(4.0, 1e-3, 1e3, kind="model")  # hidden width of the MLP over MODEL_DIM
    rope_dims: int = knob(32, 0, kind="model")  # dimensions of each head that are rotated by position
    rope_base: float = knob(10_000.0, 1.0, kind="model")  # base of the rotation's frequencies
    qk_gain_init: float = knob(5.0, 0.0)  # initial gain of each query head
    logit_softcap: float = knob(30.0, 1e-3, 40.0, kind="model")  # logits stay within plus and minus this
    tied_embed_init_std: float = knob(0.005, 0.0)  # initial standard deviation of the embedding
    num_loops: int = knob(2, 0, 100, kind="model")  # extra passes over layers LOOP_START to LOOP_END
    loop_start: int = knob(3, 0, kind="model")  # first layer of the loop
    loop_end: int = knob(5, 0, kind="model")  # last layer of the loop
    enable_looping_at: float = knob(0.35, 0.0, 1.0, kind="model")  # fraction done when loops begin; 1: never
    parallel_start_layer: int = knob(8, 0, kind="model")  # first decoder layer with parallel sublayers
    # schedule
    iterations: int = knob(20_000, 1)  # most optimizer steps
    max_wallclock_seconds: float = knob(600.0, 0.0)  # training clock, calibration included; 0: count steps
    warmup_steps: int = knob(1, 1)  # untimed steps of each shape of buffers and depth that go together
    small_batch_frac: float = knob(0.2, 0.0, 1.0)  # first fraction of training, with half the tokens a step
    warmdown_frac: float = knob(0.85, 0.0, 1.0)  # last fraction of training, in which learning rates fall
    min_lr: float = knob(0.1, 0.0, 1.0)  # floor of the learning rates, relative to their peak
    train_log_every: int = knob(500, 1, kind="run")  # steps between log lines
    val_loss_every: int = knob(0, 0, kind="run")  # steps between plain validations in training; 0: never
    # optimizers
    matrix_lr: float = knob(0.026, 0.0)  # Muon, for all matrices of the layers
    muon_momentum: float = knob(0.97, 0.0, 1.0)  # Nesterov momentum
    muon_momentum_warmup_start: float = knob(0.92, 0.0, 1.0)  # momentum of the first step
    muon_momentum_warmup_steps: int = knob(1500, 0)  # full steps to full momentum, at most .31 of the run
    muon_backend_steps: int = knob(5, 1)  # Newton-Schulz iterations
    muon_wd: float = knob(0.095, 0.0)  # weight decay, decoupled as everywhere
    tied_embed_lr: float = knob(0.03, 0.0)  # AdamW, for the embedding
    embed_wd: float = knob(0.085, 0.0)  # weight decay of the embedding
    scalar_lr: float = knob(0.02, 0.0)  # AdamW, for gains, scales, gates and mixes
    adam_wd: float = knob(0.02, 0.0)  # weight decay of these
    beta1: float = knob(0.9, 0.0, 0.999999)  # AdamW
    beta2: float = knob(0.99, 0.0, 0.999999)  # AdamW
    adam_eps: float = knob(1e-8, 0.0)  # AdamW
    grad_clip_norm: float = knob(0.3, 0.0)  # limit of the global gradient's norm after reduction; 0: none
    ema_decay: float = knob(0.9965, 0.0, 0.999999)  # final decay of the exported average of weights
    # quantization
    quant_states: int = knob(64, choices=(1, 4, 8, 16, 32, 64), kind="quantization")  # states of the trellis
    gptq_calibration_batches: int = knob(16, 1, kind="quantization")  # training buffers, over all ranks
    gptq_reserve_seconds: float = knob(4.0, 0.0)  # end of the clock kept for calibration; set 8 on 1 GPU
    # test-time training
    ttt_enabled: bool = knob(True)  # 0: the plain score of the quantized model is the headline
    ttt_sites: str = knob("qkv,attn,head")  # which of qkv, attn, mlp and head have adapters, in this order
    ttt_lora_rank: int = knob(80, 1)  # rank of every adapter
    ttt_lora_lr: float = knob(2e-4, 0.0)  # AdamW, for adapters
    ttt_chunk_size: int = knob(24, 1)  # least number of tokens scored between two updates
    ttt_chunk_growth: float = knob(1 / 64, 0.0, 1.0)  # least size of a chunk over the tokens before it
    ttt_eval_seq_len: int = knob(3072, 1, 2**24)  # longest context, including the chunk that is scored
    ttt_batch_size: int = knob(64, 1)  # documents that advance together on a rank
    ttt_weight_decay: float = knob(0.5, 0.0)  # weight decay of adapters
    ttt_beta2: float = knob(0.99, 0.0, 0.999999)  # AdamW, for adapters; beta 1 is 0
    eval_max_seconds: float = knob(600.0, 0.0, kind="run")  # scoring clock; adaptation ends at 99 %; 0: none

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, saved: Mapping[str, Any] = {}) -> "Config":
        """Settings from `env`, else as `saved` with a model, else from the preset, else the defaults.

        UserError names a variable that was dropped, is misspelt or has an impossible value.
        """
        knobs = {field.name.upper(): field for field in dataclasses.fields(cls)}
        refuse_unknown_variables(env, knobs)
        unlike = saved and saved.keys() ^ cls().to_save().keys()
        if unlike:
            names = " ".join(sorted(map(str, unlike)))
            raise UserError("EVAL_ONLY_PATH was made by another version of this script, whose settings "
                            f"differ: {names:.200}")
        preset = env.get("PRESET", "")
        if preset not in PRESETS:
            raise UserError(f"PRESET={preset!r} is none of {[*PRESETS]}")
        values = dict(PRESETS[preset])
        values.update((name.upper(), value) for name, value in saved.items())
        values.update((name, env[name]) for name in knobs if env.get(name))
        return cls(**{name.lower(): parse_setting(name, values[name], type(knobs[name].default))
                      for name in values})

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))
        buffer = self.train_batch_tokens // self.train_buffers
        sites = self.ttt_sites.split(",")
        for wrong, names, why in (
            (self.model_dim % self.num_heads or self.num_heads % self.num_kv_heads,
             "model_dim num_heads num_kv_heads", "must each be a multiple of the next"),
            (self.rope_dims % 2 or self.rope_dims > self.head_dim, "rope_dims model_dim num_heads",
             "must give an even number of dimensions of a head"),
            (self.model_dim * self.mlp_mult % 1, "model_dim mlp_mult", "give a fractional width"),
            (self.parameters > MOST_PARAMETERS, "num_layers model_dim mlp_mult vocab_size",
             f"give {self.parameters:.3g} parameters, too many for {CAP_BYTES} bytes"),
            (self.num_loops and not
             self.loop_start <= self.loop_end < min(self.num_layers, self.parallel_start_layer),
             "loop_start loop_end num_layers parallel_start_layer",
             "need LOOP_START <= LOOP_END < min(NUM_LAYERS, PARALLEL_START_LAYER)"),
            (self.train_batch_tokens % self.train_buffers or self.train_seq_len > buffer,
             "train_batch_tokens train_buffers train_seq_len",
             "a step must be that many buffers of at least a span each"),
            (self.ttt_chunk_size > self.ttt_eval_seq_len, "ttt_eval_seq_len ttt_chunk_size",
             "a window must hold a chunk"),
            (sites != [site for site in ADAPTER_SITES if site in sites], "ttt_sites",
             "is none of qkv,attn,mlp,head, or not in this order"),
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
    def parameters(self) -> int:
        """Weights of all matrices; vectors are few."""
        by_layer = 2 * (self.model_dim + self.kv_dim + self.mlp_dim)
        return self.model_dim * (self.vocab_size + self.num_layers * by_layer)

    @property
    def loops_at_end(self) -> bool:
        return self.num_loops > 0 and self.enable_looping_at < 1

    def loops_at(self, progress: float) -> bool:
        """Whether layers are looped at this fraction of training."""
        return self.loops_at_end and progress >= self.enable_looping_at

    @classmethod
    def names(cls, kind: str) -> list[str]:
        """The settings of a kind, in order."""
        return [field.name for field in dataclasses.fields(cls) if kind in field.metadata["kind"].split()]

    def pick(self, kind: str) -> dict[str, Any]:
        """The values of the settings of a kind."""
        return {name: getattr(self, name) for name in self.names(kind)}

    def to_save(self) -> dict[str, Any]:
        """What is saved with a model, so that it can be scored again as it was."""
        not_saved = self.names("run")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in not_saved}

DROPPED = {  # settings of earlier scripts of this lineage that would change nothing here, and so are refused
    "always on, as in the record": "TIE_EMBEDDINGS XSA_LAST_N SKIP_GATES_ENABLED LN_SCALE MUON_ROW_NORMALIZE",
    "replaced by TTT_SITES": "TTT_K_LORA TTT_MLP_LORA TTT_O_LORA",
    "not part of this system": "ROPE_TRAIN_SEQ_LEN ROPE_YARN PARALLEL_FINAL_LANE MUON_BETA2 TTT_OPTIMIZER "
                               "TTT_BETA1 TTT_GRAD_STEPS COMPRESSOR CONTROL_TENSOR_NAME_PATTERNS",
    "replaced by MODEL_DIM": "EMBEDDING_DIM",
    "replaced by DATA_DIR": "DATA_PATH TOKENIZER_PATH",
    "replaced by VAL_BATCH_TOKENS": "VAL_BATCH_SIZE",
    "replaced by WARMDOWN_FRAC": "WARMDOWN_ITERS",
    "replaced by TIED_EMBED_LR": "EMBED_LR HEAD_LR",
    "replaced by the windows of test-time training (TTT_CHUNK_SIZE)": "SLIDING_WINDOW_ENABLED EVAL_STRIDE",
    "replaced by VAL_DOC_FRACTION": "TTT_EVAL_BATCHES",
    "replaced by SAVE_SCORES": "TTT_OUTPUT_DIR",
    "bin widths follow from sensitivity and cap": "MATRIX_BITS EMBED_BITS MATRIX_CLIP_SIGMAS "
                                                  "ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS EMBED_CLIP_SIGMAS",
}

def refuse_unknown_variables(env: Mapping[str, str], knobs: Mapping[str, Any]):
    """UserError for a variable that is no setting but was one once, or looks as if it was meant to be one."""
    for why, names in DROPPED.items():
        for name in names.split():
            if env.get(name):
                raise UserError(f"{name} is not a setting of this script ({why}): unset it")
    for name in set(env) - set(knobs):
        close = difflib.get_close_matches(name.upper(), knobs, 1, cutoff=0.9)
        if close or name.startswith(("TTT_", "GPTQ_", "MUON_")):
            hint = f"did you mean {close[0]}?" if close else "unset it or look up its name"
            raise UserError(f"{name} is not a setting of this script: {hint}")

def parse_setting(name: str, value: Any, kind: type) -> Any:
    """The value of a variable, a preset or a saved setting as bool, int, float or str."""
    text = str(int(value)) if isinstance(value, bool) else str(value)
    with contextlib.suppress(KeyError, ValueError):
        parsed = {"0": False, "1": True}[text] if kind is bool else kind(text)
        if kind is str or abs(parsed) < (math.inf if kind is float else 2**63):  # false for NaN, too
            return parsed
    wanted = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{name}={text!r} is not {wanted}")

def check_setting(field: dataclasses.Field, value: Any):
    """UserError if the value is out of the range, or none of the choices, of its knob."""
    name = field.name.upper()
    low = field.metadata["low"]
    high = field.metadata["high"]
    choices = field.metadata["choices"]
    if low is not None and not low <= value <= high:
        raise UserError(f"{name}={value} is out of range, from {low} to {high}")
    if choices and value not in choices:
        raise UserError(f"{name}={value!r} is none of {[*choices]}")

def setting_comments() -> dict[str, str]:
    """The comment beside each field of Config, by the field's name; none in a packed script, where comments
    are gone.
    """
    return dict(re.findall(r"^    (\w+): \w+ = knob\(.*\)  # (.+)$", script_source(), flags=re.M))

def settings_help() -> str:
    """The settings as --help prints them: variable, default, meaning."""
    comments = setting_comments()
    rows = ["settings, which are environment variables, with their defaults:"]
    for field in dataclasses.fields(Config):
        comment = comments.get(field.name, "")
        rows.append(f"  {field.name.upper():27} {field.default!s:15} {comment}".rstrip())
    return "\n".join(rows)

# ---- 2 Processes, log, files -------------------------------------------------------------------------------

class Ranks:
    """The processes of a run: which one this is, its device, and the collectives that the script needs.

    With a single process, the collectives return what they are given.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, device: str = "cpu"):
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.is_main = rank == 0
        self.on_gpu = self.device.type == "cuda"

    @classmethod
    def join(cls) -> "Ranks":
        """Take the place that torchrun assigned to this process; without torchrun it is the only one."""
        rank, world_size, local_rank = launcher_variables()
        gpus = torch.cuda.device_count()
        if gpus and local_rank >= gpus:
            raise UserError(f"--nproc_per_node is too large: this machine has {gpus} GPUs, none for "
                            f"{local_rank}")
        if gpus:
            torch.cuda.set_device(local_rank)
        if world_size > 1:  # gloo beside NCCL: what the host has to know must not wait for the GPU
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            try:
                dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
            except (RuntimeError, ValueError) as error:
                raise UserError(f"the processes cannot meet at MASTER_ADDR and MASTER_PORT, which torchrun "
                                f"sets (--master_port chooses another): {error!s:.200}") from error
        return cls(rank, world_size, f"cuda:{local_rank}" if gpus else "cpu")

    def synchronize(self):
        """Wait until the device has done all that it was sent."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def all_reduce_(self, tensor):
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor, source: int = 0):
        """The values of rank `source` on all ranks, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def all_reduce_max(self, value: float) -> float:
        """The largest value of any rank, through the host."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def barrier(self):
        """Wait until all ranks are here."""
        self.all_reduce_max(0.0)

    def broadcast_object(self, value: Any) -> Any:
        """The object of rank 0, on every rank."""
        objects = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(objects, src=0, device=torch.device("cpu"))
        return objects[0]

def launcher_variables() -> tuple[int, int, int]:
    """Rank, world size and local rank as torchrun sets them, or those of a single process: 0, 1, 0."""
    given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if given == [None] * 3:
        return 0, 1, 0
    with contextlib.suppress(TypeError, ValueError):
        rank, world_size, local_rank = map(int, given)
        if 0 <= rank < world_size and local_rank >= 0:
            return rank, world_size, local_rank
    raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK are {given}: torchrun sets all three, with RANK < "
                    "WORLD_SIZE; start with torchrun, or unset them")

def ceil_div(a, b):
    return -(-a // b)

def assign_balanced(costs: Iterable[float], parts: int):
    """Share items out greedily: each goes to the part with the least cost so far. (items,) part of each."""
    load = np.zeros(parts)
    assigned = []
    for cost in costs:
        lightest = load.argmin()
        load[lightest] += cost
        assigned.append(lightest)
    return np.array(assigned, dtype=np.int64)

def write_file(path: Path, data: bytes):
    """Write all of a file or nothing: to another name, through to the disk, then rename."""
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

def sha256(data: Any) -> str:
    """SHA-256 of bytes or of an array, in hex."""
    return hashlib.sha256(data).hexdigest()

def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hex. It is memory-mapped, and hashing releases the GIL."""
    try:
        return sha256(np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else b"")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error

@functools.cache
def script_source() -> str:
    """The source of this script, read once; of a packed one, what it unpacked (see PACKED)."""
    return globals().get("SOURCE") or Path(__file__).read_text(encoding="utf-8")

def say(text: str, stream: Any = None):
    """Print a line. A console that is full, gone or of another encoding costs no more than the line."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, flush=True)

def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"

@dataclasses.dataclass
class Phase:
    """A part of the run, and the clock it counts against: "training", "scoring" or none."""
    name: str
    clock: str
    began: float = dataclasses.field(default_factory=time.perf_counter)
    seconds: float = 0.0  # once it has ended

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let the phase's clock stand still."""
        since = time.perf_counter()
        yield
        self.began += time.perf_counter() - since

RUN_FILES = ("log.txt", "metrics.jsonl", "train_gpt_packed.py", "final_model.pt", "final_model.int6.ptz",
             "result.json")

class RunLog:
    """What a run leaves to read, written by rank 0: log.txt, metrics.jsonl, some 60 lines on the console."""

    def __init__(self, cfg: Config, ranks: Ranks, began: float):
        """`began`: when imports had ended, and ranks began to join (perf_counter)."""
        self.ranks = ranks
        self.run_id = cfg.run_id
        self.folder = Path(cfg.artifact_dir)
        self.is_new_folder = True
        self.files = {}
        self.caveats: list[str] = []
        problem = None
        try:
            if ranks.is_main:
                self.claim_folder(cfg)
        except OSError as error:
            problem = f"ARTIFACT_DIR={self.folder}, the run's folder, cannot be used: {error.strerror}"
        self.run_id, self.folder, problem = ranks.broadcast_object((self.run_id, self.folder, problem))
        if problem:
            raise UserError(problem)
        self.phases = [Phase("imports", "", PROCESS_START, began - PROCESS_START),
                       Phase("join", "", began, time.perf_counter() - began)]

    def claim_folder(self, cfg: Config):
        """Take a folder for this run alone and create its log files; OSError if another run has files there.

        Of two runs that start at once one gets it, as files and folders are created only if they are not
        there. A default name that is taken gets a number.
        """
        default_id = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-seed{cfg.seed}"
        self.run_id = cfg.run_id or default_id
        if cfg.artifact_dir or cfg.run_id:
            self.folder = Path(cfg.artifact_dir or Path("runs", cfg.run_id))
            self.is_new_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            self.folder = Path("runs")
            self.folder.mkdir(exist_ok=True)
            for number in itertools.count(2):
                self.folder = Path("runs", self.run_id)
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir()
                    break
                self.run_id = f"{default_id}-{number}"
        for name in RUN_FILES:
            if (self.folder / name).exists():
                raise OSError(0, f"it holds {name} of another run; name another folder, or move that away")
        for name in ("log.txt", "metrics.jsonl"):
            self.files[name] = open(self.folder / name, "x", encoding="utf-8", errors="surrogateescape")

    def under_way(self) -> str:
        """The phases that have begun and not ended."""
        return ", ".join(phase.name for phase in self.phases if not phase.seconds)

    def withdraw(self):
        """Delete the files of a run that a mistake ended before its warm-up; the next can have its folder."""
        later_phases = {phase.name for phase in self.phases} - {
            "imports", "join", "setup", "open training data"}
        if self.files and not later_phases:
            for file in self.files.values():
                file.close()
            self.files = {}
            for name in RUN_FILES:  # all this run's, as there were none
                (self.folder / name).unlink(missing_ok=True)
            if self.is_new_folder:
                self.folder.rmdir()

    def write(self, name: str, line: str):
        if self.files:
            try:
                print(line, file=self.files[name], flush=True)
            except OSError as error:
                raise UserError(f"cannot write {self.folder / name}: {error.strerror}") from error

    def __call__(self, message: str, console: bool = True):
        """Add lines to the log and, unless told otherwise, to the console."""
        self.write("log.txt", message)
        if console and self.files:
            say(message)

    def caveat(self, why: str):
        """Log why the result would not count as a record; it will be among its caveats."""
        self(why)
        self.caveats.append(why)

    def metrics(self, kind: str, **values: Any):
        """Add a row to metrics.jsonl, with the Unix time."""
        self.write("metrics.jsonl", json.dumps({"kind": kind, "time": time.time(), **values}))

    @contextlib.contextmanager
    def phase(self, name: str, clock: str = "") -> Iterator[Phase]:
        """A phase of the run. It ends when the slowest rank does; on a clock it starts when all are here."""
        if clock:
            self.ranks.barrier()
        phase = Phase(name, clock)
        self.phases.append(phase)
        yield phase
        self.ranks.synchronize()
        phase.seconds = self.ranks.all_reduce_max(phase.elapsed())
        self.metrics("phase", name=name, clock=clock, seconds=phase.seconds)

    def spent(self, clock: str) -> float:
        """Seconds of all phases of a clock that have ended."""
        return sum(phase.seconds for phase in self.phases if phase.clock == clock)

class Run(NamedTuple):
    """What every phase needs."""
    cfg: Config
    ranks: Ranks
    log: RunLog
    backend: "Backend"

# ---- 3 Data ------------------------------------------------------------------------------------------------
# A shard is a header of 256 little-endian int32 (magic number, version, count of tokens) and then that many
# uint16 tokens. Every document starts with BOS. A span is what attention sees as one context: a document, or
# a piece of a long one. Spans are packed end to end into flat buffers, with no padding between them.

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 1024
IGNORE = -1  # the target of a position that predicts nothing

class DataFiles(NamedTuple):
    """Where the data of a run are."""
    tokenizer: Path
    train: list[Path]
    val: list[Path]

    @property
    def manifest(self) -> Path:
        return self.val[0].with_name("manifest.json")

def find_data(cfg: Config, need_train: bool) -> DataFiles:
    """Locate tokenizer and shards by name, without opening any. UserError says what is missing, and where."""
    # Look in the working directory, then beside the script; dict.fromkeys drops a repetition of the first.
    roots = dict.fromkeys(root / cfg.data_dir for root in (Path.cwd(), Path(__file__).resolve().parent))
    name = f"datasets/fineweb10B_sp{cfg.vocab_size}"
    root = next((root for root in roots if (root / name).is_dir()), None)
    if root is None:
        there = [path.name for root in roots for path in root.glob("datasets/*")]
        raise UserError(f"DATA_DIR={cfg.data_dir}: no {name} in any of {[*map(str, roots)]}, "
                        f"whose datasets are {there}. For a saved model, name the data of its training; get "
                        "others from data/download.py or data/prepare.py")
    folder = root / name
    files = DataFiles(
        tokenizer=root / f"tokenizers/fineweb_{cfg.vocab_size}_bpe.model",
        train=sorted(folder.glob("fineweb_train_*.bin")),
        val=sorted(folder.glob("fineweb_val_[0-9]*.bin")))
    for missing, path in ((not files.tokenizer.is_file(), files.tokenizer),
                          (need_train and not files.train, folder / "fineweb_train_*.bin"),
                          (not files.val, folder / "fineweb_val_*.bin")):
        if missing:
            raise UserError(f"DATA_DIR={cfg.data_dir}: there is no {path}")
    if [path.name for path in files.val] != [f"fineweb_val_{i:06}.bin" for i in range(len(files.val))]:
        raise UserError(f"{folder}/fineweb_val_*.bin are not numbered from 000000 without a gap")
    return files

class Manifest(NamedTuple):
    """What data/prepare.py says of the files that it made; empty if there is no such file beside them."""
    hashes: dict[str, str]  # SHA-256 of shards and tokenizer, by name
    train_tokens: int
    case_ops: str = ""  # the transform of the text, if it has one

    @classmethod
    def read(cls, path: Path, log: RunLog) -> "Manifest":
        """Read it; one of another tool is named in the log and then ignored."""
        if path.is_file():
            with contextlib.suppress(ArithmeticError, ValueError, KeyError, TypeError, RecursionError):
                content = json.loads(read_file(path))
                tokenizer, train, val = content["tokenizer"], content["train"], content["val"]
                hashes = {tokenizer["file"]: tokenizer["sha256"], **train["shards"], **val["shards"]}
                manifest = cls(hashes, int(train["tokens"]), str(content.get("case_ops", "")))
                log(f"{path}: {len(hashes)} files are compared with it")
                return manifest
            log(f"{path} is not one of data/prepare.py: nothing is compared with it")
        return cls({}, 0)

    def fault(self, path: Path, digest: str) -> str:
        """What is wrong with a file of this SHA-256; nothing if it is as it was made."""
        if self.hashes and self.hashes.get(path.name) != digest:
            return f"{path} differs from what manifest.json says, or is not listed there"
        return ""

    def check_train(self, paths: list[Path], tokens: int):
        """UserError if the training shards are all there but do not add up to the manifest's tokens."""
        made = [name for name in self.hashes if "_train_" in name]
        if len(made) == len(paths) and tokens != self.train_tokens:
            raise UserError(f"{paths[0].parent}: training shards hold {tokens} tokens, but "
                            f"{self.train_tokens} by manifest.json: make the data again")

    def check_val(self, paths: list[Path]):
        """UserError if the validation shards are not all that were made, to the byte."""
        made = {name: digest for name, digest in self.hashes.items() if "_val_" in name}
        there = {path.name: sha256_of_file(path) for path in paths if made}
        for name in sorted(made | there):
            if made.get(name) != there.get(name):
                raise UserError(f"{paths[0].parent}: {name} is not as manifest.json says: make the data "
                                "again; EVAL_ONLY_PATH scores what has been trained")

def open_shard(path: Path):
    """Memory-map the tokens of a shard, (count,) uint16. UserError if it is not what its header says."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is not a token shard: it does not start with {SHARD_MAGIC}, {SHARD_VERSION}")
    count = int(header[2])
    held = (size - HEADER_BYTES) / 2
    if count <= 0 or held != count:
        fault = "empty" if count <= 0 else "truncated" if held < count else "over-long"
        raise UserError(f"{path} is {fault}: its header says {count} tokens, it holds {held:g}; "
                        "make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))

def check_tokens(tokens, vocab_size: int, path: Path):
    """UserError if a shard holds tokens that the vocabulary does not have."""
    if tokens.size and tokens.max() >= vocab_size:
        raise UserError(f"{path} holds token {tokens.max()}, but VOCAB_SIZE={vocab_size}: it is from another "
                        "tokenizer")

# Case operations write capitals as markers in front of small letters (data/case_ops.py). The last one is ESC:
# it stands before a marker of the text itself. The others are operations, unless they are escaped.
MARKERS = "\ue001\ue002\ue003\ue004"

class Tokenizer(NamedTuple):
    """What scoring needs to know of each piece; arrays are (vocab_size,)."""
    bos: int
    piece_bytes: np.ndarray  # of the piece, without a space that it begins with
    leading_space: np.ndarray  # whether it begins with a space
    is_special: np.ndarray  # control, unknown or unused: it stands for no text
    sha256: str = ""  # of its file
    processor: Any = None  # sentencepiece's
    markers: tuple[int, ...] = ()  # pieces of MARKERS, if it is for text with case operations

    def is_silent(self, tokens):
        """Whether each token adds no text: an operation, or an ESC that is not itself escaped."""
        escaped = np.zeros(len(tokens) + 1, dtype=bool)
        for place in np.flatnonzero(np.isin(tokens, self.markers[-1:])):  # of ESC; hardly any text has one
            escaped[place + 1] = not escaped[place]
        return np.isin(tokens, self.markers) & ~escaped[:-1]

    def target_bytes(self, tokens):
        """UTF-8 bytes that every token but the first adds to the text, (len(tokens) - 1,).

        A piece's leading space counts unless the token before it is special. This is the challenge's rule. It
        gives the bytes of the text as the tokenizer normalised it, without a space that begins a document.
        Silent tokens add nothing, and the others count as if these were not there.
        """
        heard = np.flatnonzero(~self.is_silent(tokens))
        before, target = tokens[heard[:-1]], tokens[heard[1:]]
        counts_space = self.leading_space[target] & ~self.is_special[before]
        sizes = np.zeros(len(tokens), dtype=np.int64)
        sizes[heard[1:]] = self.piece_bytes[target] + counts_space
        return sizes[1:]

    def changes(self) -> list[str]:
        """Which kinds of text it changes; bytes are counted after that."""
        examples = {"compatibility characters": "\ufb01 \u00bd", "repeated spaces": "a  b",
                    "line breaks": "a\nb", "spaces at the end": "a "}
        return [name for name, text in examples.items()
                if self.processor.decode(self.processor.encode(text)) != text]

    def check_source(self, documents: list, path: Path):
        """UserError unless 9 of 10 documents (BOS first) come back if they are decoded and encoded again."""
        ids = [document[1:].tolist() for document in documents]
        again = self.processor.encode(self.processor.decode(ids))
        same = sum(before == after for before, after in zip(ids, again))
        if 10 * same < 9 * len(ids):
            raise UserError(f"{path}: {same} of {len(ids)} documents come back when they are decoded and "
                            "encoded again: it is from another tokenizer")

    def check_bytes(self, documents: Iterable, path: Path):
        """UserError if the text of a document (BOS first), decoded, has other bytes than target_bytes says.

        It may begin with a space, which does not count. Broken UTF-8, which decodes to U+FFFD, has bytes that
        no text has.
        """
        for document in documents:
            counted = int(self.target_bytes(document).sum())
            text = self.processor.decode(document[1:].tolist())
            if self.markers:
                text = re.sub(f"{MARKERS[-1]}(.)|[{MARKERS}]", r"\1", text, flags=re.DOTALL)
            size = len(text.encode())
            if counted not in (size, size - text.startswith(" ")) and "\ufffd" not in text:
                raise UserError(f"{path}: the document that begins {text[:40]!r} has {size} bytes, but "
                                f"{counted} by the table of pieces: this tokenizer breaks the rule of bytes")

def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a SentencePiece model. UserError if it is damaged, of another size or breaks the byte rule."""
    # 1) Read it.
    data = read_file(path)
    try:
        sp = lazy_import("sentencepiece").SentencePieceProcessor()
        sp.LoadFromSerializedProto(data)
        pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a SentencePiece model, or damaged") from error
    if len(pieces) != vocab_size or sp.bos_id() < 0:
        raise UserError(f"{path} has {len(pieces)} pieces and BOS id {sp.bos_id()}; wanted are VOCAB_SIZE="
                        f"{vocab_size} pieces and a BOS to start every document")
    # 2) Count the bytes of every piece.
    is_special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
                           for i in range(vocab_size)])
    piece_bytes = np.zeros(vocab_size, dtype=np.int64)
    leading_space = np.zeros(vocab_size, dtype=bool)
    for i, piece in enumerate(pieces):
        if is_special[i]:
            continue
        text = piece.removeprefix("\u2581")
        if "\u2581" in text:
            raise UserError(f"{path}: piece {i} has a space inside, so the usual rule cannot count its bytes")
        if sp.is_byte(i):
            piece_bytes[i] = 1
        else:
            piece_bytes[i] = len(text.encode())
            leading_space[i] = text != piece
    if not leading_space.any():
        raise UserError(f"{path}: no piece begins with U+2581, which stands for a space in the rule of bytes")
    # 3) Find the markers, user-defined pieces of score 0. A learned piece of a single character has less.
    markers = tuple(map(sp.piece_to_id, MARKERS))
    if is_special[list(markers)].any() or any(map(sp.get_score, markers)):
        markers = ()
    return Tokenizer(sp.bos_id(), piece_bytes, leading_space, is_special, sha256(data), sp, markers)

class Spans(NamedTuple):
    """The spans of a packed buffer, in the form of FlashAttention's varlen functions."""
    cu_seqlens: Tensor  # (spans + 1,) int32 boundaries; repeated ones are empty spans
    positions: Tensor  # (T,) index of each token within its span
    max_seqlen: int  # no span is longer

class Batch(NamedTuple):
    """A packed buffer, the input of a forward pass."""
    tokens: Tensor  # (T,)
    targets: Tensor  # (T,) or (rows,): the token to predict, or IGNORE
    spans: Spans
    rows: Tensor | None = None  # (rows,) the positions that predict the targets; None: all do

def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a NamedTuple with all tensors in it, on the device; the host does not wait."""
    if isinstance(value, tuple):  # a NamedTuple; of plain tuples only () occurs, in Round.new_slots
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, Tensor) and device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value

def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a NamedTuple and of those nested in it, in order."""
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []

class CapturedCall(NamedTuple):
    """A call of a function as a CUDA graph, which starts all of its kernels at once."""
    graph: torch.cuda.CUDAGraph
    inputs: Any  # a NamedTuple with the memory that the graph reads
    output: Any  # what it writes, or None

    @classmethod
    def of(cls, function: Callable, inputs: Any, pool: tuple) -> "CapturedCall":
        """Capture function(inputs), which has run before and does not now; graphs of a pool share memory."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local" allows CUDA calls of other threads, such as NCCL's watchdog, while this one captures.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function(inputs)
        return cls(graph, inputs, output)

    def replay(self, inputs: Any) -> Any:
        """The output for other inputs of the same shapes; the next replay overwrites it."""
        for graph_input, tensor in zip(tensors_in(self.inputs), tensors_in(inputs), strict=True):
            graph_input.copy_(tensor)
        self.graph.replay()
        return self.output

def span_bounds(starts, total: int, max_len: int):
    """Boundaries of spans, (spans + 1,), for documents that begin at `starts` in a buffer of `total` tokens.

    A document longer than max_len is cut into spans of max_len and a remainder: starts 0 and 5, 12 tokens and
    max_len 4 give 0 4 5 9 12.
    """
    starts = np.union1d(starts, 0)
    lengths = np.diff(starts, append=total)
    spans = ceil_div(lengths, max_len)  # of each document
    first_span = np.cumsum(spans) - spans
    nth_span = np.arange(spans.sum()) - np.repeat(first_span, spans)
    return np.append(np.repeat(starts, spans) + nth_span * max_len, total)

def make_batch(tokens, targets, bounds, max_spans: int, max_len: int) -> Batch:
    """A batch whose shapes follow from len(tokens) and max_spans alone, so that compiled code always fits.

    If there are more than max_spans spans, the targets of the last ones do not count, and what these hold is
    cut into spans of max_len, without regard to documents.
    """
    total = len(tokens)
    if len(bounds) - 1 > max_spans:
        # Keep the first n spans and cut what follows them into spans of max_len, for the largest n that fits.
        spans_needed = np.arange(len(bounds)) + ceil_div(total - bounds, max_len)
        last_kept = np.flatnonzero(spans_needed <= max_spans)[-1]
        kept = bounds[: last_kept + 1]
        even_cuts = np.arange(kept[-1] + max_len, total, max_len)
        bounds = np.concatenate([kept, even_cuts, [total]])
        targets = np.where(np.arange(total) < kept[-1], targets, IGNORE)
    span_starts = np.repeat(bounds[:-1], np.diff(bounds))
    positions = np.arange(total) - span_starts
    empty_spans = np.full(max_spans + 1 - len(bounds), total)
    cu_seqlens = np.append(bounds, empty_spans).astype(np.int32)
    spans = Spans(torch.from_numpy(cu_seqlens), int64_tensor(positions), max_len)
    return Batch(int64_tensor(tokens), int64_tensor(targets), spans)

def int64_tensor(array) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))

def first_tokens(batch: Batch, count: int) -> Batch:
    """The first `count` positions of a batch."""
    spans = batch.spans
    cut = Spans(spans.cu_seqlens.clamp(max=count), spans.positions[:count], spans.max_seqlen)
    return Batch(batch.tokens[:count], batch.targets[:count], cut)

class PackedStep(NamedTuple):
    """The data of an optimizer step: its part of the stream, and how that is packed into buffers.

    The buffers of a step lie end to end; a packed position is one in their concatenation.
    """
    tokens: np.ndarray  # (step tokens,) in stream order
    targets: np.ndarray  # (step tokens,) in stream order
    bounds: np.ndarray  # (spans + 1,) boundaries of the spans, as packed
    offsets: np.ndarray  # (spans,) what to add to a span's packed positions to find it in the stream

    def bounds_in(self, start: int, size: int):
        """Boundaries of all spans, clipped to a buffer of `size` tokens at packed position `start`."""
        return np.clip(self.bounds - start, 0, size)

class BufferShape(NamedTuple):
    """The size of a training buffer, and that of its longest span."""
    tokens: int
    max_len: int

class Stage(NamedTuple):
    """Consecutive steps whose buffers have one shape."""
    first_step: int
    start: int  # where in the stream the first step begins
    shape: BufferShape

LENGTHEN_AT = (0.0, 0.1, 0.7)  # from here on in training, longest_span is one, two and three thirds of all

def longest_span(progress: float, cfg: Config) -> int:
    """In tokens: one, two or three thirds of train_seq_len (#2014)."""
    thirds = sum(progress >= begin for begin in LENGTHEN_AT)
    return cfg.train_seq_len * thirds // 3

class PackedLoader:
    """Training batches: the documents of a step, cut into spans and packed into buffers of equal work.

    Attention's work grows with the square of a span. If spans were packed end to end as they come, the buffer
    with the most attention work would have 9 % more of it than the mean (of web text in buffers of 98,304
    tokens), and the other seven GPUs would wait. So the spans of a step are balanced over its buffers, which
    all have the same shape. Attention never crosses a document (#1530).

    Which tokens a step sees follows from the shards, the settings, its index and when stages began: there is
    no cursor to save and restore, and any rank can make any buffer, whatever the number of ranks. Shards come
    in another order in every epoch.
    """

    def __init__(self, paths: list[Path], bos: int, cfg: Config, buffer_tokens: int,
                 hash_shards: bool = False):
        self.paths = paths
        self.bos = bos
        self.cfg = cfg
        self.buffer_tokens = buffer_tokens
        self.buffers_per_step = cfg.train_batch_tokens // buffer_tokens
        self.shards = [open_shard(path) for path in paths]
        self.epoch_tokens = sum(map(len, self.shards))
        self.stages = [Stage(0, 0, self.shape_at(0.0))]
        self.latest: tuple[int, Stage, PackedStep] | None = None
        self.shards_read: set[int] = set()
        # Every buffer is filled up with empty spans to max_spans, and each of these costs 13 us of attention,
        # forward and backward, on an H200. So max_spans, by shape, is only 4 above the most that was sampled;
        # a buffer with more spans loses the targets of the last ones.
        shapes = map(self.shape_at, sorted({*LENGTHEN_AT, cfg.small_batch_frac}))
        self.max_spans = {shape: self.sample_spans(shape) + 4 for shape in shapes}
        self.shards_read.clear()
        self.hasher = ThreadPoolExecutor(1) if hash_shards else None
        self.hashes: dict[int, Any] = {}  # of the shards that steps are read from: futures, by index

    def shape_at(self, progress: float) -> BufferShape:
        """Of buffers at this fraction of training: small first (pull request 163 of modded-nanogpt)."""
        is_small = progress < self.cfg.small_batch_frac
        return BufferShape(self.buffer_tokens // (2 if is_small else 1), longest_span(progress, self.cfg))

    def step_tokens(self, shape: BufferShape) -> int:
        return self.buffers_per_step * shape.tokens

    def stage_of(self, step_index: int) -> Stage:
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step_index)

    def start_of(self, step_index: int, stage: Stage) -> int:
        """Where in the stream a step of this stage begins."""
        return stage.start + (step_index - stage.first_step) * self.step_tokens(stage.shape)

    def begin_stage(self, first_step: int, shape: BufferShape):
        """Let buffers have this shape from this step on. With 0 the stream is read as if all steps had it."""
        start = self.start_of(first_step, self.stage_of(first_step))
        before = [stage for stage in self.stages if stage.first_step < first_step]
        self.stages = [*before, Stage(first_step, start, shape)]

    def sample_spans(self, shape: BufferShape) -> int:
        """The number of spans in the fullest buffer of some 16 steps."""
        total = self.step_tokens(shape)
        steps = max(1, self.epoch_tokens // total)
        most = ceil_div(shape.tokens, shape.max_len)
        for step_index in range(0, steps, ceil_div(steps, 16)):
            step = self.pack_step(step_index * total, shape)
            for start in range(0, total, shape.tokens):
                bounds = np.unique(step.bounds_in(start, shape.tokens))
                most = max(most, len(bounds) - 1)
        return most

    def check_documents(self, tokenizer: Tokenizer):
        """UserError if this tokenizer did not make the first documents of a shard, or miscounts their bytes.

        Looks at some 16 shards. One may lie inside a document and have no BOS, but not all of them.
        """
        found = 0
        step = ceil_div(len(self.shards), 16)
        for path, shard in zip(self.paths[::step], self.shards[::step]):
            beginning = shard[:1_000_000]
            check_tokens(beginning, self.cfg.vocab_size, path)
            parts = np.split(beginning, np.flatnonzero(beginning == self.bos)[:11])[1:]
            documents = parts[:-1] or parts  # the last part may be cut
            found += len(documents)
            tokenizer.check_source(documents, path)
            tokenizer.check_bytes(documents, path)
        if not found:
            raise UserError(f"{self.paths[0]} and others have no BOS (id {self.bos}) in their first million "
                            "tokens: they are from another tokenizer")

    def read_stream(self, start: int, count: int) -> tuple[np.ndarray, list[int]]:
        """`count` tokens of the endless stream from `start` on, and where among them shards begin."""
        pieces = []
        shard_starts = []
        have = 0
        while have < count:
            epoch, skip = divmod(start + have, self.epoch_tokens)
            for index in np.random.default_rng((self.cfg.seed, epoch)).permutation(len(self.shards)):
                piece = self.shards[index][skip : skip + count - have].astype(np.int64)
                if len(piece):
                    check_tokens(piece, self.cfg.vocab_size, self.paths[index])
                    if skip == 0:
                        shard_starts.append(have)
                    pieces.append(piece)
                    self.shards_read.add(int(index))
                    have += len(piece)
                skip = max(0, skip - len(self.shards[index]))
        return np.concatenate(pieces), shard_starts

    def pack_step(self, start: int, shape: BufferShape) -> PackedStep:
        """Cut the documents of a step that begins at `start` into spans; balance these over its buffers."""
        # 1) Read the step's part of the stream. The first token of a shard follows from nothing before it,
        #    unless it is a BOS, which ends the document before.
        total = self.step_tokens(shape)
        stream, shard_starts = self.read_stream(start, total + 1)
        tokens = stream[:-1]
        targets = stream[1:].copy()
        for place in shard_starts:
            if place and stream[place] != self.bos:
                targets[place - 1] = IGNORE
        # 2) Cut it into spans, none of which crosses a document or a shard.
        starts = np.union1d(np.flatnonzero(tokens == self.bos), np.array(shard_starts, dtype=np.int64))
        bounds = span_bounds(starts[starts < total], total, shape.max_len)
        lengths = np.diff(bounds)
        # 3) Assign spans to buffers, longest first. Sums of lengths become equal but for some tokens, and
        #    sums of squares nearly so.
        longest_first = np.argsort(-lengths, kind="stable")
        buffer_of_span = np.empty_like(lengths)
        buffer_of_span[longest_first] = assign_balanced(lengths[longest_first], self.buffers_per_step)
        # 4) Lay the buffers end to end; within each, spans keep the order of the stream. Where a sum of
        #    lengths is not quite a buffer's size, bounds_in cuts a span at the buffer's border.
        order = np.argsort(buffer_of_span, kind="stable")
        ends = np.cumsum(lengths[order])
        packed_starts = ends - lengths[order]
        return PackedStep(tokens, targets, np.append(0, ends), bounds[order] - packed_starts)

    def step(self, step_index: int, stage: Stage) -> PackedStep:
        """A packed step; the latest is kept, as all of its buffers are cut from it.

        A thread begins to hash the shards that it is the first to use; nothing here waits for that.
        """
        latest = self.latest
        if latest is None or latest[:2] != (step_index, stage):
            step = self.pack_step(self.start_of(step_index, stage), stage.shape)
            latest = self.latest = step_index, stage, step
            if self.hasher:
                for index in self.shards_read - self.hashes.keys():
                    self.hashes[index] = self.hasher.submit(sha256_of_file, self.paths[index])
        return latest[2]

    def buffer(self, buffer_index: int) -> Batch:
        """Buffer `buffer_index`, counted from the first step on."""
        step_index, place = divmod(buffer_index, self.buffers_per_step)
        stage = self.stage_of(step_index)
        step = self.step(step_index, stage)
        size, max_len = stage.shape
        bounds = step.bounds_in(place * size, size)
        packed = np.arange(place * size, (place + 1) * size)
        in_stream = packed + np.repeat(step.offsets, np.diff(bounds))  # spans elsewhere now have length 0
        return make_batch(step.tokens[in_stream], step.targets[in_stream], np.unique(bounds),
                          self.max_spans[stage.shape], max_len)

    def buffers(self, indices: Iterator[int], device: torch.device) -> Iterator[Batch]:
        """Buffers on the device; a thread reads and packs two of them ahead while the device computes."""
        with ThreadPoolExecutor(1) as pool:
            ahead = deque(pool.submit(self.buffer, n) for n in itertools.islice(indices, 2))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self.buffer, n) for n in itertools.islice(indices, 1))
                yield to_device(batch, device)

    def digest(self) -> str:
        """SHA-256 of all shards' names, lengths, first and last tokens; to read them whole takes too long."""
        parts = [(path.name, len(shard), shard[:4096].tobytes(), shard[-4096:].tobytes())
                 for path, shard in zip(self.paths, self.shards)]
        return sha256(repr(parts).encode())

class Validation(NamedTuple):
    """The validation stream in its own order. Target j is token j + 1.

    So the last target of a document is the BOS of the next. It is scored, at no bytes of text, as in the
    challenge's own evaluation.
    """
    tokens: np.ndarray  # (N,)
    token_bytes: np.ndarray  # (N - 1,) bytes of text of every target
    starts: np.ndarray  # (documents,) index of each document's BOS, and of its first target
    lengths: np.ndarray  # (documents,) targets of each
    begin_with_space: int  # documents whose first byte is not counted
    sha256: str = ""  # of the tokens in all files

    def documents(self, first: int, step: int) -> Iterator:
        """Every step-th document from the first on: its tokens from its BOS to its last target."""
        for start, length in zip(self.starts[first::step], self.lengths[first::step]):
            yield self.tokens[start : start + length + 1]

def find_sidecars(val: list[Path]) -> list[Path]:
    """The side-cars of validation shards, as far as they are there.

    A side-car has the form of a shard. Its entries are the bytes of the shard's tokens in the raw text.
    """
    paths = [path.with_name(path.name.replace("_val_", "_val_bytes_")) for path in val]
    return list(filter(Path.is_file, paths))

def read_sidecars(paths: list[Path], tokenizer: Tokenizer, stream, by_table):
    """Bytes of the raw text that every token of a stream stands for, (len(stream),).

    Side-cars hold the count where a tokenizer does not give the raw text back. UserError if they do not fit
    the stream, or their sum differs by more than 1 % from by_table, that of the lengths of pieces.
    """
    sizes = np.concatenate([open_shard(path) for path in paths]).astype(np.int64)
    if len(sizes) != len(stream):
        raise UserError(f"{paths[0]} and others have {len(sizes)} entries for {len(stream)} tokens")
    if sizes[tokenizer.is_silent(stream) | (stream == tokenizer.bos)].any():
        raise UserError(f"{paths[0]} or another gives bytes to a BOS or to a marker")
    if abs(sizes.sum() - by_table) > 0.01 * by_table:
        raise UserError(f"{paths[0]} and others have {sizes.sum()} bytes, but the table of pieces {by_table}")
    return sizes

def load_validation(paths: list[Path], tokenizer: Tokenizer, cfg: Config) -> Validation:
    """Read all validation shards as one stream. UserError if they are not documents of this tokenizer."""
    # 1) Read the shards.
    shards = [open_shard(path) for path in paths]
    for path, shard in zip(paths, shards):
        check_tokens(shard, cfg.vocab_size, path)
    stream = np.concatenate(shards)
    tokens = stream.astype(np.int64)
    by_table = tokenizer.target_bytes(tokens)
    # 2) Find the documents, and keep the first ones if VAL_DOC_FRACTION says so.
    starts = np.flatnonzero(tokens == tokenizer.bos)
    if not len(starts) or starts[0] != 0:
        raise UserError(f"{paths[0]} does not begin with BOS (id {tokenizer.bos}): it is from another "
                        "tokenizer")
    count = max(1, round(cfg.val_doc_fraction * len(starts)))
    if count < len(starts):
        tokens = tokens[: starts[count]]
        starts = starts[:count]
    lengths = np.diff(starts, append=len(tokens) - 1)
    documents = np.split(tokens, starts[1:65])
    tokenizer.check_source(documents[:-1] or documents, paths[0])  # the last one has no end, or is the rest
    # 3) Count the bytes of every target: by the pieces, or by side-cars where these cannot tell.
    token_bytes = by_table[: len(tokens) - 1]
    if not token_bytes.sum():
        raise UserError(f"{paths[0]}: the validation documents hold no text")
    heard = tokens[~tokenizer.is_silent(tokens)]
    first = heard[1:][heard[:-1] == tokenizer.bos]
    begin_with_space = int(tokenizer.leading_space[first].sum())
    sidecars = find_sidecars(paths)
    if sidecars and tokenizer.changes():
        token_bytes = read_sidecars(sidecars, tokenizer, stream, by_table.sum())[1 : len(tokens)]
        begin_with_space = 0
    return Validation(tokens, token_bytes, starts, lengths, begin_with_space, sha256(stream.tobytes()))

# ---- 4 Model -----------------------------------------------------------------------------------------------
# The network has 13 parameters: the embedding, four banks, and eight stacks of vectors. A bank stacks the
# matrices of one shape from all layers, so that Muon can shard it over ranks, and so that averaging and
# collectives touch few tensors. A Layer holds one layer's views into these, in compute dtype. A Plan is the
# order in which layers are visited. Hooks see or change what the linear maps compute; with them, calibration
# and test-time training use the same forward pass as training.
#
# This section is plain PyTorch that runs anywhere. On a Hopper GPU the functions marked (kernel) are replaced
# by the Triton kernels of the appendix, which compute the same up to rounding, in training partly to FP8.

class Plan(NamedTuple):
    """Order of visits. As in a U-net, each visit of the encoder pushes its output on a stack of skips, and
    each visit of the decoder pops one, while there are any.
    """
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    @property
    def visits(self) -> tuple[int, ...]:
        return self.encoder + self.decoder

def depth_plan(cfg: Config, looped: bool) -> Plan:
    """All layers in order or, looped, with the middle ones again: 0 1 2 3 4 5 3 4 | 5 3 4 5 6 7 8 9 10.

    Repeated layers deepen the model at no cost in bytes: https://arxiv.org/abs/1807.03819, #1204, #1493.
    """
    order = list(range(cfg.num_layers))
    if looped:
        order[cfg.loop_start : cfg.loop_end + 1] *= cfg.num_loops + 1
    half = len(order) // 2
    return Plan(tuple(order[:half]), tuple(order[half:]))

# Mathematics

NORM_EPS = torch.finfo(torch.float32).eps  # that of bf16, .0078, would drown an embedding of std .005

def norm(x):
    """Root-mean-square norm of the last dimension, in fp32."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=NORM_EPS)

def leaky_relu_squared(x):
    """(kernel) Squared as in Primer, https://arxiv.org/abs/2109.08668; leaky, with slope .5, since #549."""
    return F.leaky_relu(x, 0.5).square()

def apply_rotary(x, cos, sin):
    """Rotate the first dimensions of each head (T, heads, E) by position; the others know no position.

    https://arxiv.org/abs/2104.09864
    """
    n = cos.size(-1)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)

def split_heads(qkv, gain, cos, sin, positions, K: int):
    """(kernel) Split a product into heads; norm and rotate queries and keys, and scale queries by a gain.

    qkv (T, (H + 2K) E), gain (H,), cos and sin (longest span, 1, R / 2), positions (T,) -> q, k and v
    (T, H, E), and once more v as it was before repetition (T, K, E). Normed queries and keys:
    https://arxiv.org/abs/2010.04245. Keys and values are repeated for every query head that shares them.
    FlashAttention-3 could share them itself, but its backward pass then takes 1.26 ms instead of 1.05 (H200);
    the kernel for this function adds up the gradients of the copies for less.
    """
    H = len(gain)
    cos = cos[positions]
    sin = sin[positions]
    heads = qkv.unflatten(1, (H + 2 * K, -1))
    q, k, v = heads.split((H, K, K), dim=1)
    q = apply_rotary(norm(q), cos, sin) * gain[:, None]
    k = apply_rotary(norm(k), cos, sin).to(qkv.dtype)
    repeated = [t.repeat_interleave(H // K, dim=1) for t in (k, v)]
    return q.to(qkv.dtype), *repeated, v

def sdpa_attention(q, k, v, spans: Spans):
    """Causal attention within each span, (T, H, E) all, by PyTorch on any device and dtype.

    Neighbouring spans of one length go together.
    """
    outputs = []
    lo = 0
    for length, group in itertools.groupby(spans.cu_seqlens.diff().tolist()):
        if length:
            hi = lo + length * len(list(group))
            heads = [t[lo:hi].unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v)]
            y = F.scaled_dot_product_attention(*heads, is_causal=True)
            outputs.append(y.transpose(1, 2).flatten(0, 1))
            lo = hi
    return torch.cat(outputs)

def exclude_self(y, v):
    """(kernel) Exclusive self-attention: remove from y (T, H, E) its part along the token's own v (T, K, E).

    https://arxiv.org/abs/2603.09078
    """
    grouped = y.float().unflatten(1, (v.size(1), -1))  # (T, K, H / K, E): query heads by the head they share
    unit = F.normalize(v.float(), dim=-1).unsqueeze(2)
    along = (grouped * unit).sum(-1, keepdim=True)
    z = grouped - along * unit
    return z.flatten(1, 2).to(y.dtype)

def merge_skip(x, skip=None, scale=None, gate=None):
    """Mix a U-net skip (T, D) into the stream x (T, D); without a skip return x.

    The sigmoid of the gate (D,) is the share of x; the scaled skip (scale (D,)) has the rest.
    """
    return x if skip is None else torch.lerp(scale * skip, x, gate.sigmoid())

def mix_and_norm(x, x0, mix, depth_scale, lanes: bool, *skip):
    """(kernel) Enter a layer: merge a skip, mix with the embedding, norm.

    x and the embedding x0 (T, D), mix (2, D), depth_scale (), skip as in merge_skip -> the stream, what the
    layer reads, x0 and x. The stream returned is the mixed one; with two lanes, the unmixed one (#1204). x0
    and x are returned for later readers, the next visit and a skip. So the gradients from there arrive here,
    where the kernel adds to them; autograd would add them up in passes of their own.
    """
    merged = merge_skip(x, *skip)
    mixed = mix[0] * merged + mix[1] * x0
    normed = (norm(mixed) * depth_scale).to(x.dtype)
    stream = merged if lanes else mixed
    return stream, normed, x0, x

def softcapped_nll(logits, targets, softcap: float):
    """(kernel) Cross entropy of z = softcap tanh(logits / softcap); (T, V), (T,) -> (T,) fp32, 0 for IGNORE.

    https://arxiv.org/abs/2408.00118. A stable log-sum-exp subtracts the largest z. Here softcap stands in for
    that, since no z is above it, and no pass has to look for a maximum. Settings limit softcap to 40:
    exp(-2 * 40) is still a normal fp32 number.
    """
    logits = logits.float()
    z = softcap * torch.tanh(logits / softcap)
    log_total = softcap + (z - softcap).exp().sum(-1).log()
    # A comparison fuses with the sums around it and with their gradient; a gather would be a pass of its own.
    is_target = targets[:, None] == torch.arange(logits.size(1), device=logits.device)
    nll = log_total - z.where(is_target, 0.0).sum(-1)
    return nll.where(targets != IGNORE, 0.0)

# Layers

class Layer(NamedTuple):
    """The weights of one layer."""
    qkv: Tensor  # (D + 2KE, D)
    o: Tensor  # (D, D), multiplied by attn_scale already
    up: Tensor  # (M, D)
    down: Tensor  # (D, M), multiplied by mlp_scale already
    q_gain: Tensor  # (H,)
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    resid_mix: Tensor  # (2, D) weights of the stream and of the embedding on entry
    lane_keep: Tensor  # (2,) how much each lane keeps of itself
    lane_post: Tensor  # (2, 2) [attention or MLP, lane]: how much of each output a lane receives
    depth_scale: Tensor  # () 1/sqrt(layer + 1): deeper layers read smaller inputs, arxiv.org/abs/2502.05795
    fp8: tuple[Tensor, ...] = ()  # in training by kernels up, up.T, down, down.T, times FP8_WEIGHT_SCALE

class Skip(NamedTuple):
    """A U-net connection as a visit of the decoder receives it, or none."""
    x: Tensor | None = None  # (T, D) the stream after the mirrored visit of the encoder
    scale: Tensor | None = None  # (D,)
    gate: Tensor | None = None  # (D,)

class Context(NamedTuple):
    """What all visits of one forward pass share."""
    cfg: Config
    backend: "Backend"
    rope: tuple[Tensor, Tensor, Tensor]  # cos and sin (longest span, 1, R / 2), positions (T,)
    spans: Spans

def no_hook(site: str, x, y, scale=None):
    """Default hook: return y unchanged.

    A hook gets the name of a site, its input x and its output y, and returns the output to use.

        start                   x token ids, y their rows of the embedding
        qkv, o, up, down, head  x and y of one linear map; o and down are multiplied by their residual scale
        attn                    x normed input, y output of attention, times attn_scale
        mlp                     x normed input, y output of the MLP, times mlp_scale, plus the stream and
                                attn_out unless there are two lanes

    At attn and mlp `scale` is that residual scale: to add something to the sublayer, return y + scale * it.
    """
    return y

def attention_sublayer(x, w: Layer, hook: Callable, ctx: Context):
    """Attention of a normed input, (T, D) -> (T, D), times its residual scale."""
    backend = ctx.backend
    split = FusedHeads.apply if backend.fused else split_heads
    exclude = FusedExclude.apply if backend.fused else exclude_self
    qkv = hook("qkv", x, F.linear(x, w.qkv))
    q, k, v, own_v = split(qkv, w.q_gain, *ctx.rope, ctx.cfg.num_kv_heads)
    heads = backend.attend(q, k, v, ctx.spans)
    y = exclude(heads, own_v).flatten(1)
    out = hook("o", y, F.linear(y, w.o))
    return hook("attn", x, out, w.attn_scale)

def mlp_sublayer(x, attn_out, w: Layer, hook: Callable, ctx: Context):
    """Add attention's output and then the MLP, times its residual scale, to the stream x; (T, D) all.

    Without attn_out, return the MLP of x alone and, for later readers, x. Both sums are computed here and not
    in visit_layer because the fused kernels include them.
    """
    lane = x
    if ctx.backend.fused:
        grad_scale = FP8_GRAD_SCALE * ctx.cfg.train_buffers * len(x)
        out, normed, lane = FusedMLP.apply(x, attn_out, w.up, w.down, w.depth_scale, w.fp8, grad_scale)
    else:
        y = x if attn_out is None else x + attn_out
        normed = (norm(y) * w.depth_scale).to(x.dtype)
        hidden = leaky_relu_squared(hook("up", normed, F.linear(normed, w.up)))
        out = hook("down", hidden, F.linear(hidden, w.down))
        out = out if attn_out is None else y + out
    return hook("mlp", normed, out, w.mlp_scale), lane

def visit_layer(x, mlp_lane, x0, skip: Skip, w: Layer, hook: Callable, ctx: Context):
    """One visit of a layer; returns x, mlp_lane, x0 and, for a skip, the x that it was given.

    While there is one stream, that is x, and mlp_lane is None. Once there are two lanes, x is attention's.
    """
    enter = FusedEntry.apply if ctx.backend.fused else mix_and_norm
    x, normed, x0, before = enter(x, x0, w.resid_mix, w.depth_scale, mlp_lane is not None, *skip)
    attn_out = attention_sublayer(normed, w, hook, ctx)
    if mlp_lane is None:  # the MLP reads what attention wrote
        x, _ = mlp_sublayer(x, attn_out, w, hook, ctx)
        return x, None, x0, before
    mlp_out, mlp_lane = mlp_sublayer(mlp_lane, None, w, hook, ctx)
    mix = fused_mix_lanes if ctx.backend.fused else mix_lanes
    return *mix(x, mlp_lane, attn_out, mlp_out, w.lane_keep, w.lane_post), x0, before

def mix_lanes(x, mlp_lane, attn_out, mlp_out, keep, post):
    """(kernel) Parallel residuals (#1204): each sublayer has read a lane of its own, and writes to both."""
    return (keep[0] * x + post[0, 0] * attn_out + post[1, 0] * mlp_out,
            keep[1] * mlp_lane + post[0, 1] * attn_out + post[1, 1] * mlp_out)

def norm_of_sum(x, a, dtype: torch.dtype):
    """(kernel) The norm of x + a, or of x if a is None, in dtype."""
    return norm(x if a is None else x + a).to(dtype)

def loss_head(x, mlp_lane, embed, targets, hook: Callable, ctx: Context):
    """Negative log-likelihood of each target, fp32, under a normalised distribution; 0 for IGNORE.

    The head reads the norm of the stream or, if there are two lanes, of their sum.
    """
    backend = ctx.backend
    softcap = ctx.cfg.logit_softcap
    normed = FusedNorm.apply if backend.fused else norm_of_sum
    nll = FusedNLL.apply if backend.fused else softcapped_nll
    x = normed(x, mlp_lane, x.dtype)
    if backend.fused and hook is no_hook:
        return FusedLoss.apply(x, embed, targets, softcap)
    return nll(hook("head", x, F.linear(x, embed)), targets, softcap)

def cast_banks(qo, kv, up, down, attn_scale, mlp_scale, dtype, fp8: bool):
    """The banks in compute dtype as the layers use them, [qkv, o, up, down], with the residual scales.

    Second, with fp8, [up, up.T, down, down.T] times FP8_WEIGHT_SCALE: Hopper's FP8 products read both factors
    along the dimension that they sum over.
    """
    q, o = qo.chunk(2)
    k, v = kv.chunk(2)
    qkv = torch.cat([p.to(dtype) for p in (q, k, v)], dim=1)
    scaled_o = o * attn_scale[:, :, None]
    scaled_down = down * mlp_scale[:, :, None]
    stacks = [qkv, scaled_o.to(dtype), up.to(dtype), scaled_down.to(dtype)]
    stacks8 = []
    for stack in stacks[2:] if fp8 else ():
        L, rows, columns = stack.shape
        stack8, stack8_t = to_fp8(stack.detach().view(L * rows, columns), FP8_WEIGHT_SCALE)
        stacks8 += [stack8.view(L, rows, columns), stack8_t.view(columns, L, rows).transpose(0, 1)]
    return stacks, stacks8

# Backend

class Backend(NamedTuple):
    """The functions that compute the model. The defaults run anywhere."""
    attend: Callable = sdpa_attention
    fused: bool = False  # kernels in place of PyTorch; hooks then do not see inside the MLP
    fp8: bool = False  # the MLP's products in FP8; needs `fused`, and Trainer alone sets it
    visit: Callable = visit_layer
    head: Callable = loss_head

    @classmethod
    def for_machine(cls, cfg: Config, device: torch.device) -> "Backend":
        """The fastest that this machine has, not compiled."""
        eights = cfg.vocab_size, cfg.kv_dim, cfg.head_dim, cfg.ttt_lora_rank
        sixteens = cfg.model_dim, cfg.mlp_dim  # the rows of FP8 factors
        if device.type == "cuda" and (any(n % 8 for n in eights) or any(n % 16 for n in sixteens)):
            raise UserError(f"VOCAB_SIZE, NUM_HEADS, NUM_KV_HEADS and TTT_LORA_RANK give widths {eights}, "
                            f"MODEL_DIM and MLP_MULT {sixteens}: a GPU needs multiples of 8, and of 16")
        on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        head_fits = cfg.head_dim & (cfg.head_dim - 1) == 0  # the kernels' heads are powers of 2 wide
        has_triton = importlib.util.find_spec("triton") is not None
        return cls(choose_attention(cfg.attention, device), fused=on_hopper and head_fits and has_triton)

    @property
    def compilable(self) -> bool:
        """Whether no pass reads a tensor on the host, which neither torch.compile nor a CUDA graph can do."""
        return self.attend is not sdpa_attention

    def compiled(self) -> "Backend":
        """A copy that, without kernels, compiles visits and the head; for training.

        With the hooks of adapters a compiled backward pass may return gradients in a layout that grouped_mm
        refuses.
        """
        if self.fused or not self.compilable:
            return self
        torch._dynamo.config.recompile_limit = 64  # each kind of visit is a graph of its own
        visit, head = (torch.compile(part, fullgraph=True) for part in (self.visit, self.head))
        return self._replace(visit=visit, head=head)

def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32

# The network

def empty_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))

class GPT(nn.Module):
    """The network. Parameters are fp32; a forward pass computes in fp32 on a CPU, in bf16 on a GPU, but for
    the FP8 of FusedMLP.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        L, D, M, KE = cfg.num_layers, cfg.model_dim, cfg.mlp_dim, cfg.kv_dim
        self.embed = empty_parameter(cfg.vocab_size, D)  # tied: also the output projection
        self.qo_bank = empty_parameter(2 * L, D, D)  # all q, then all o
        self.kv_bank = empty_parameter(2 * L, KE, D)  # all k, then all v
        self.up_bank = empty_parameter(L, M, D)
        self.down_bank = empty_parameter(L, D, M)
        self.q_gain = empty_parameter(L, cfg.num_heads)
        self.attn_scale = empty_parameter(L, D)
        self.mlp_scale = empty_parameter(L, D)
        self.resid_mix = empty_parameter(L, 2, D)
        self.lane_keep = empty_parameter(L, 2)
        self.lane_post = empty_parameter(L, 2, 2)
        skips = len(depth_plan(cfg, looped=True).encoder)
        self.skip_scale = empty_parameter(skips, D)  # row n: visit n of the decoder
        self.skip_gate = empty_parameter(skips, D)
        longest = max(cfg.train_seq_len, cfg.eval_seq_len, cfg.ttt_eval_seq_len)
        exponents = torch.arange(0, cfg.rope_dims, 2, dtype=torch.float64) / cfg.rope_dims
        frequencies = cfg.rope_base**-exponents
        angles = torch.outer(torch.arange(longest, dtype=torch.float64), frequencies)[:, None]
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.register_buffer("depth_scale", torch.arange(1.0, L + 1).rsqrt(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initial values. Every sublayer starts by adding nothing, as its output projection is zero.

        Lanes start by keeping 1.1 of themselves, as in #1204.
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

    def with_weights(self, weights: Mapping[str, Tensor]) -> "GPT":
        """A model of its own with these weights, a state dict."""
        model = copy.deepcopy(self)
        model.load_state_dict(weights)
        return model

    def named_matrices(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of every matrix of the layers. Only this and cast_banks know the banks' layout."""
        q, o = self.qo_bank.chunk(2)
        k, v = self.kv_bank.chunk(2)
        stacks = dict(q=q, k=k, v=v, o=o, up=self.up_bank, down=self.down_bank)
        for i in range(self.cfg.num_layers):
            for kind, stack in stacks.items():
                yield f"{i}.{kind}", stack[i]

    def layers(self, dtype: torch.dtype, backend: Backend) -> list[Layer]:
        """Views of all layers.

        The banks are cast and unbound once: the gradient of bank[i] would be as large as the bank for each i.
        """
        banks = self.qo_bank, self.kv_bank, self.up_bank, self.down_bank
        vectors = (self.q_gain, self.attn_scale, self.mlp_scale, self.resid_mix, self.lane_keep,
                   self.lane_post)
        stacks, stacks8 = cast_banks(*banks, self.attn_scale, self.mlp_scale, dtype, backend.fp8)
        stacks += [p.to(dtype) for p in vectors]
        stacks.append(self.depth_scale)
        by_layer = zip(*map(torch.unbind, stacks))
        layers = [Layer(*views) for views in by_layer]
        for i, views in enumerate(zip(*map(torch.unbind, stacks8))):
            layers[i] = layers[i]._replace(fp8=views)
        return layers

    def forward(self, batch: Batch, plan: Plan, backend: Backend = Backend(),
                hooks: Callable | None = None) -> Tensor:
        """Negative log-likelihood of every target of the batch, fp32.

        Training averages it and evaluation sums it. Test-time training sums it for the score and averages it
        over a chunk to learn from that. hooks(visit, layer) gives the hook of a visit and, for -1 and -1, the
        hook of embedding and head.
        """
        cfg = self.cfg
        dtype = compute_dtype(self.embed.device)
        end_hook = hooks(-1, -1) if hooks else no_hook
        # 1) Embed the tokens.
        embedded = end_hook("start", batch.tokens, F.embedding(batch.tokens, self.embed))
        normed = FusedNorm.apply if backend.fused else norm_of_sum
        x = x0 = normed(embedded, None, dtype)
        # 2) Visit the layers. The encoder pushes skips, the decoder pops them.
        rope = self.cos, self.sin, batch.spans.positions
        ctx = Context(cfg, backend, rope, batch.spans)
        layers = self.layers(dtype, backend)
        scales = self.skip_scale.to(dtype).unbind(0)
        gates = self.skip_gate.to(dtype).unbind(0)
        skips = []
        mlp_lane = None
        for visit, i in enumerate(plan.visits):
            decoder_visit = visit - len(plan.encoder)  # negative in the encoder
            skip = Skip()
            if decoder_visit >= 0:
                if i >= cfg.parallel_start_layer and mlp_lane is None:
                    # From here on there are two lanes: x is attention's. The split comes before this visit's
                    # skip, which enters attention's lane alone.
                    mlp_lane = x
                if skips:
                    skip = Skip(skips.pop(), scales[decoder_visit], gates[decoder_visit])
            hook = hooks(visit, i) if hooks else no_hook
            x, mlp_lane, x0, before = backend.visit(x, mlp_lane, x0, skip, layers[i], hook, ctx)
            if decoder_visit < 0:
                skips[-1:] = [before, x] if skips else [x]  # the last skip, as this visit returned it
        # 3) Predict the targets.
        if batch.rows is not None:
            x, mlp_lane = (y if y is None else y.index_select(0, batch.rows) for y in (x, mlp_lane))
        return backend.head(x, mlp_lane, self.embed.to(dtype), batch.targets, end_hook, ctx)

# ---- 5 Hooks: calibration and adapters ---------------------------------------------------------------------

CALIBRATION_NAMES = {  # of the statistics of each site; q, k and v have one input, and so one entry
    "qkv": "{layer}.qkv", "o": "{layer}.o", "up": "{layer}.up", "down": "{layer}.down",
    "head": "embed", "start": "start"}

class CalibrationHook(NamedTuple):
    """Sums up, over tokens and over all visits of a layer, what quantization needs to know.

    A forward pass without gradients has to come first: hessians[name] += X.T X of the inputs X of a matrix.
    Then one with gradients: fishers[name] += G.T G of the gradients G of its outputs; of the head, "embed",
    the diagonal alone. And fishers["start"], which the caller provides, += the squared gradients of the
    embedded tokens, by row of the embedding. Other names are "3.qkv", "3.o", "3.up" and "3.down". The backend
    must have no kernels, so that every site is seen.
    """
    hessians: dict[str, Tensor]
    fishers: dict[str, Tensor]
    layer: int

    def __call__(self, site: str, x, y, scale=None):
        if site not in CALIBRATION_NAMES:
            return y
        name = CALIBRATION_NAMES[site].format(layer=self.layer)
        if y.requires_grad:
            tokens = x if site == "start" else None
            y.register_hook(functools.partial(self.add_gradients, name, tokens))
        elif site != "start":
            self.add_inputs(name, x.float(), y.size(1))
        return y

    def add_gradients(self, name: str, tokens, grad):
        grad = grad.float()
        if tokens is not None:
            self.fishers[name].index_add_(0, tokens, grad.square().sum(1))
        elif name == "embed":
            self.fishers[name].add_(grad.square().sum(0))
        else:
            self.fishers[name].addmm_(grad.T, grad)

    def add_inputs(self, name: str, x, outputs: int):
        if name not in self.hessians:
            shape = (outputs,) if name == "embed" else (outputs, outputs)
            self.hessians[name] = x.new_zeros(x.size(1), x.size(1))
            self.fishers[name] = x.new_zeros(shape)
        self.hessians[name].addmm_(x.T, x)

def grouped_linear(x, weights, ends):
    """Grouped product: the rows of x from ends[n - 1] to ends[n] times weights[n].

    (T, in), (slots, in, out), (slots,) int32 -> (T, out)
    """
    if x.is_cuda:
        return getattr(F, "grouped_mm", torch._grouped_mm)(x, weights, offs=ends)  # older PyTorch: private
    products = []
    start = 0
    for end, weight in zip(ends.tolist(), weights):
        if end > start:
            products.append(x[start:end] @ weight)
        start = end
    return torch.cat(products)

def add_outputs(y, *outputs):
    """y (T, out) plus the outputs of its adapters side by side."""
    return y + torch.cat(outputs, dim=1)

def adapter_adamw_(tensor, compute_copy, grad, second_moment, bias_correction, decay, beta2, lr: float):
    """(kernel) AdamW without a first moment, in place; tensor and moment are fp32, all (visits, slots, ., .).

    bias_correction, decay and beta2 (slots, 1, 1) differ by slot. A beta2 of 1 leaves a slot as it is,
    whatever gradient a grouped product gives it; its decay is 0.
    """
    grad = grad.float().where(beta2 < 1, 0.0)
    second_moment.lerp_(grad.square(), 1 - beta2)
    denominator = (second_moment / bias_correction).sqrt() + 1e-10
    tensor.mul_(1 - lr * decay)
    tensor.addcdiv_(grad, denominator, value=-lr)
    compute_copy.copy_(tensor)

class AdapterHook(NamedTuple):
    """Adds B A x to what a site computes: a parallel, low-rank map. The rows of x belong to the slots, in
    order.
    """
    A: dict[str, Tensor]  # (slots, adapters * rank, in) by site
    B: dict[str, Tensor]  # (slots, out, rank) by adapter
    ends: Tensor  # (slots,) int32, where each slot's rows end
    fused: bool

    def __call__(self, site: str, x, y, scale=None):
        if site not in self.A:
            return y
        inner = grouped_linear(x, self.A[site].mT, self.ends)
        names = ADAPTER_SITES[site]
        outputs = [grouped_linear(part, self.B[name].mT, self.ends)
                   for part, name in zip(inner.chunk(len(names), dim=-1), names)]
        if scale is not None:
            return torch.addcmul(y, scale, *outputs)
        add = FusedAddOutputs.apply if self.fused else add_outputs
        return add(y, *outputs)

class Adapters:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685) of as many documents as there are slots.

    The slots are independent of each other. TTT_SITES says which of the adapters q, k, v, attn, mlp and head
    there are; each is named after what its output is added to. Those of a site read the same input, so their
    A are one stack of rows, A[site] (visits, slots, adapters * rank, in). A starts from a draw that is the
    same for every document and whatever TTT_SITES is, and B[name] (visits, slots, out, rank) from zero; the
    head counts as one visit. Forward passes use `copies` in compute dtype, A's first. Beta 1 is 0, so
    that AdamW has no first moment.
    """

    def __init__(self, cfg: Config, visits: int, device: torch.device, fused: bool = False):
        self.cfg = cfg
        self.fused = fused
        slots = cfg.ttt_batch_size
        rank = cfg.ttt_lora_rank
        D = cfg.model_dim
        outputs = {"q": D, "k": cfg.kv_dim, "v": cfg.kv_dim, "attn": D, "mlp": D, "head": cfg.vocab_size}
        draws = self.draw_all(outputs, visits, device)
        self.initial_A = {}  # (visits, 1, adapters * rank, in) by site
        self.A = {}
        self.B = {}
        for site in cfg.ttt_sites.split(","):
            names = ADAPTER_SITES[site]
            draw = self.initial_A[site] = torch.cat([draws[name] for name in names], dim=2)
            self.A[site] = draw.repeat(1, slots, 1, 1)  # for the shape: reset_slots fills all
            for name in names:
                self.B[name] = draw.new_empty(len(draw), slots, outputs[name], rank)
        self.tensors = [*self.A.values(), *self.B.values()]
        self.second_moments = [torch.empty_like(t) for t in self.tensors]
        self.copies = [t.to(compute_dtype(device), copy=True).requires_grad_() for t in self.tensors]
        self.update_count = torch.zeros(slots, device=device)
        self.graphs: dict[int, CapturedCall] = {}  # of `adapt`, by number of positions
        if device.type == "cuda":
            self.graph_pool = torch.cuda.graph_pool_handle()
            self.replayed = torch.cuda.Event()
        self.reset_slots(range(slots))

    def draw_all(self, names: Iterable[str], visits: int, device: torch.device) -> dict[str, Tensor]:
        """Initial values of A for all names, whichever are wanted, so that no draw depends on the others."""
        generator = torch.Generator().manual_seed(self.cfg.seed)
        rank = self.cfg.ttt_lora_rank
        D = self.cfg.model_dim
        draws = {}
        for name in names:
            draw = torch.empty(1 if name == "head" else visits, 1, rank, D)
            draws[name] = draw.uniform_(-(D**-0.5), D**-0.5, generator=generator).to(device)
        return draws

    @torch.no_grad()
    def reset_slots(self, slots: Iterable[int]):
        """Make slots as new: nothing stays of the documents that were there."""
        indices = torch.tensor(list(slots), dtype=torch.long)
        if not len(indices):
            return
        indices = to_device(indices, self.update_count.device)
        for site, draw in self.initial_A.items():
            self.A[site][:, indices] = draw
        for B in self.B.values():
            B[:, indices] = 0
        for tensor, compute_copy, moment in zip(self.tensors, self.copies, self.second_moments):
            compute_copy[:, indices] = tensor[:, indices].to(compute_copy.dtype)
            moment[:, indices] = 0
        self.update_count[indices] = 0

    def hooks(self, ends, row_ends) -> Callable:
        """The hooks of a forward pass. ends (slots,) says which positions belong to which slot, row_ends
        (slots,) which rows of the batch, which is what the head sees.
        """
        count = len(self.A)
        A = {site: stack.unbind(0) for site, stack in zip(self.A, self.copies[:count])}
        B = {name: stack.unbind(0) for name, stack in zip(self.B, self.copies[count:])}

        def of_visit(stacks: dict, visit: int) -> dict[str, Tensor]:
            is_end = visit < 0  # embedding and head, not a layer
            names = [name for name in stacks if is_end == (name == "head")]
            return {name: stacks[name][visit] for name in names}  # -1: the head's only one

        def hooks_of_visit(visit: int, layer: int) -> AdapterHook:
            own_ends = row_ends if visit < 0 else ends
            return AdapterHook(of_visit(A, visit), of_visit(B, visit), own_ends, self.fused)

        return hooks_of_visit

    def learn(self, loss, has_turn):
        """One AdamW step on the sum of the documents' losses, each of which moves its own adapters alone.

        Slots whose has_turn (slots,) is 0 stay as they are.
        """
        cfg = self.cfg
        grads = torch.autograd.grad(loss, self.copies)
        with torch.no_grad():
            self.update_count += has_turn
            count = self.update_count.clamp(min=1)[:, None, None]  # of 0, nothing is there to be corrected
            bias_correction = 1 - cfg.ttt_beta2**count  # by slot: each began at another time
            active = has_turn[:, None, None]
            decay = cfg.ttt_weight_decay * active
            beta2 = 1 - (1 - cfg.ttt_beta2) * active
            update = launch_adapter_adamw if self.fused else adapter_adamw_
            for tensors in zip(self.tensors, self.copies, grads, self.second_moments):
                update(*tensors, bias_correction, decay, beta2, cfg.ttt_lora_lr)

# ---- 6 Optimizers ------------------------------------------------------------------------------------------

def orthogonalize(G, steps: int):
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
class BankShard:
    """Communication buffers of one bank, in the dtype that travels."""
    full: Tensor  # (world_size * share, ...) the bank's gradient on its way out, its update on its way back
    own: Tensor  # (share, ...) this rank's slice of the reduced gradient; of a single rank, all of `full`
    pending: Any = None  # the collective under way

    def wait(self):
        if self.pending is not None:
            self.pending.wait()
            self.pending = None

class Muon(torch.optim.Optimizer):
    """Momentum, equal row norms, orthogonalization, for banks of matrices stacked along dimension 0.

    Rows are normed before orthogonalization as in MuonEq-R, https://arxiv.org/abs/2603.28254. Every rank owns
    a contiguous slice of each bank. A step has three phases:
      1. send() sends the gradients of all banks out (reduce-scatter, sum);
      2. step() orthogonalizes the rank's slice of each bank and sends the update back (all-gather), while
         the next bank is computed;
      3. step() applies the updates.
    A single rank owns all. Momentum is fp32 and in state_dict(); bf16 travels on a GPU, fp32 on a CPU.
    """

    def __init__(self, banks: list[nn.Parameter], ranks: Ranks, **defaults: float):
        # Largest first, so that all-gathers of large banks are hidden behind the work on the others.
        super().__init__(sorted(banks, key=lambda bank: -bank.numel()), defaults)
        self.ranks = ranks
        self.shards: dict[nn.Parameter, BankShard] = {}
        for bank in self.param_groups[0]["params"]:
            # A share is a number of matrices. The last ranks may own zeros, whose update is zero.
            share = ceil_div(len(bank), ranks.world_size)
            shape = ranks.world_size * share, *bank.shape[1:]
            full = bank.new_zeros(shape, dtype=compute_dtype(bank.device))
            own = torch.zeros_like(full[:share]) if ranks.world_size > 1 else full
            self.shards[bank] = BankShard(full, own)
            self.state[bank]["momentum"] = torch.zeros_like(own, dtype=torch.float32)

    @torch.no_grad()
    def send(self):
        """Phase 1, once a backward pass is over."""
        for bank, shard in self.shards.items():
            shard.full[: len(bank)] = bank.grad
            if self.ranks.world_size > 1:
                shard.pending = dist.reduce_scatter_tensor(shard.own, shard.full, async_op=True)

    @torch.no_grad()
    def squared_norm(self):
        """Squared norm of this rank's slices of the reduced gradients, ()."""
        for shard in self.shards.values():
            shard.wait()
        norms = torch._foreach_norm([shard.own.float() for shard in self.shards.values()])
        return torch.stack(norms).square().sum()

    @torch.no_grad()
    def step(self, grad_scale: Tensor | float = 1.0):
        """Phases 2 and 3, with gradients times grad_scale."""
        (group,) = self.param_groups
        for bank, shard in self.shards.items():
            shard.wait()
            grad = shard.own.float() * grad_scale
            momentum = self.state[bank]["momentum"]
            momentum.mul_(group["momentum"]).add_(grad)
            update = grad + group["momentum"] * momentum  # Nesterov
            update = update / update.norm(dim=-1, keepdim=True).clamp(min=1e-7)
            update = orthogonalize(update.to(shard.full.dtype), group["backend_steps"])
            if self.ranks.world_size > 1:
                shard.pending = dist.all_gather_into_tensor(shard.full, update.contiguous(), async_op=True)
            else:
                shard.full.copy_(update)
        for bank, shard in self.shards.items():
            shard.wait()
            shape_scale = max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5
            bank.mul_(1 - group["lr"] * group["weight_decay"])
            bank.add_(shard.full[: len(bank)], alpha=-group["lr"] * shape_scale)

class Optimizers:
    """Muon for the banks and AdamW for the rest, as one: reduce over ranks, clip by the global norm, step."""

    MUON = ("qo_bank", "kv_bank", "up_bank", "down_bank")
    EMBED = ("embed",)
    SCALARS = ("q_gain", "attn_scale", "mlp_scale", "resid_mix", "lane_keep", "lane_post", "skip_scale",
               "skip_gate")

    def __init__(self, model: GPT, ranks: Ranks, cfg: Config):
        parameters = dict(model.named_parameters())
        assigned = self.MUON + self.EMBED + self.SCALARS
        if sorted(assigned) != sorted(parameters):
            raise ValueError(f"parameters without exactly one optimizer: {set(parameters) ^ set(assigned)}")
        self.cfg = cfg
        self.ranks = ranks
        banks = [parameters[name] for name in self.MUON]
        embed = [parameters[name] for name in self.EMBED]
        scalars = [parameters[name] for name in self.SCALARS]
        self.replicated = embed + scalars
        self.muon = Muon(banks, ranks, lr=cfg.matrix_lr, momentum=cfg.muon_momentum,
                         weight_decay=cfg.muon_wd, backend_steps=cfg.muon_backend_steps)
        groups = [dict(params=embed, lr=cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
                  dict(params=scalars, lr=cfg.scalar_lr, weight_decay=cfg.adam_wd)]
        self.adamw = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                       fused=ranks.on_gpu)
        self.peak_lrs = [group["lr"] for group in self.groups]
        for p in parameters.values():
            p.grad = torch.zeros_like(p)  # stays in its place, where CUDA graphs find it

    @property
    def groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self, lr_scale: float, momentum: float):
        """Update the model from this rank's share of the gradients, then forget these."""
        # 1) Reduce over ranks: each bank for itself, and all other gradients as one tensor.
        self.muon.send()
        grads = [p.grad.view(-1) for p in self.replicated]
        if self.ranks.world_size > 1:
            packed = self.ranks.all_reduce_(torch.cat(grads))
            torch._foreach_copy_(grads, packed.split([len(grad) for grad in grads]))
        # 2) Clip, set the rates, step.
        grad_scale = self.clip_scale(grads)
        torch._foreach_mul_(grads, grad_scale)
        for group, peak in zip(self.groups, self.peak_lrs):
            group["lr"] = peak * lr_scale
        self.muon.param_groups[0]["momentum"] = momentum
        self.muon.step(grad_scale)
        self.adamw.step()
        self.zero_grad()

    def clip_scale(self, replicated_grads: list[Tensor]):
        """The factor that limits the norm of the whole reduced gradient, (); the same on all ranks."""
        banks = self.ranks.all_reduce_(self.muon.squared_norm())
        rest = torch.stack(torch._foreach_norm(replicated_grads)).square().sum()
        total = (banks + rest).sqrt()
        limit = self.cfg.grad_clip_norm or math.inf
        return (limit / (total + 1e-6)).clamp(max=1.0)

    def zero_grad(self):
        self.muon.zero_grad(set_to_none=False)
        self.adamw.zero_grad(set_to_none=False)

class Ema:
    """Exponential moving average of all weights, which is what gets exported.

    At step t the decay is (t + 1) / (t + 18), so that the average reaches back over 1/17 of the steps so far,
    up to ema_decay; .9965 is reached at step 4,840, about where the ancestor's record ended. A decay of .9965
    from the start on would keep the initial weights in the average of a short run.
    """

    def __init__(self, model: GPT, decay: float):
        self.decay = decay
        self.steps = 0
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.average = {name: weight.clone() for name, weight in self.weights.items()}

    def update(self):
        """Take in the weights after a step."""
        decay = min(self.decay, (self.steps + 1) / (self.steps + 18))
        torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)
        self.steps += 1

# ---- 7 Training --------------------------------------------------------------------------------------------

def learning_rate_scale(progress: float, cfg: Config) -> float:
    """Learning rates over their peaks: 1, then linear towards 0 in the last warmdown_frac, down to min_lr.

    With a warmdown_frac of 0 they stay at 1, as no step begins at progress 1.
    """
    if progress < 1 - cfg.warmdown_frac:
        return 1.0
    return max((1 - progress) / cfg.warmdown_frac, cfg.min_lr)

SMALL_BATCH_LR = 0.75  # times the learning rates while steps have half their tokens; the root of 1/2 is .71

def muon_momentum(step: float, progress: float, cfg: Config) -> float:
    """A linear ramp over muon_momentum_warmup_steps or, if that is sooner, over the first .31 of the run.

    So that short runs, too, reach full momentum; .31 is what 1500 steps were of the ancestor's record.
    """
    by_steps = step / max(1, cfg.muon_momentum_warmup_steps)
    ramp = min(1.0, max(by_steps, progress / 0.31))
    start = cfg.muon_momentum_warmup_start
    return start + (cfg.muon_momentum - start) * ramp

def split_step(cfg: Config, world_size: int) -> tuple[int, int]:
    """(buffers that a rank computes in a step, tokens of a buffer). UserError if ranks cannot share it.

    With 8 train_buffers, a buffer is an eighth of a step where the number of ranks divides 8, so that 1, 2, 4
    and 8 ranks see the same data. Else it is the largest part, no more than an eighth, that gives every rank
    whole buffers.
    """
    if cfg.train_batch_tokens % world_size:
        fits = ", ".join(str(n) for n in range(1, 65) if cfg.train_batch_tokens % n == 0)
        raise UserError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} cannot be shared by {world_size} "
                        f"ranks: --nproc_per_node times --nnodes may be {fits}")
    rank_tokens = cfg.train_batch_tokens // world_size
    fewest = ceil_div(cfg.train_buffers, world_size)
    buffers = next(n for n in range(fewest, rank_tokens + 1) if rank_tokens % n == 0)
    buffer_tokens = rank_tokens // buffers
    least = cfg.train_seq_len * (2 if cfg.small_batch_frac else 1)  # even a buffer of half the size
    if buffer_tokens < least or buffer_tokens % 32:  # in FP8 dup and ddown want halves of 16 n
        raise UserError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} gives {world_size} ranks buffers of "
                        f"{buffer_tokens} tokens: a buffer needs a multiple of 32, and at least {least}, by "
                        f"TRAIN_SEQ_LEN={cfg.train_seq_len} and SMALL_BATCH_FRAC={cfg.small_batch_frac:g}")
    return buffers, buffer_tokens

@contextlib.contextmanager
def preserved(model: GPT, optimizers: Optimizers) -> Iterator[None]:
    """Put weights, optimizer state and random state back, bitwise, at the end of the block."""
    parts = model, optimizers.muon, optimizers.adamw
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    gpus = [torch.cuda.current_device()] if optimizers.ranks.on_gpu else []
    with torch.random.fork_rng(gpus):
        yield
    for part, state in zip(parts, states):
        part.load_state_dict(state)
    optimizers.zero_grad()

def shape_of(batch: Batch) -> BufferShape:
    return BufferShape(len(batch.tokens), batch.spans.max_seqlen)

class Trainer:
    """The model of a run with its optimizers and its data, and the loop over them."""

    def __init__(self, run: Run, model: GPT, loader: PackedLoader):
        self.cfg, self.ranks, self.log, backend = run
        self.model = model
        self.loader = loader
        self.local_buffers, _ = split_step(self.cfg, self.ranks.world_size)
        self.optimizers = Optimizers(model, self.ranks, self.cfg)
        self.backend = backend._replace(fp8=backend.fused).compiled()
        depths = (False, True) if self.cfg.loops_at_end else (False,)
        self.plans = [depth_plan(self.cfg, looped) for looped in depths]
        self.graphs: dict[tuple[Plan, BufferShape], CapturedCall] = {}  # of `learn`
        self.steps = 0
        self.tokens = 0  # of these steps, on all ranks
        self.reported = 0.0  # the training clock's seconds at the last report
        self.loss = torch.zeros((), device=self.ranks.device)  # this rank's part of a step's mean loss
        self.targets = torch.zeros((), dtype=torch.int64, device=self.ranks.device)  # that this rank learned

    def learn(self, plan: Plan, batch: Batch):
        """Forward and backward pass of one buffer, whose share of the step's mean loss adds to self.loss."""
        nll = self.model(batch, plan, self.backend)
        counted = (batch.targets != IGNORE).sum()
        self.targets += counted
        # Parts add up to the mean over the buffers of all ranks.
        part = nll.sum() / counted.clamp(min=1) / (self.local_buffers * self.ranks.world_size)
        part.backward()
        self.loss += part.detach()

    def capture(self, calls: list[tuple[Plan, Batch]]):
        """Capture these calls of `learn`, once they have run; a replay copies its own batch there."""
        torch.cuda.empty_cache()  # graphs have a memory pool of their own
        pool = torch.cuda.graph_pool_handle()
        for plan, batch in calls:
            learn = functools.partial(self.learn, plan)
            self.graphs[plan, shape_of(batch)] = CapturedCall.of(learn, batch, pool)

    def step(self, batches: Iterable[Batch], plan: Plan, lr_scale: float, momentum: float) -> Tensor:
        """One optimizer step; returns this rank's part of its mean loss, (), still on the device."""
        self.loss.zero_()
        for batch in batches:
            graph = self.graphs.get((plan, shape_of(batch)))
            if graph:
                graph.replay(batch)
            else:
                self.learn(plan, batch)
        self.optimizers.step(lr_scale, momentum)
        return self.loss.clone()

    def warm_up(self):
        """Compile and run all forms of `learn` on random tokens, and leave no trace of it."""
        cfg = self.cfg
        loader = self.loader
        tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, loader.buffer_tokens + 1)
        starts = np.arange(0, loader.buffer_tokens, 600)  # documents of about the usual length
        batches = {}
        for shape, max_spans in loader.max_spans.items():
            size, max_len = shape
            bounds = span_bounds(starts[starts < size], size, max_len)
            batch = make_batch(tokens[:size], tokens[1 : size + 1], bounds, max_spans, max_len)
            batches[shape] = to_device(batch, self.ranks.device)
        # The largest first, as torch.compile makes graphs of fixed size for what it sees first.
        calls = [(plan, batches[shape]) for shape, plan in sorted(self.forms(), reverse=True)]
        _, largest = calls[0]
        with preserved(self.model, self.optimizers):
            # The last plan launches all kernels that there are. What it computes now is undefined.
            compile_kernels(self.backend, self.ranks, functools.partial(self.learn, self.plans[-1], largest))
            self.optimizers.zero_grad()
            for plan, batch in calls:
                for _ in range(cfg.warmup_steps):
                    self.step([batch], plan, 1.0, cfg.muon_momentum)
        if self.backend.fused and self.backend.compilable:
            self.capture(calls)
        self.targets.zero_()

    def forms(self) -> set[tuple[BufferShape, Plan]]:
        """Shapes of buffers with plans that go together in training.

        No step begins at 1. Loops begin at once and a new shape two steps late, so each change meets the
        shape before it, too. If two changes lie within two steps, these steps may have others.
        """
        cfg = self.cfg
        changes = sorted({*LENGTHEN_AT, cfg.small_batch_frac, cfg.enable_looping_at} - {1.0})
        return {(self.loader.shape_at(progress), self.plans[cfg.loops_at(change)])
                for before, change in itertools.pairwise([0.0, *changes]) for progress in (before, change)}

    def own_buffers(self) -> Iterator[int]:
        """Indices of the buffers that this rank computes, step after step."""
        return itertools.count(self.ranks.rank, self.ranks.world_size)

    def train(self, validate: Callable) -> GPT:
        """Step until the training clock less its reserve is spent, or `iterations` are done.

        Returns a model with the average of the weights. validate(model, plan) gives a plain score. All ranks
        go by the largest of their clocks, so that learning rates agree and all of them stop together. The
        host is at most two steps ahead of the GPU. The next step is expected to take the mean time of the
        latest 16.
        """
        cfg = self.cfg
        ranks = self.ranks
        log = self.log
        budget = (cfg.max_wallclock_seconds or math.inf) - cfg.gptq_reserve_seconds
        latest = deque(maxlen=17)  # seconds at the launch of each of the latest steps
        batches = self.loader.buffers(self.own_buffers(), ranks.device)
        ema = Ema(self.model, cfg.ema_decay)
        rows = []
        in_flight = deque()
        looped = False
        with log.phase("train", "training") as phase:
            while True:
                # 1) How far along is the run? Stop before a step that would not fit any more.
                if len(in_flight) == 2:
                    in_flight.popleft().synchronize()
                seconds = ranks.all_reduce_max(phase.elapsed())
                progress = max(self.steps / cfg.iterations, seconds / budget)
                latest.append(seconds)
                step_seconds = (seconds - latest[0]) / max(1, len(latest) - 1)
                to_come = (1 + len(in_flight)) * step_seconds  # until one more step is done
                done = progress >= 1 or seconds + to_come > budget
                # 2) Report, and validate where it is asked for, with the clock at rest.
                if rows and (done or self.steps <= 3 or self.steps % cfg.train_log_every == 0):
                    self.report(rows, phase, progress)
                    rows = []
                if self.steps and cfg.val_loss_every and (done or self.steps % cfg.val_loss_every == 0):
                    ranks.synchronize()  # what was sent before belongs to training
                    with phase.paused(), log.phase("validate"):
                        self.report_validation(validate(self.model, self.plans[looped]))
                if done:
                    break
                # 3) Take a step, by the schedule.
                if not looped and cfg.loops_at(progress):
                    looped = True
                    log(f"layer_loop:enabled step:{self.steps} frac:{progress:.3f}")
                shape = self.next_shape(progress)
                lr_scale = learning_rate_scale(progress, cfg)
                if shape.tokens < self.loader.buffer_tokens:
                    lr_scale *= SMALL_BATCH_LR
                momentum = muon_momentum(self.tokens / cfg.train_batch_tokens, progress, cfg)
                of_step = itertools.islice(batches, self.local_buffers)
                loss = self.step(of_step, self.plans[looped], lr_scale, momentum)
                ema.update()
                self.steps += 1
                tokens = self.loader.step_tokens(shape)
                self.tokens += tokens
                rows.append(dict(step=self.steps, loss=loss, seconds=seconds, lr=lr_scale, looped=looped,
                                 tokens=tokens))
                if ranks.on_gpu:
                    in_flight.append(torch.cuda.current_stream().record_event())
            return self.model.with_weights(ema.average)

    def next_shape(self, progress: float) -> BufferShape:
        """That of the next step's buffers. If it is time for another, a stage of it begins in two steps."""
        shape = self.loader.shape_at(progress)
        first_step = self.steps + 2  # this one and the next may be packed already
        if shape != self.loader.stage_of(first_step).shape:
            self.loader.begin_stage(first_step, shape)
            self.log(f"stage: tokens:{shape.tokens} spans:{shape.max_len} step:{first_step} "
                     f"frac:{progress:.3f}")
        return self.loader.stage_of(self.steps).shape

    def report(self, rows: list[dict], phase: Phase, progress: float):
        """Log the latest step, and to metrics.jsonl all since the last report; losses are over all ranks.

        The line's seconds include the latest step; those of a row end before its step is launched.
        """
        losses = self.ranks.all_reduce_(torch.stack([row["loss"] for row in rows])).tolist()
        seconds = phase.elapsed()  # now that losses are known, the steps are done
        if not all(map(math.isfinite, losses)):
            raise UserError(f"train_loss is {losses[-1]} at step {self.steps}, training diverged: lower "
                            "MATRIX_LR, TIED_EMBED_LR or SCALAR_LR")
        for row, loss in zip(rows, losses):
            self.log.metrics("step", **{**row, "loss": loss})
        progress = min(progress, 1.0)
        speed = sum(row["tokens"] for row in rows) / (seconds - self.reported)
        self.reported = seconds
        self.log(f"step:{self.steps}/{self.cfg.iterations} train_loss:{losses[-1]:.4f} "
                 f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / self.steps:.2f}ms "
                 f"tok/s:{speed:.0f} done:{progress:.1%} eta:{seconds / progress - seconds:.0f}s")

    def report_validation(self, current: "Score"):
        self.log(f"step:{self.steps}/{self.cfg.iterations} {current}")
        self.log.metrics("validation", step=self.steps, val_loss=current.loss, val_bpb=current.bpb)

# ---- 8 Quantization ----------------------------------------------------------------------------------------
# A weight W[i, j] becomes value[i, j] * bin width[i, j], with
#
#     value = whole + shift         whole is an integer of -127 to 127, shift is 0 or 1/2
#     code = 2 * value              what is stored: bit 0 is the shift, bit 1 tells whether `whole` is odd
#     bin width = 2^(row_exponent[i] / 8) * 2^(column_exponent[j] / 8)
#
# Bin widths. An error e[i, j] in a weight raises the loss, to second order, in proportion to F[i] d[j] e^2.
# Here F[i] is the sum over calibration tokens of the squared gradient of output i, less what errors of row i
# lose by moving on to later rows. And d[j] = 1 / U[j, j]^2 is what remains of the energy of input j, also a
# sum over tokens, after GPTQ has moved the error on to later columns (U: see gptq_factors). A bin twice as
# wide quadruples e^2 and saves one bit. So a bit buys the same loss everywhere if
#
#     bin width[i, j] = coarseness / sqrt(F[i] d[j])
#
# with one coarseness for all matrices, which is searched until code and model fill the cap. This is the usual
# allocation of bits by rate-distortion theory, for the distortion above.
#
# Rows. Let F be the sum of g g.T over the gradients g of all outputs. Every ROW_PARTS-th row is of one part.
# Parts are rounded one after the other, and the errors of each move on to the rows of later parts, as those
# of columns do (https://arxiv.org/abs/2505.22988, in blocks). F[i] above is what remains of F[i, i].
#
# F is estimated from few tokens. So ROW_DAMPING of the mean of its diagonal is added to it, and no row costs
# less than that. In the embedding, where tokens are fewer still, errors of rows stay; the cost of a row is at
# least 1/16 of the mean, and its bins use the geometric mean of its own cost and that mean.
#
# Shifts cost no bytes: the shift of a value follows from the oddness of the `whole`s to its left in the row.
# This is trellis-coded quantization, https://doi.org/10.1109/26.46532; of language models,
# https://arxiv.org/abs/2406.11235. A Viterbi search finds the best sequence of values. With 64 states and at
# the same size of the artifact, the squared error is a quarter less than that of rounding one by one.

ROW_PARTS = 8
ROW_DAMPING = 0.2
MAX_INT8 = 127  # no `whole` and no exponent is larger
# What is stored of a matrix (out, in). The names are those of the artifact's format; here they are called
#   codes         codes (out, in), int16
#   rows          row_exponents (out,), int8: of the bin widths, in eighths of an octave
#   columns       column_exponents (in,), int8
#   row_width     row_spread (out,), int8: root mean square of a row's restored weights, in quarters of an
#                 octave; it tells the decoder which codes are likely
#   column_width  column_spread (in,), int8: the same of a column, once rows are divided by their spread
MATRIX_TENSORS = ("codes", "rows", "columns", "row_width", "column_width")
# The weight of bits beside errors in gptq, by trial: at the same size, 3.4 bits a weight, the error is 1.5 %
# less than with a weight of 0.
RATE_WEIGHT = 1 / 15
# Number of states: (shift_check, odd_check), the bits that next_state XORs into a state. They are the parity
# checks of Ungerboeck's convolutional codes, https://doi.org/10.1109/TIT.1982.1056454, in octal as there.
TRELLIS = {1: (0, 0), 4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24)}

class Calibration(NamedTuple):
    """Sums over calibration tokens, which tell what an error in a weight costs; see CalibrationHook."""
    hessians: dict[str, Tensor]  # (in, in)
    fishers: dict[str, Tensor]  # (out, out); "embed" and "start": (vocab_size,)

    def hooks(self, visit: int, layer: int) -> CalibrationHook:
        return CalibrationHook(self.hessians, self.fishers, layer)

@torch.no_grad()
def calibrate(run: Run, model: GPT, loader: PackedLoader, first: int) -> Calibration:
    """Statistics of gptq_calibration_batches training buffers from `first` on. Freezes the model.

    Inputs are taken from whole buffers, gradients from the first quarter of each. Ranks share the buffers and
    add up their sums, so that the number of ranks does not matter.
    """
    cfg = run.cfg
    ranks = run.ranks
    plan = depth_plan(cfg, cfg.loops_at_end)
    backend = run.backend._replace(fused=False)
    sums = Calibration({}, {"start": model.embed.new_zeros(cfg.vocab_size)})
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 holds bf16 inputs exactly and sums in fp32
    model.requires_grad_(False)
    model.embed.requires_grad_()  # so that gradients go all the way back
    # As in the end of training, even if this run has not come so far; and as if all steps had been full, so
    # that a checkpoint can be calibrated again on the same tokens.
    loader.begin_stage(0, loader.shape_at(1.0))
    # 1) Run the buffers.
    indices = list(range(first + ranks.rank, first + cfg.gptq_calibration_batches, ranks.world_size))
    # A rank without a buffer of its own runs one all the same, to have tensors of the right shapes, and then
    # adds zeros.
    for batch in loader.buffers(iter(indices or [first]), ranks.device):
        model(batch, plan, backend, sums.hooks)
        with torch.enable_grad():
            quarter = first_tokens(batch, ceil_div(len(batch.tokens), 4))
            nll = model(quarter, plan, backend, sums.hooks)
            torch.autograd.grad(nll.sum(), model.embed)
    model.embed.requires_grad_(False)
    torch.set_float32_matmul_precision(precision)
    # 2) Add up over ranks.
    for statistics in sums:
        for name, value in statistics.items():
            statistics[name] = ranks.all_reduce_(value if indices else value.zero_())
            if not statistics[name].isfinite().all():
                raise UserError("not all activations and gradients are finite after training: lower "
                                "MATRIX_LR")
    return sums

def gptq_factors(H):
    """What GPTQ needs of H (in, in), the sum of x x.T over inputs: U (in, in) and d (in,).

    U is the upper Cholesky factor of the inverse of H, d = 1 / diagonal(U)^2. As in the paper, an input that
    was never used counts as one of energy 1, and the diagonal is damped by 1 % of its mean.
    """
    H = H + torch.diag((H.diagonal() == 0).float())
    H.diagonal().add_(0.01 * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    return U, U.diagonal() ** -2

def next_state(state, odd, states: int):
    """The state after a value, from the state before it and whether its `whole` is odd (1) or even (0).

    A systematic encoder with feedback, as Ungerboeck's. The state before a value is a register whose bit 0 is
    twice the value's shift. The register moves right by one bit, so that this bit drops out. If it was 1, the
    other bits of shift_check are XORed in, and if `whole` is odd, those of odd_check. Bit 0 of a check stands
    for the bit that has dropped out, hence check >> 1.
    """
    shift_check, odd_check = TRELLIS[states]
    shift = state & 1
    return (state >> 1) ^ (shift * (shift_check >> 1)) ^ (odd * (odd_check >> 1))

class Trellis(NamedTuple):
    """The branches of the trellis: a state, and the parity of the next `whole`."""
    states: int
    parities: int  # 2; with a single state 1, as there is nothing to tell apart
    offsets: Tensor  # (states, parities) the smallest value >= 0 of a branch; others are `parities` apart
    incoming: Tensor  # (states, parities) the branches, state * parities + parity, that lead to a state

    @classmethod
    def of(cls, states: int, device: torch.device) -> "Trellis":
        parities = min(states, 2)
        state = torch.arange(states, device=device)
        parity = state[:parities]
        offsets = (state[:, None] & 1) / 2 + parity  # shift + parity
        reached = torch.stack([next_state(state, odd, states) for odd in range(parities)], dim=1)
        # Exactly `parities` branches lead to each state, so sorting branches by where they lead lists these.
        incoming = reached.flatten().argsort(stable=True).view(states, parities)
        return cls(states, parities, offsets, incoming)

    def nearest(self, target, top: int):
        """The nearest value of each branch; targets of paths (..., states, 1) -> (..., states, parities)."""
        steps = ((target - self.offsets) / self.parities).round()
        limit = top // self.parities
        return self.offsets + self.parities * steps.clamp(-limit, limit)

def gptq(W, U, states: int = 1, rate_weight: float = 0, top: int = MAX_INT8, block: int = 128):
    """Round W (..., out, in) column by column, moving the error of each on to later ones.

    W is in units of bins. Returns the values, whole + shift, as fp32. https://arxiv.org/abs/2210.17323.
    U (..., in, in) is that of gptq_factors. But if column j of W was divided by c[j], so must be column j of
    U: the inputs of W / c are multiplied by c, their H is c H c, and its factor is U / c. Scales of rows of W
    do not matter. With one state, values are whole numbers of at most `top`.
    With more, a Viterbi search keeps the cheapest path to each state, each with the errors that it has moved
    on, and after every `block` columns only the cheapest of all. A value in column j costs

        (error / U[j, j])^2 + rate_weight * (value / U[j, j])^2 / (mean square that its row and column give)

    The second term stands for bits: the code length of a Gaussian grows with the square of the value.
    """
    W = W.clone()
    quantized = torch.empty_like(W)
    trellis = Trellis.of(states, W.device)
    row_square = W.square().mean(-1, keepdim=True).clamp(min=1e-6)
    column_square = (W.square() / row_square).mean(-2, keepdim=True).clamp(min=1e-6)
    rate = rate_weight / (row_square * column_square)
    state = W.new_zeros(W.shape[:-1], dtype=torch.long)
    for lo in range(0, W.size(-1), block):
        hi = min(lo + block, W.size(-1))
        here = W[..., lo:hi]
        U_here = U[..., lo:hi, lo:hi]
        values, state = search_block(here, U_here, rate[..., lo:hi], state, trellis, top)
        quantized[..., lo:hi] = values
        # Within the block, the error of each column has moved all later ones, so that here - values is
        # errors @ U_here. Solve for the errors, and move them on to the columns after the block.
        errors = torch.linalg.solve_triangular(U_here, here - values, upper=True, left=False)
        W[..., hi:] -= errors @ U[..., lo:hi, hi:]
    return quantized

def search_block(W, U, rate, state, trellis: Trellis, top: int):
    """The best values for a block of columns and the states that they lead to, from `state` (..., out) on.

    W, rate (..., out, columns), U (..., columns, columns) -> (..., out, columns), (..., out)
    """
    # A path holds the values that it has chosen and, after these, the weights that it still has to round,
    # which its errors have changed.
    paths = W[..., None, :].repeat_interleave(trellis.states, dim=-2)  # (..., out, states, columns)
    cost = torch.full_like(paths[..., 0], math.inf).scatter_(-1, state[..., None], 0.0)
    every_state = torch.arange(trellis.states, device=W.device)
    for j in range(W.size(-1)):
        # 1) Candidates: each path can go on with the nearest value of either parity.
        target = paths[..., j, None]
        value = trellis.nearest(target, top)
        # 2) A branch costs its error and its bits.
        u = U[..., j, j, None, None, None]
        error = (target - value) / u
        bits = rate[..., j, None, None] * (value / u).square()
        branch_cost = cost[..., None] + error.square() + bits
        # 3) Of the branches into a state, keep the cheapest.
        cost, which = branch_cost.flatten(-2)[..., trellis.incoming].min(-1)
        branch = trellis.incoming[every_state, which]
        came_from = (branch // trellis.parities)[..., None]
        paths = paths.gather(-2, came_from.expand_as(paths))
        # 4) Move its error on to later columns; at j the target becomes the value.
        kept_error = error.flatten(-2).gather(-1, branch)[..., None]
        paths[..., j:] -= kept_error * U[..., None, None, j, j:]
    # 5) Of all paths, keep the cheapest. The sums in step 4 have left rounding errors in its values.
    state = cost.argmin(-1)
    which = state[..., None, None].expand_as(paths[..., :1, :])
    best = paths.gather(-2, which)
    values = (2 * best.squeeze(-2)).round() / 2
    return values, state

def shifts_of(odd, states: int):
    """Twice the shift of every value, from `odd`, which is 1 where `whole` is odd; both (out, in) uint8."""
    state = np.zeros(len(odd), dtype=np.uint8)
    shifts = np.empty_like(odd.T, order="C")
    for shift, odd_column in zip(shifts, np.ascontiguousarray(odd.T)):
        shift[:] = state & 1
        state = next_state(state, odd_column, states)
    return shifts.T

def exponents_of(x, parts: int):
    """Logarithm to base 2 in steps of 1 / parts, as int8."""
    return (parts * x.log2()).round().clamp(-MAX_INT8, MAX_INT8).to(torch.int8)

def power(exponents, parts: int):
    """The inverse of exponents_of, fp32."""
    return (exponents.float() / parts).exp2()

class RowPart(NamedTuple):
    """Rows that are rounded together, and where their errors move."""
    rows: slice
    later: Tensor  # (later,) indices of the rows of later parts
    moves: Tensor  # (n, later, rows): by how much a later row falls for an error of 1 in one of these

def split_rows(F) -> tuple[list[RowPart], Tensor]:
    """Parts of the rows of n matrices with F (n, out, out), and what an error in each row costs, (n, out)."""
    index = torch.arange(F.size(1), device=F.device)
    F = F.clone()
    diagonal = F.diagonal(dim1=1, dim2=2)  # a view: F changes, too
    diagonal += (ROW_DAMPING * diagonal.mean(1, keepdim=True)).clamp(min=1e-30)  # more than 0, even if F is 0
    cost = torch.empty_like(diagonal)
    parts = []
    for part in range(ROW_PARTS):
        rows = slice(part, None, ROW_PARTS)
        later = index[index % ROW_PARTS > part]
        # e.T F e is least if errors in these rows move later ones by -inv(F[later, later]) F[later, rows] e.
        coupling = F[:, later, rows]
        moves = torch.linalg.solve(F[:, later[:, None], later], coupling)
        cost[:, rows] = diagonal[:, rows] - (coupling * moves).sum(1)
        parts.append(RowPart(rows, later, moves))
    return parts, cost

class Quantizer:
    """Matrices of one shape, stacked as (n, out, in), with all that GPTQ needs to know for any bin width."""

    def __init__(self, names: list[str], weights: list, hessians: list, fishers: list, token_fisher=None):
        """Lists have an item for each matrix: (out, in), (in, in), (out, out). For the embedding fishers are
        (out,), and token_fisher (vocab_size,) adds what errors cost where tokens are looked up.
        """
        self.names = names
        # 1) Column exponents, from d, what remains of the energy of each input. GPTQ works in their units.
        factors, d = zip(*map(gptq_factors, hessians))
        log_d = torch.stack(d).log2()
        mean_log_d = log_d.mean(1, keepdim=True)
        self.column_exponents = exponents_of((mean_log_d - log_d).exp2().sqrt(), 8)
        by_column = power(self.column_exponents, 8)[:, None]
        never_used = torch.stack([H.diagonal() == 0 for H in hessians])
        self.W = torch.stack(weights).masked_fill(never_used[:, None], 0) / by_column
        self.U = torch.stack(factors) / by_column
        # 2) The cost of an error in row i: F[i] times the geometric mean of d. By how much d[j] differs from
        #    this mean, the column exponents tell already.
        mean_d = mean_log_d.exp2()
        fisher = torch.stack(fishers)
        if token_fisher is None:
            self.parts, remaining = split_rows(fisher)
            self.root_cost = (remaining * mean_d).sqrt()  # (n, out)
        else:  # the embedding is read twice: as the head and, by token, at the start
            nowhere = fisher.new_zeros(1, 0, fisher.size(1))
            self.parts = [RowPart(slice(None), torch.arange(0), nowhere)]
            cost = fisher * mean_d + token_fisher
            mean_cost = cost.mean(1, keepdim=True)
            self.root_cost = (cost.maximum(mean_cost / 16) * mean_cost) ** 0.25
        # 3) No bin is so fine that the largest weight of its row, before errors move, would be out of range.
        largest = self.W.abs().amax(2) / MAX_INT8
        self.finest = torch.ceil(8 * largest.clamp(min=2.0**-15).log2())
        # 4) Exponents are rounded down. If that happened to all rows at once, the size would jump as the
        #    coarseness grows; so each row adds a different fraction first, multiples of the golden ratio.
        rows = torch.arange(self.W.size(1), device=self.W.device)
        self.row_phase = rows * 0.618 % 1

    def log_spread(self):
        """Sum over all weights of log2 of their spread in bins, for a coarseness of 1, ()."""
        spread = self.W.square().mean(2).sqrt() * self.root_cost
        return spread.clamp(min=1e-9).log2().sum() * self.W.size(2)

    def quantize(self, coarseness: float, states: int) -> dict[str, Tensor]:
        """The artifact's tensors of all matrices, as MATRIX_TENSORS lists them."""
        # 1) A row's factor of the bin widths is coarseness / sqrt(cost), rounded down to 1/8 octave.
        wanted = 8 * (coarseness / self.root_cost).log2() + self.row_phase
        exponents = wanted.floor().maximum(self.finest)
        row_exponents = exponents.clamp(-MAX_INT8, MAX_INT8).to(torch.int8)
        by_row = power(row_exponents, 8)[:, :, None]
        by_column = power(self.column_exponents, 8)[:, None]
        W = self.W.clone()
        values = torch.empty_like(W)
        for rows, later, moves in self.parts:  # W is changed by the errors of earlier parts
            bins = by_row[:, rows]
            values[:, rows] = gptq(W[:, rows] / bins, self.U, states, RATE_WEIGHT)
            error = values[:, rows] * bins - W[:, rows]
            W[:, later] -= moves @ error
        # 2) Tell the decoder how widely the weights of each row, and then of each column, are spread.
        restored = values * by_row * by_column
        row_spread = exponents_of(root_mean_square(restored, 2), 4)
        evened = restored / power(row_spread, 4)[:, :, None]
        column_spread = exponents_of(root_mean_square(evened, 1), 4)
        codes = (2 * values).to(torch.int16)
        stacks = codes, row_exponents, self.column_exponents, row_spread, column_spread
        return {f"{name}.{kind}": stack[i] for i, name in enumerate(self.names)
                for kind, stack in zip(MATRIX_TENSORS, stacks)}

def root_mean_square(x, dim: int):
    return x.square().mean(dim).sqrt().clamp(min=2.0**-31)

class MatrixInfo(NamedTuple):
    """Which rank quantizes a matrix, and its shape."""
    owner: int
    shape: tuple[int, int]

    def empty(self, kind: str, device: torch.device) -> Tensor:
        """An uninitialised tensor, to receive one of MATRIX_TENSORS."""
        rows, columns = self.shape
        if kind == "codes":
            return torch.empty(rows, columns, dtype=torch.int16, device=device)
        length = columns if kind in ("columns", "column_width") else rows
        return torch.empty(length, dtype=torch.int8, device=device)

class Quantizers(NamedTuple):
    """How the matrices of a model are shared out among ranks to be quantized."""
    local: list[Quantizer]  # this rank's, one for each shape of its matrices
    matrices: dict[str, MatrixInfo]  # all of them

@torch.no_grad()
def make_quantizers(run: Run, model: GPT, sums: Calibration) -> Quantizers:
    """Share the matrices out, and prepare this rank's for quantization."""
    # 1) Share the matrices out by the work that GPTQ has with them.
    matrices = {"embed": model.embed, **dict(model.named_matrices())}
    owners = assign_balanced([W.numel() * W.size(1) for W in matrices.values()], run.ranks.world_size)
    infos = {name: MatrixInfo(int(owner), W.shape) for (name, W), owner in zip(matrices.items(), owners)}
    # 2) Group this rank's by shape, each with its statistics.
    groups: dict[tuple, list[tuple]] = {}
    for name, W in matrices.items():
        if infos[name].owner == run.ranks.rank:
            is_embed = name == "embed"
            statistics = matrix_statistics(run.cfg, model, sums, name)
            groups.setdefault((W.shape, is_embed), []).append((name, W, *statistics))
    # 3) An error in weight (i, j) of the embedding has two costs. As the head it is F[i] d[j] / N, where N is
    #    the number of tokens, since d is a sum over tokens and not a mean. As the table in which tokens are
    #    looked up, it is S[i] / D, where S[i] is the sum of the squared gradients of row i. All costs are
    #    used without the 1 / N, which changes nothing but the unit; so the table's is multiplied by N. The
    #    trace of the head's hessian is N D, since its inputs are normed to a mean square of 1.
    local = []
    for (shape, is_embed), members in groups.items():
        names, weights, hessians, fishers = map(list, zip(*members))
        token_fisher = None
        if is_embed:
            tokens = sums.hessians["embed"].trace() / shape[1]
            token_fisher = sums.fishers["start"] * tokens / shape[1]
        local.append(Quantizer(names, weights, hessians, fishers, token_fisher))
    return Quantizers(local, infos)

def matrix_statistics(cfg: Config, model: GPT, sums: Calibration, name: str) -> tuple[Tensor, Tensor]:
    """The hessian (in, in) and the fisher of one matrix, "3.q" (out, out) or "embed" (out,)."""
    if name == "embed":
        return sums.hessians[name], sums.fishers[name]
    layer, kind = name.split(".")
    site = f"{layer}.qkv" if kind in ("q", "k", "v") else name
    # Hessian and fisher are both sums over the visits of a layer, so their product would grow with the square
    # of the number of visits, while the cost is a sum over visits.
    visits = depth_plan(cfg, cfg.loops_at_end).visits
    fisher = sums.fishers[site] / visits.count(int(layer))
    if kind in ("o", "down"):  # calibration saw them multiplied by their residual scale
        scale = (model.attn_scale if kind == "o" else model.mlp_scale)[int(layer)]
        fisher = fisher * scale * scale[:, None]
    D, KE = cfg.model_dim, cfg.kv_dim
    rows = {"q": slice(0, D), "k": slice(D, D + KE), "v": slice(D + KE, None)}
    own = rows.get(kind, slice(None))
    return sums.hessians[site], fisher[own, own]

@torch.no_grad()
def quantize(run: Run, model: GPT, quantizers: Quantizers, coarseness: float) -> dict[str, Tensor]:
    """All tensors of the artifact, on the CPU of every rank: quantized matrices, and the rest as fp16."""
    tensors = {}
    for name, p in model.named_parameters():
        if name in Optimizers.SCALARS:
            tensors[name] = shorten_fp16(p.half()).cpu()
    local = {}
    for quantizer in quantizers.local:
        local |= quantizer.quantize(coarseness, run.cfg.quant_states)
    for name, info in quantizers.matrices.items():
        for kind in MATRIX_TENSORS:
            key = f"{name}.{kind}"
            tensor = local[key] if key in local else info.empty(kind, run.ranks.device)
            as_bytes = tensor.contiguous().view(torch.int8)  # collectives have no int16
            run.ranks.broadcast_(as_bytes, info.owner)
            tensors[key] = as_bytes.view(tensor.dtype).cpu()
    return tensors

def shorten_fp16(x):
    """Round fp16 to 6 of its 10 mantissa bits: an error of .8 % at most, less than that of the matrices."""
    return ((x.view(torch.int16) + 8) & -16).view(torch.half)

# ---- 9 Artifact --------------------------------------------------------------------------------------------
# Values are nearly Gaussian, with a spread that follows from their row and column. They are sorted into
# contexts by this spread, and a range coder compresses each context by the counts of its symbols. First comes
# which `whole`s are odd (bit 1 of codes), from which all shifts (bit 0) follow; then, given spread, shift and
# oddness, the rest of the codes. (The coder: package constriction, https://arxiv.org/abs/2201.01741.)
#
# The artifact: magic number | BLAKE2b digest of the rest | Brotli streams, each preceded by its length | a
# length of 0 | words of the range coder. Decompressed and joined, the streams are: length of the JSON header
# | header (settings; name, dtype and shape of tensors) | the tensors' raw bytes.

ARTIFACT_MAGIC = b"PGOLF003"
DIGEST_BYTES = 16
STREAM_BYTES = 1 << 18  # a stream ends with the tensor that fills it; streams are compressed in parallel
SPREADS = 64  # classes of spread, a quarter of an octave each
SYMBOLS = 2 * MAX_INT8 + 1

def matrix_names(tensors: Iterable[str]) -> list[str]:
    """The matrices among an artifact's tensors."""
    return [name.removesuffix(".rows") for name in tensors if name.endswith(".rows")]

def spread_classes(tensors: dict[str, Tensor]):
    """The class of spread of every code of all matrices, (codes,) uint8."""
    def spread_in_bins(spread: str, exponents: str):
        """Log2 of a spread over a bin width, in eighths: spreads are in quarters, bin widths in eighths."""
        return 2 * tensors[spread].numpy().astype(np.int16) - tensors[exponents].numpy().astype(np.int16)

    classes = [np.zeros(0, dtype=np.uint8)]
    for name in matrix_names(tensors):
        by_row = spread_in_bins(f"{name}.row_width", f"{name}.rows")
        by_column = spread_in_bins(f"{name}.column_width", f"{name}.columns")
        wanted = (by_row[:, None] + by_column) // 2 + 24  # in quarters; class 24 is a spread of one bin
        classes.append(wanted.clip(0, SPREADS - 1).astype(np.uint8).ravel())
    return np.concatenate(classes)

def context_models(counts) -> Iterator[tuple[int, int, Any]]:
    """For every context that occurs: its index, its smallest symbol, and the distribution of symbols less
    that, or None if there is only one symbol.
    """
    model = lazy_import("constriction").stream.model
    for context, row in enumerate(counts):
        present = np.flatnonzero(row)
        if len(present):
            lo, hi = int(present[0]), int(present[-1])
            frequencies = row[lo : hi + 1] / row.sum()  # of integers: the same on every machine
            # perfect=False rounds frequencies the fast way, at no loss that would count
            yield context, lo, model.Categorical(frequencies, perfect=False) if lo < hi else None

def encode(coder: Any, numbers, contexts, total: int):
    """Append (count,) numbers of -127 to 127 to the coder, each in one of `total` contexts.

    Returns the counts of symbols, (total, SYMBOLS), which the decoder needs.
    """
    symbols = numbers.astype(np.int64) + MAX_INT8
    joint = contexts.astype(np.int64) * SYMBOLS + symbols
    counts = np.bincount(joint, minlength=total * SYMBOLS).reshape(total, -1)
    sorted_symbols = symbols[np.argsort(contexts, kind="stable")].astype(np.int32)
    ends = counts.sum(1).cumsum()
    for context, lo, model in context_models(counts):
        start = ends[context] - counts[context].sum()
        if model is not None:
            coder.encode(sorted_symbols[start : ends[context]] - lo, model)
    return counts

def decode(coder: Any, counts, contexts):
    """The numbers, int8, that `encode` was given; ValueError if counts and contexts disagree."""
    in_context = np.bincount(contexts, minlength=len(counts))
    if counts.min() < 0 or not np.array_equal(counts.sum(1), in_context):
        raise ValueError("counts of codes are wrong")
    sorted_numbers = np.empty(len(contexts), dtype=np.int8)
    ends = in_context.cumsum()
    for context, lo, model in context_models(counts):
        count = int(in_context[context])
        symbols = np.zeros(count, dtype=np.int32) if model is None else coder.decode(model, count)
        sorted_numbers[ends[context] - count : ends[context]] = symbols + lo - MAX_INT8
    numbers = np.empty_like(sorted_numbers)
    numbers[np.argsort(contexts, kind="stable")] = sorted_numbers
    return numbers

def encode_codes(tensors: dict[str, Tensor]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All codes as uint32 words of the range coder, and the counts of symbols in both of its passes."""
    coder = lazy_import("constriction").stream.queue.RangeEncoder()
    spreads = spread_classes(tensors)
    codes = [tensors[f"{name}.codes"].numpy().ravel() for name in matrix_names(tensors)]
    codes = np.concatenate([np.zeros(0, dtype=np.int16), *codes])
    is_odd = codes >> 1 & 1
    odd_and_shift = codes & 3
    counts = {"odd_counts": encode(coder, is_odd, spreads, SPREADS),
              "counts": encode(coder, codes >> 2, 4 * spreads + odd_and_shift, 4 * SPREADS)}
    return coder.get_compressed(), counts

def decode_codes(words, tensors: dict[str, Tensor], states: int) -> dict[str, Tensor]:
    """NAME.codes of all matrices. Takes their counts out of `tensors`."""
    coder = lazy_import("constriction").stream.queue.RangeDecoder(words)
    spreads = spread_classes(tensors)
    odd_counts = tensors.pop("odd_counts").numpy().astype(np.int64)
    counts = tensors.pop("counts").numpy().astype(np.int64)
    shapes = {}
    for name in matrix_names(tensors):
        shapes[name] = len(tensors[f"{name}.rows"]), len(tensors[f"{name}.columns"])
    ends = np.cumsum([rows * columns for rows, columns in shapes.values()], dtype=int)[:-1]
    low_bits = decode(coder, odd_counts, spreads).astype(np.uint8)  # until the loop, only which are odd
    for part, shape in zip(np.split(low_bits, ends), shapes.values()):  # a part is a view of low_bits
        shifts = shifts_of(part.reshape(shape), states)
        part[:] = 2 * part + shifts.ravel()
    high_bits = decode(coder, counts, 4 * spreads + low_bits).astype(np.int16)
    if not coder.maybe_exhausted():
        raise ValueError("words are left")
    codes = np.split(4 * high_bits + low_bits, ends)
    return {f"{name}.codes": torch.from_numpy(part).view(shape)
            for part, (name, shape) in zip(codes, shapes.items())}

def pack_artifact(header: dict, tensors: dict[str, Tensor]) -> bytes:
    """The artifact as bytes, which follow from the arguments alone. The header tells how it was made."""
    # 1) Entropy-code the codes; their counts join the other tensors.
    words, counts = encode_codes(tensors)
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".codes")}
    tensors |= {name: torch.from_numpy(table.astype(np.int32)) for name, table in counts.items()}
    # 2) Write header and tensors into streams, and compress these.
    listing = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    text = json.dumps({**header, "tensors": listing}, separators=(",", ":")).encode()
    streams = [len(text).to_bytes(4, "little") + text]
    for tensor in tensors.values():
        if len(streams[-1]) >= STREAM_BYTES:
            streams.append(b"")
        streams[-1] += tensor.contiguous().numpy().tobytes()
    compress = functools.partial(lazy_import("brotli").compress, quality=11, lgwin=24)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Brotli releases the GIL
        compressed = list(pool.map(compress, streams))
    # 3) Put everything together.
    body = b"".join(len(part).to_bytes(4, "little") + part for part in compressed)
    body += bytes(4)
    body += words.astype("<u4").tobytes()
    return ARTIFACT_MAGIC + digest_of(body) + body

def digest_of(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()

def unpack_artifact(blob: bytes, path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Header (settings and what it was made from) and tensors of an artifact; UserError if it is damaged."""
    start = len(ARTIFACT_MAGIC) + DIGEST_BYTES
    body = blob[start:]
    if blob[:start] != ARTIFACT_MAGIC + digest_of(body):
        raise UserError(f"{path} is not an artifact of this script, or damaged: magic or checksum is wrong")
    with parsing(str(path)):
        return parse_artifact(body)

def parse_artifact(body: bytes) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors of what follows an artifact's checksum; may raise anything on foreign bytes."""
    # 1) Decompress the streams, piece by piece, as a few bytes might stand for gigabytes.
    decompressor = lazy_import("brotli").Decompressor
    data = bytearray()
    offset = 4
    while size := int.from_bytes(body[offset - 4 : offset], "little"):  # the length before the stream
        stream = decompressor()
        end = min(offset + size, len(body))
        for start in range(offset, end, 64):
            data += stream.process(body[start : min(start + 64, end)])
            if len(data) > MOST_PARAMETERS:
                raise ValueError("its streams are too long")
        if not stream.is_finished():
            raise ValueError("a stream is cut off")
        offset = end + 4
    words = np.frombuffer(body, dtype="<u4", offset=offset).astype(np.uint32)
    # 2) Read header and tensors.
    start = 4 + int.from_bytes(data[:4], "little")
    header = json.loads(data[4:start])
    raw = torch.frombuffer(data, dtype=torch.uint8)
    tensors = {}
    for name, dtype_name, shape in header.pop("tensors"):
        dtype = getattr(torch, dtype_name)
        end = start + math.prod(shape) * dtype.itemsize
        tensors[name] = raw[start:end].clone().view(dtype).view(shape)
        start = end
    # 3) Decode the codes.
    weights = sum(len(tensors[f"{name}.rows"]) * len(tensors[f"{name}.columns"])
                  for name in matrix_names(tensors))
    if weights > MOST_PARAMETERS:
        raise ValueError("its matrices are too large")
    tensors |= decode_codes(words, tensors, header["settings"]["quant_states"])
    return header, tensors

@torch.no_grad()
def restore(model: GPT, tensors: dict[str, Tensor]) -> GPT:
    """A model of its own with an artifact's weights; UserError if these are not for such a model."""
    restored = copy.deepcopy(model)
    with parsing("the artifact"):
        for name, target in (*restored.named_parameters(), *restored.named_matrices()):
            if name in Optimizers.MUON:  # filled matrix by matrix
                continue
            value = tensors[name] if name in tensors else restore_matrix(tensors, name)
            if value.shape != target.shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}")
            target.copy_(value)
    return restored

def restore_matrix(tensors: dict[str, Tensor], name: str) -> Tensor:
    by_row = power(tensors[f"{name}.rows"], 8)[:, None]
    by_column = power(tensors[f"{name}.columns"], 8)
    return tensors[f"{name}.codes"] / 2 * by_row * by_column

def fingerprint(model: GPT, cfg: Config) -> str:
    """Digest of weights and of the settings of quantization: tells what an artifact was made from."""
    settings = repr(cfg.pick("quantization"))
    digest = hashlib.blake2b(settings.encode(), digest_size=DIGEST_BYTES)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()

def export(run: Run, model: GPT, sums: Calibration, code_bytes: int, path: Path,
           tokenizer_sha256: str = "") -> bytes:
    """Quantize with the least coarseness that fits, to .05 %; write the artifact, return it as read back."""
    cfg = run.cfg
    ranks = run.ranks
    header = {"settings": cfg.to_save(), "made_from": fingerprint(model, cfg),
              "tokenizer_sha256": tokenizer_sha256}
    quantizers = make_quantizers(run, model, sums)
    # 1) Begin with the coarseness that would fill the cap if values were Gaussian: the entropy of one, in
    #    bits, is log2 of its spread in bins + log2(2 pi e) / 2, which is 2.05.
    weights = sum(p.numel() for p in model.parameters())
    log_spread = sum((q.log_spread() for q in quantizers.local), torch.zeros((), device=ranks.device))
    log_spread = ranks.all_reduce_(log_spread).item() / weights
    bits = min(8 * (CAP_BYTES - code_bytes) / weights, 10.0)
    log2_coarseness = log_spread + 2.05 - bits
    target = 0.9998 * CAP_BYTES
    latest = {}  # the latest (log2_coarseness, size) below the target and the latest above it
    best = b""
    sizes = []
    octaves_a_byte = 8 / weights  # an octave of coarseness is worth about a bit a weight
    for _ in range(30):
        # 2) Try a coarseness, and keep the largest artifact that fits.
        coarseness = 2**log2_coarseness
        tensors = quantize(run, model, quantizers, coarseness)
        blob = pack_artifact(header, tensors) if ranks.is_main else b""
        size = code_bytes + ranks.broadcast_object(len(blob))
        sizes.append(size)
        run.log(f"artifact: coarseness {coarseness:.4g} makes code + model {size} bytes of {CAP_BYTES}")
        if size <= CAP_BYTES:
            best = max(best, blob, key=len)
        if 0.9995 * CAP_BYTES <= size <= CAP_BYTES or sizes[-3:] == [size] * 3:
            break  # full enough; or every coarseness gives this size
        latest[size < target] = log2_coarseness, size
        if len(latest) == 2:
            # 3) Interpolate. The next try replaces one of the two, so that they close in on the target.
            (start, start_size), (end, end_size) = latest.values()
            log2_coarseness = start + (end - start) * (target - start_size) / (end_size - start_size)
        else:
            step = octaves_a_byte * (size - target)
            log2_coarseness += max(-8.0, min(step, 8.0))
            octaves_a_byte *= 2  # if this step falls short, too: an octave is worth less
    if not ranks.broadcast_object(len(best)):
        raise UserError(f"the model does not fit into {CAP_BYTES} bytes: lower MODEL_DIM or NUM_LAYERS")
    if ranks.is_main:
        write_file(path, best)
    return ranks.broadcast_object(read_file(path) if ranks.is_main else b"")

def save_checkpoint(model: GPT, cfg: Config, steps: int, tokenizer_sha256: str, path: Path):
    """Write the weights before quantization, and what calibrating again needs to know."""
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    checkpoint = {"settings": cfg.to_save(), "steps": steps, "tokenizer_sha256": tokenizer_sha256,
                  "weights": weights}
    file = io.BytesIO()
    torch.save(checkpoint, file)
    write_file(path, file.getvalue())

class Saved(NamedTuple):
    """What EVAL_ONLY_PATH holds: an artifact, or the weights of a checkpoint."""
    settings: dict[str, Any]
    tokenizer_sha256: str = ""  # of the tokenizer that it was trained with; older ones do not say
    artifact: bytes = b""
    weights: dict[str, Tensor] | None = None
    steps: int = 0

def read_saved(path: Path) -> Saved:
    """Read an artifact or a checkpoint; UserError if it is neither, or damaged."""
    data = read_file(path)
    with parsing(f"EVAL_ONLY_PATH={path}"):
        if data.startswith(ARTIFACT_MAGIC):
            header, _ = unpack_artifact(data, path)
            return Saved(header["settings"], str(header.get("tokenizer_sha256", "")), artifact=data)
        archive = zipfile.ZipFile(io.BytesIO(data))
        if sum(member.file_size for member in archive.infolist()) > len(data):
            raise ValueError("compressed, which torch.save does not do")
        damaged = archive.testzip()
        if damaged:
            raise UserError(f"EVAL_ONLY_PATH={path} is damaged: the checksum of its {damaged} is wrong")
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if checkpoint["steps"] < 1:
            raise UserError(f"EVAL_ONLY_PATH={path} was saved before the first step: it is not trained")
        return Saved(dict(checkpoint["settings"]), str(checkpoint.get("tokenizer_sha256", "")),
                     weights=checkpoint["weights"], steps=int(checkpoint["steps"]))

def check_saved_settings(run: Run, saved: Saved):
    """UserError if the model was made with other settings of the model; others that differ are logged."""
    cfg = run.cfg
    path = run.cfg.eval_only_path
    differing = {name: value for name, value in saved.settings.items() if value != getattr(cfg, name)}
    wrong = [f"{name.upper()}={value}" for name, value in differing.items() if name in cfg.names("model")]
    if wrong:
        raise UserError(f"EVAL_ONLY_PATH={path} was made with other settings, which are taken from it unless "
                        "set: unset them, or set " + " ".join(wrong))
    if differing:
        run.log(f"settings other than those of its run, which were: {key_values(differing)}")

def open_saved(run: Run, model: GPT, saved: Saved) -> tuple[bytes, int]:
    """(artifact to score, steps of the checkpoint or 0). UserError if settings do not fit the saved model.

    With a checkpoint, fill the model with its weights, and take the artifact beside it if that was made from
    it with the same settings; else the artifact is b"" and has to be made again.
    """
    check_saved_settings(run, saved)
    if saved.artifact:
        return saved.artifact, 0
    path = Path(run.cfg.eval_only_path)
    with parsing(f"EVAL_ONLY_PATH={path}"):
        model.load_state_dict(saved.weights)
    beside = path.with_name("final_model.int6.ptz")
    blob = read_file(beside) if beside.is_file() else b""
    with contextlib.suppress(UserError):  # of another version, or damaged
        if blob and unpack_artifact(blob, beside)[0].get("made_from") == fingerprint(model, run.cfg):
            run.log(f"{beside} was made from {path} with these settings")
            return blob, saved.steps
    run.log(f"no {beside} made from {path} with these settings: calibrating again, for which training shards "
            "are needed")
    return b"", saved.steps

PACKED = '''"""train_gpt.py, packed: unpacks itself, gives its lines to linecache, for Triton, and runs."""
import base64, linecache, lzma
SOURCE = lzma.decompress(base64.b85decode("%s")).decode()
linecache.cache["train_gpt_unpacked.py"] = len(SOURCE), None, SOURCE.splitlines(True), "train_gpt_unpacked.py"
exec(compile(SOURCE, "train_gpt_unpacked.py", "exec"))
'''

@functools.cache
def pack_script() -> bytes:
    """This script as it is shipped and counted: minified, LZMA, base85, self-extracting.

    Annotations of functions stay: Triton reads them. A packed script is returned as it is.
    """
    if "SOURCE" in globals():
        return Path(__file__).read_bytes()
    source = script_source()
    minifier = lazy_import("python_minifier")
    annotations = minifier.RemoveAnnotationsOptions(remove_return_annotations=False,
                                                    remove_argument_annotations=False)
    small = minifier.minify(source, remove_annotations=annotations, remove_literal_statements=True,
                            hoist_literals=False, rename_locals=False)
    # python-minifier leaves references to its tree of this script on ast.Store and the like, objects that all
    # syntax trees share. For every += of a kernel Triton deep-copies such an object, and would copy the tree.
    for node in ast.walk(ast.parse(source)):
        if not node._fields:
            vars(node).clear()
    compressed = lzma.compress(small.encode(), format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return (PACKED % base64.b85encode(compressed).decode()).encode()

# ---- 10 Scores ---------------------------------------------------------------------------------------------

UNSCORED = -1.0  # marks a target without a loss; no loss is negative, but for a rounding error
PACK_MULTIPLE = 128  # numbers of positions are multiples of this, for efficient tiles and grouped products

class Score(NamedTuple):
    """The loss of all targets, their number, and the bytes of their text: where losses become a score."""
    nats: float
    targets: int
    text_bytes: int

    @classmethod
    def of(cls, nll, val: Validation) -> "Score":
        """The score of the losses of all targets of the validation stream, summed in fp64."""
        return cls(nll.double().sum().item(), nll.numel(), int(val.token_bytes.sum()))

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.targets

    @property
    def bpb(self) -> float:
        """Bits per byte of text."""
        return self.nats / (math.log(2) * self.text_bytes)

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f}"

def pack_spans(val: Validation, spans: list[tuple[int, int]], max_len: int, max_spans: int,
               multiple: int = PACK_MULTIPLE) -> tuple[Batch, np.ndarray]:
    """Pack ranges [lo, hi) of targets end to end, each a context of its own.

    Returns the batch and the index of every position's target. Both are filled up to a multiple of `multiple`
    with positions that have no target (-1), and the batch with empty spans.
    """
    target_index = np.concatenate([np.arange(lo, hi) for lo, hi in spans])
    count = len(target_index)
    total = ceil_div(count, multiple) * multiple
    starts = np.cumsum([0] + [hi - lo for lo, hi in spans])  # the last one is where filling starts
    bounds = span_bounds(starts[starts < total], total, max_len)
    room = max_spans + ceil_div(multiple, max_len)
    if len(bounds) - 1 > room:
        raise ValueError(f"{len(bounds) - 1} spans where {room} have room: some would not be scored")
    tokens = np.zeros(total, dtype=np.int64)
    targets = np.full(total, IGNORE)
    tokens[:count] = val.tokens[target_index]
    targets[:count] = val.tokens[target_index + 1]
    target_index = np.append(target_index, np.full(total - count, -1))
    return make_batch(tokens, targets, bounds, room, max_len), target_index

class Tally:
    """The loss of every target of the validation stream on this rank, and how often each was scored."""

    def __init__(self, targets: int, ranks: Ranks):
        self.ranks = ranks
        self.nll = torch.zeros(targets, device=ranks.device)
        self.times = torch.zeros(targets, dtype=torch.int32, device=ranks.device)

    def add(self, target_index, nll):
        self.nll.index_add_(0, target_index, nll)
        self.times.index_add_(0, target_index, torch.ones_like(target_index, dtype=torch.int32))

    def gather(self, what: str, may_miss: bool = False) -> Tensor:
        """The losses of all ranks as one, (targets,) fp32 on the CPU.

        A target that was scored more than once ends the run, and so does a loss that is not finite. A target
        that was never scored ends it as well or, with may_miss, has the loss UNSCORED.
        """
        times = self.ranks.all_reduce_(self.times)
        nll = self.ranks.all_reduce_(self.nll)
        often = int((times > 1).sum())
        never = int((times < 1).sum())
        if often or (never and not may_miss):
            raise RuntimeError(f"{what}: {often} targets were scored more than once, {never} never")
        infinite = int((~nll.isfinite()).sum())
        if infinite:
            raise UserError(f"{what}: {infinite} losses are not finite; if only here, lower TTT_LORA_LR")
        return nll.where(times == 1, UNSCORED).cpu()

@torch.no_grad()
def evaluate(run: Run, model: GPT, val: Validation, plan: Plan) -> Tensor:
    """Plain loss of every target, (targets,); nothing learns.

    A document is read in windows of eval_seq_len targets that move on by a third of that. Of each the targets
    that no earlier window has are scored.
    """
    cfg = run.cfg
    ranks = run.ranks
    tally = Tally(len(val.token_bytes), ranks)
    # 1) The windows of this rank's documents, and the first target that is scored in each.
    local = np.flatnonzero(assign_balanced(val.lengths, ranks.world_size) == ranks.rank)
    context = cfg.eval_seq_len
    ends = np.arange(context, val.lengths.max() + context, ceil_div(context, 3))
    begins = np.append(0, ends)  # of what each window adds to the one before
    windows = deque()
    for start, length in zip(val.starts[local].tolist(), val.lengths[local].tolist()):
        for chunk in range(np.searchsorted(begins, length)):
            window = chunk_window(chunk, length, ends, context)
            windows.append([start + target for target in window])
    # 2) Score them, as many at a time as there is room for.
    batch_tokens = cfg.val_batch_tokens // max(ranks.world_size, 8)  # of one size for up to 8 ranks
    is_first = True
    while windows:
        spans = []
        is_new = []
        room = max(context, batch_tokens)
        while windows and windows[0][1] - windows[0][0] <= room:
            first, last, first_scored = windows.popleft()
            spans.append((first, last))
            is_new.append(np.arange(first, last) >= first_scored)
            room -= last - first
        batch, target_index = pack_spans(val, spans, context, len(spans))
        rows = torch.from_numpy(np.flatnonzero(np.concatenate(is_new)))
        scored = torch.from_numpy(target_index)[rows]
        call = functools.partial(model, to_device(batch, ranks.device), plan, run.backend)
        if is_first:
            compile_kernels(run.backend, ranks, call)
            is_first = False
        tally.add(to_device(scored, ranks.device), call()[to_device(rows, ranks.device)])
    return tally.gather("plain evaluation")

# ---- 11 Score-first adaptation -----------------------------------------------------------------------------
# Test-time training as in #1530: every document by itself, with fresh adapters, in chunks from left to right.
# A chunk is scored by adapters that have learned from the earlier chunks of its document. That score is
# final; then the adapters take one step on the chunk. Documents share nothing, and no score depends on how
# soon its document will end (see chunk_window). Documents enter a fixed number of slots in validation order;
# when one ends, the next one takes its slot. A round scores one chunk in every occupied slot; if these chunks
# are too large together, some slots wait for a later round. The window of a chunk is the chunk with the
# context before it; a round packs its windows end to end.

class Turn(NamedTuple):
    """One chunk of one document, in its slot."""
    slot: int
    document: int
    chunk: int

class Round(NamedTuple):
    """One chunk of every slot that takes a turn; see schedule_rounds."""
    batch: Batch  # its rows are the positions of the chunks, and filling
    ends: Tensor  # (slots,) int32: where each slot's positions end in the batch
    row_ends: Tensor  # (slots,) int32: where each slot's rows end
    has_turn: Tensor  # (slots,) 1 for those that take a turn, else 0
    loss_weight: Tensor  # (rows,) 1 / chunk size; 0 for filling, and if nothing of the document is left
    target_index: Tensor | None  # (scored,) the target of each row that is not filling; those come first
    new_slots: Sequence[int] = ()  # slots that a new document has just entered
    progress: float = 0.0  # fraction of the work done before it
    documents: int = 0  # finished before it

def chunk_ends(longest: int, cfg: Config):
    """Where chunks end, up to at least `longest`: (chunks,) targets from the beginning of any document.

    A chunk has ttt_chunk_size targets, or ttt_chunk_growth of those before it, whichever is more, but no more
    than a window.
    """
    ends = [cfg.ttt_chunk_size]
    while ends[-1] < longest:
        size = max(cfg.ttt_chunk_size, int(ends[-1] * cfg.ttt_chunk_growth))
        ends.append(ends[-1] + min(size, cfg.ttt_eval_seq_len))
    return np.array(ends)

ROWS_PER_SLOT = 64  # in the mean: a slot may use more where others use fewer

def round_rows(cfg: Config) -> int:
    """Rows of the head in every round: a fixed number, as CUDA graphs need, that holds the largest chunk."""
    return max(ROWS_PER_SLOT * cfg.ttt_batch_size, cfg.ttt_eval_seq_len)

def schedule_rounds(lengths: list[int], cfg: Config, ends) -> Iterator[tuple[list[int], list[Turn]]]:
    """For every round: the slots that new documents enter, and the turns that are taken, by slot.

    Every occupied slot takes a turn, unless the chunks together have more than round_rows: then the slots
    that have waited longest go first, and the others wait for a later round.
    """
    slots = cfg.ttt_batch_size
    sizes = np.diff(ends, prepend=0)
    queue = (document for document, length in enumerate(lengths) if length)
    next_turns: dict[int, Turn] = {}  # by slot, longest waiting first
    while True:
        free = [slot for slot in range(slots) if slot not in next_turns]
        new_slots = []
        for slot, document in zip(free, queue):  # free first: zip takes no document without a slot for it
            next_turns[slot] = Turn(slot, document, 0)
            new_slots.append(slot)
        if not next_turns:
            return
        rows = np.cumsum([sizes[turn.chunk] for turn in next_turns.values()])
        taken = list(next_turns.values())[: np.searchsorted(rows, round_rows(cfg), side="right")]
        yield new_slots, sorted(taken)
        for turn in taken:
            del next_turns[turn.slot]
            if ends[turn.chunk] < lengths[turn.document]:
                next_turns[turn.slot] = turn._replace(chunk=turn.chunk + 1)

def chunk_window(chunk: int, length: int, ends, context: int) -> tuple[int, int, int]:
    """The window of a document's chunk as targets [first, last), and the first target of the chunk itself.

    Where it begins follows from the chunk's number alone: `context` before the end of the full chunk, even if
    the document ends within the chunk. #1530 counts back from the document's own end in its last chunk. What
    tokens of that chunk see then depends on how soon the document ends, which is a glimpse of the future.
    """
    end = int(ends[chunk])
    chunk_start = int(ends[chunk - 1]) if chunk else 0
    return max(0, end - context), min(end, length), chunk_start

def round_sizes(cfg: Config) -> range:
    """The numbers of positions that a round is filled up to, 48 of them or fewer."""
    most = cfg.ttt_batch_size * cfg.ttt_eval_seq_len
    multiple = PACK_MULTIPLE * ceil_div(most, 48 * PACK_MULTIPLE)
    return range(multiple, most + multiple, multiple)

def make_round(val: Validation, turns: list[Turn], ends, cfg: Config) -> Round:
    """Pack the windows of all turns; `ends` as chunk_ends gives them."""
    # 1) Where the window and the chunk of every turn are.
    spans = []
    chunk_rows = []
    weights = []
    span_sizes = np.zeros(cfg.ttt_batch_size, dtype=np.int64)
    row_counts = np.zeros_like(span_sizes)
    for slot, document, chunk in turns:
        length = val.lengths[document]
        first, last, chunk_start = chunk_window(chunk, length, ends, cfg.ttt_eval_seq_len)
        start = val.starts[document]
        goes_on = last < length
        packed_before = span_sizes.sum()
        chunk_rows.append(np.arange(chunk_start, last) - first + packed_before)
        weights.append(np.full(last - chunk_start, goes_on / (ends[chunk] - chunk_start)))
        spans.append((start + first, start + last))
        span_sizes[slot] = last - first
        row_counts[slot] = last - chunk_start
    # 2) Pack the windows; give targets to the rows of the chunks alone, and fill up the rows.
    multiple = round_sizes(cfg).step
    batch, target_index = pack_spans(val, spans, cfg.ttt_eval_seq_len, cfg.ttt_batch_size, multiple)
    rows = np.concatenate(chunk_rows)
    filling = round_rows(cfg) - len(rows)
    all_rows = np.pad(rows, (0, filling))  # with position 0, which has no target here
    targets = np.pad(batch.targets[rows], (0, filling), constant_values=IGNORE)
    loss_weight = np.pad(np.concatenate(weights), (0, filling)).astype(np.float32)
    has_turn = (row_counts > 0).astype(np.float32)
    batch = batch._replace(targets=torch.from_numpy(targets), rows=torch.from_numpy(all_rows))
    return Round(batch, slot_ends(span_sizes, len(batch.tokens)), slot_ends(row_counts, len(all_rows)),
                 *map(torch.from_numpy, (has_turn, loss_weight, target_index[rows])))

def slot_ends(sizes, total: int) -> Tensor:
    """Where slots of these sizes end, (slots,) int32; what fills up to the total counts as the last one's."""
    ends = np.cumsum(sizes)
    ends[-1] = total
    return torch.from_numpy(ends.astype(np.int32))

def adapt(model: GPT, adapters: Adapters, plan: Plan, backend: Backend, this: Round) -> Tensor:
    """Run a round; returns the adapted losses of its rows. The order of the two steps is the rule."""
    nll = model(this.batch, plan, backend, adapters.hooks(this.ends, this.row_ends))
    final = nll.detach().clone()  # 1. score, with adapters that have learned from earlier chunks only
    loss = (nll * this.loss_weight).sum()
    adapters.learn(loss, this.has_turn)  # 2. learn from what was just scored
    return final

def capture_round(model: GPT, adapters: Adapters, plan: Plan, backend: Backend, size: int, like: Round):
    """Capture `adapt` for rounds of `size` positions. `like` is a round of any size: graphs share all of its
    memory but tokens and their positions.
    """
    batch = like.batch
    tokens = batch.tokens.new_zeros(size)
    spans = batch.spans._replace(positions=tokens.clone())
    batch = batch._replace(tokens=tokens, spans=spans)
    inputs = like._replace(batch=batch, target_index=None)
    function = functools.partial(adapt, model, adapters, plan, backend)
    adapters.graphs[size] = CapturedCall.of(function, inputs, adapters.graph_pool)

def run_round(model: GPT, adapters: Adapters, plan: Plan, backend: Backend, this: Round) -> Tensor:
    """`adapt` or, where it was captured for this size, its graph."""
    captured = adapters.graphs.get(len(this.batch.tokens))
    if captured is None:
        return adapt(model, adapters, plan, backend, this)
    adapters.replayed.synchronize()  # the host is at most one round ahead, so that the deadline holds
    nll = captured.replay(this._replace(target_index=None))
    adapters.replayed.record()
    return nll

def rank_rounds(run: Run, val: Validation) -> Iterator[Round]:
    """The rounds of this rank. Ranks get whole documents, balanced by the tokens in their windows."""
    cfg = run.cfg
    ranks = run.ranks
    ends = chunk_ends(val.lengths.max(), cfg)
    window_tokens = np.minimum(ends, cfg.ttt_eval_seq_len)  # by chunk
    last_chunk = np.searchsorted(ends, val.lengths)
    costs = np.cumsum(window_tokens)[last_chunk]
    local = np.flatnonzero(assign_balanced(costs, ranks.world_size) == ranks.rank)
    total = costs[local].sum()
    done = 0
    documents = 0
    for new_slots, turns in schedule_rounds(val.lengths[local].tolist(), cfg, ends):
        turns = [turn._replace(document=local[turn.document]) for turn in turns]
        this = make_round(val, turns, ends, cfg)
        yield to_device(this, ranks.device)._replace(new_slots=new_slots, progress=done / total,
                                                     documents=documents)
        documents += sum(ends[turn.chunk] >= val.lengths[turn.document] for turn in turns)
        done += window_tokens[[turn.chunk for turn in turns]].sum()

def score_documents(run: Run, model: GPT, val: Validation, adapters: Adapters, backend: Backend,
                    deadline: float) -> Tensor:
    """Losses of all targets by test-time training, (targets,); UNSCORED past the deadline (perf_counter)."""
    ranks = run.ranks
    plan = depth_plan(run.cfg, run.cfg.loops_at_end)
    tally = Tally(len(val.token_bytes), ranks)
    began = time.perf_counter()
    late = False
    lines = 1
    for this in rank_rounds(run, val):
        late = time.perf_counter() > deadline
        if late:
            break
        if this.progress >= lines / 10 and ranks.is_main:
            lines += 1
            log_progress(run, val, tally, this, time.perf_counter() - began)
        adapters.reset_slots(this.new_slots)
        nll = run_round(model, adapters, plan, backend, this)
        tally.add(this.target_index, nll[: len(this.target_index)])
    ranks.synchronize()
    seconds = time.perf_counter() - began
    slowest = ranks.all_reduce_max(seconds)
    total = ranks.all_reduce_(torch.tensor(seconds, device=ranks.device)).item()
    run.log(f"adapt: ranks busy {total / ranks.world_size / slowest:.1%} of {slowest:.1f} s")
    return tally.gather("test-time training", may_miss=ranks.all_reduce_max(late) > 0)

def log_progress(run: Run, val: Validation, tally: Tally, this: Round, seconds: float):
    """Log what this rank has scored so far; once for each tenth of the work."""
    scored = tally.times.cpu().numpy() > 0
    nats = tally.nll.double().sum().item()
    so_far = Score(nats, scored.sum(), val.token_bytes[scored].sum())
    to_come = seconds / this.progress - seconds
    run.log(f"ttt_progress: documents:{this.documents} tokens:{so_far.targets} val_bpb:{so_far.bpb:.6f} "
            f"done:{this.progress:.0%} elapsed:{seconds:.0f}s eta:{to_come:.0f}s")

def warm_up_adaptation(run: Run, model: GPT, adapters: Adapters, backend: Backend):
    """Compile and capture all that adaptation needs, on random tokens; the adapters are as new after it."""
    cfg = run.cfg
    slots = run.cfg.ttt_batch_size
    plan = depth_plan(cfg, cfg.loops_at_end)
    ends = chunk_ends(cfg.ttt_eval_seq_len, cfg)
    length = int(ends[-1]) + 1
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, slots * length + 1)
    val = Validation(tokens, np.ones(len(tokens) - 1), np.arange(slots) * length, np.full(slots, length), 0)
    last = len(ends) - 1
    have_room = round_rows(cfg) // np.diff(ends, prepend=0)  # slots, by chunk
    for chunk in (0, last):  # the shortest windows, and full ones
        turns = [Turn(slot, slot, chunk) for slot in range(min(slots, have_room[chunk]))]
        this = to_device(make_round(val, turns, ends, cfg), run.ranks.device)
        if chunk == 0:  # then adapters hold undefined numbers, until reset_slots
            call = functools.partial(adapt, model, adapters, plan, backend, this)
            compile_kernels(backend, run.ranks, call)
        adapt(model, adapters, plan, backend, this)
    if run.ranks.on_gpu:
        torch.cuda.empty_cache()  # graphs have a memory pool of their own
        for size in reversed(round_sizes(cfg)):  # the largest first: its memory serves the others as well
            capture_round(model, adapters, plan, backend, size, this)
    adapters.reset_slots(range(slots))

# ---- 12 Mixture --------------------------------------------------------------------------------------------
# The probability of a target in the final score is mixed of three. The adapted model's has most weight. The
# plain model's takes back some of what adapters learn too fast. Counts of n-grams remember what the document
# repeats (names, phrases, whole passages), as in a cache language model (Kuhn and De Mori, 1990): of the k
# tokens before the target, let n count how often they have stood earlier in its document, and h how often the
# target has followed them there. With the w and c of CACHE, summed over its k:
#
#     p = ((1 - s) p_adapted + s p_plain + sum w h / (n + c)) / (1 + sum w n / (n + c)),  s = PLAIN_SHARE
#
# The weights and n do not depend on the target. Over all pieces each p adds up to 1, and h to n; so p adds up
# to 1 as well. Only tokens that stand before the target are counted, and documents share nothing. The three
# are computed one after the other, for speed; computed together, token by token, they would be the same.

PLAIN_SHARE = 0.3  # by 300 validation documents of the proxy corpus, after a run of full length
# By k: w and c. The w are three quarters of what fits half of the proxy's validation documents best after a
# short training, as models that have trained for longer copy better by themselves.
CACHE = {0: (0.001, 30.0), 1: (0.015, 22.0), 2: (0.02, 2.0), 4: (0.027, 0), 8: (0.1, 0), 16: (1.5, 0)}

def number_equal(keys):
    """(n,) integers -> a number below n that equal keys share, and how many of them stand before each."""
    ordered, order = keys.sort(stable=True)  # equal keys keep their order
    first = torch.searchsorted(ordered, ordered)  # the place of the first equal one
    before = torch.arange(len(keys), device=keys.device) - first
    return tuple(torch.empty_like(keys).scatter_(0, order, column) for column in (first, before))

def count_votes(val: Validation, vocab_size: int, device: torch.device) -> Tensor:
    """The votes for each target, sum w h / (n + c), and for all pieces, sum w n / (n + c); (2, targets)."""
    tokens = torch.from_numpy(val.tokens).to(device)
    lengths = torch.from_numpy(val.lengths).to(device)
    last, targets = tokens[:-1], tokens[1:]
    votes = torch.zeros(2, len(targets), device=device)
    keys = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # k = 0: the document
    for k in range(max(CACHE) + 1):
        context, n = number_equal(keys)
        if k in CACHE:
            w, c = CACHE[k]
            _, h = number_equal(context * vocab_size + targets)
            votes += w * torch.stack([h, n]) / (n + c).clamp(min=1)  # where n is 0, so is h
        # One token more. Contexts are numbered, not hashed, so that unlike ones never share a count. A token
        # from before the document has BOS behind it in its context, which therefore has no equal.
        keys = context * vocab_size + last.roll(k)
    return votes.cpu()

def final_losses(adapted, plain, votes) -> Tensor:
    """-log p of all targets, (targets,), from the losses of the two models, (targets,), and count_votes."""
    p_adapted = adapted.double().neg().exp()  # fp64 holds the probability of any loss up to 700
    p_plain = plain.double().neg().exp()
    p = torch.lerp(p_adapted, p_plain, PLAIN_SHARE)
    p = (p + votes[0]) / (1 + votes[1])
    return -p.log().float()

# ---- 13 The run --------------------------------------------------------------------------------------------

# How many targets of FineWeb's validation the challenge scores, whole sequences of 2048, and the bytes of
# their text: by the published tokenizer without case operations, and with them, where the bytes are those of
# the raw text. At most 2047 targets follow, of some 4 bytes each, and so less than 8192 bytes.
RAW_CUT = 47_851_520
FINEWEB_BYTES = {40_540_160: 151_078_222, RAW_CUT: 151_074_499}
FINEWEB_DOCUMENTS = 50_000

def fineweb_cut(targets: int) -> int:
    """The cut of a validation set of so many targets if it may be FineWeb's, else 0."""
    return next((cut for cut in FINEWEB_BYTES if 0 <= targets - cut < 2048), 0)

@dataclasses.dataclass
class Result:
    """What RESULT and result.json hold, in this order. A field that does not apply is None and left out."""
    # scores: with adaptation, which is the headline; without; before quantization
    val_loss: float = None
    val_bpb: float = None
    val_loss_quantized: float = None
    val_bpb_quantized: float = None
    val_loss_unquantized: float = None
    val_bpb_unquantized: float = None
    # why the scores would not count as a record, and how many targets have no adapted loss
    caveats: list[str] = None
    unadapted_tokens: int = None
    # what was scored
    documents: int = None
    tokens: int = None
    bytes: int = None
    bytes_at_cut: int = None  # see FINEWEB_BYTES
    # limits
    total_bytes: int = None
    code_bytes: int = None
    model_bytes: int = None
    cap_bytes: int = CAP_BYTES
    clocks: dict[str, dict] = None
    # the run
    mode: str = None
    seed: int = None
    steps: int = None
    targets_left_out: int = None  # of training, where shards begin or a buffer has too many documents
    run_id: str = None
    settings: dict[str, Any] = None
    hardware: str = None
    kernels: str = None  # Triton: training has FP8 in the MLP; PyTorch: it has not
    versions: dict[str, str] = None
    phases: dict[str, float] = None
    seconds: float = None
    peak_gpu_bytes: int = None
    # hashes of inputs and outputs
    code_sha256: str = None
    packed_sha256: str = None
    model_sha256: str = None
    tokenizer_sha256: str = None
    case_ops: str = None  # the transform of the text, if it has one
    train_sha256: str = None  # of samples of all training shards
    train_data_sha256: str = None  # of those that were read: what `sha256sum SHARDS | sha256sum` prints
    val_sha256: str = None

    def add_scores(self, scored: "Scored", val: Validation):
        """Take in the scores of the artifact, and what was scored."""
        self.val_loss, self.val_bpb = scored.final.loss, scored.final.bpb
        self.val_loss_quantized, self.val_bpb_quantized = scored.quantized.loss, scored.quantized.bpb
        self.unadapted_tokens = scored.unadapted
        self.documents = len(val.starts)
        self.tokens = scored.final.targets
        self.bytes = scored.final.text_bytes
        if cut := fineweb_cut(self.tokens):
            self.bytes_at_cut = int(val.token_bytes[:cut].sum())
        self.val_sha256 = val.sha256

    def is_fineweb(self) -> bool:
        """Whether validation has FineWeb's bytes, up to its cut or, by another tokenizer, in all."""
        cut = fineweb_cut(self.tokens)
        counted = FINEWEB_BYTES[cut or RAW_CUT]
        known = self.bytes_at_cut == counted if cut else self.documents == FINEWEB_DOCUMENTS
        return known and 0 <= self.bytes - counted < 8192

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

def key_values(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}:{value}" for name, value in values.items()) or "none"

def versions() -> dict[str, str]:
    """The versions of everything that a score may depend on, from package metadata, without importing it."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in ("torch", "triton", "flash_attn_3", "numpy", "sentencepiece", "brotli", "constriction",
                    "python-minifier"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

def open_run(run: Run) -> Result:
    """Write the head of the log; returns the result as far as it is known."""
    cfg, ranks, log, backend = run
    source = script_source()
    settings = dataclasses.asdict(cfg)
    changed = {name: value for name, value in settings.items() if value != getattr(Config, name)}
    result = Result(run_id=log.run_id, seed=cfg.seed, settings=changed, versions=versions(),
                    code_sha256=sha256(source.encode()),
                    hardware=f"{ranks.world_size} x {device_name(ranks.device)}")
    # 1) What runs: script, versions, settings, device.
    log(f"run_id:{log.run_id} artifact_dir:{log.folder} code_sha256:{result.code_sha256}")
    log(f"versions: {key_values(result.versions)}")
    log(f"settings other than the record's: {key_values(changed)}")
    log.metrics("settings", **settings, world_size=ranks.world_size)
    log(f"all settings: {key_values(settings)}", console=False)
    result.kernels = "Triton" if backend.fused else "PyTorch"
    device = ranks.device
    log(f"device:{device_name(device)} world_size:{ranks.world_size} dtype:{compute_dtype(device)} "
        f"attention:{backend.attend.__name__} kernels:{result.kernels}")
    log("\n".join(("=" * 100, source, "=" * 100)), console=False)
    # 2) What would fail only at the end of the run, were it not tried now.
    for package in ("brotli", "constriction", "sentencepiece"):
        lazy_import(package)
    if "SOURCE" in globals():
        pack_script()  # reads this file, which may be another when training is over
    else:
        lazy_import("python_minifier")
    if cfg.save_scores and ranks.is_main and not os.access(Path(cfg.save_scores).resolve().parent, os.W_OK):
        raise UserError(f"SAVE_SCORES={cfg.save_scores}: its folder is missing or not writable")
    return result

def measure_code(run: Run, result: Result):
    """Write the packed script, and note its size. Packing takes 2 s, for which training need not wait."""
    packed = run.ranks.broadcast_object(pack_script() if run.ranks.is_main else b"")
    if run.ranks.is_main:
        write_file(run.log.folder / "train_gpt_packed.py", packed)
    result.code_bytes = len(packed)
    result.packed_sha256 = sha256(packed)

def open_tokenizer(run: Run, files: DataFiles, manifest: Manifest, saved: Saved | None,
                   result: Result) -> Tokenizer:
    """Load the tokenizer, and note it in `result`. UserError if shards or the saved model are of another."""
    path = files.tokenizer
    tokenizer = load_tokenizer(path, run.cfg.vocab_size)
    changes = ", ".join(tokenizer.changes()) or "nothing"
    run.log(f"tokenizer: sha256:{tokenizer.sha256} changes in text: {changes}")
    result.tokenizer_sha256 = tokenizer.sha256
    if tokenizer.markers:
        result.case_ops = manifest.case_ops or "unnamed"
        sidecars = len(find_sidecars(files.val))
        run.log(f"case operations: {result.case_ops} sidecars:{sidecars}")
        if tokenizer.changes() and sidecars < len(files.val):
            raise UserError(f"{path} changes {changes}: every shard of validation in {files.val[0].parent} "
                            "needs a side-car, fineweb_val_bytes_NNNNNN.bin, with the bytes of the raw text")
    if fault := manifest.fault(path, tokenizer.sha256):
        raise UserError(f"{fault}: the shards were made with another one")
    if saved and not saved.tokenizer_sha256:
        run.log.caveat(f"EVAL_ONLY_PATH={run.cfg.eval_only_path} does not say which tokenizer it is for")
    elif saved and saved.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"EVAL_ONLY_PATH={run.cfg.eval_only_path} is for the tokenizer of sha256 "
                        f"{saved.tokenizer_sha256:.12}..., but {path} has {tokenizer.sha256:.12}...: name by "
                        "DATA_DIR the data that it was trained on")
    return tokenizer

def check_disk(run: Run, parameters: int):
    """UserError if the run's folder has no room for its files."""
    if run.ranks.is_main:
        free = shutil.disk_usage(run.log.folder).free
        need = 2**25 + 6 * parameters  # logs; a checkpoint of 4 bytes a parameter, an artifact of less than 2
        if free < need:
            raise UserError(f"ARTIFACT_DIR={run.log.folder}: {free >> 20} MiB are free, a run needs "
                            f"{need >> 20}")

def produce(run: Run, model: GPT, steps: int, files: DataFiles, tokenizer: Tokenizer, manifest: Manifest,
            result: Result, validate: Callable) -> tuple[GPT, bytes]:
    """Train, unless the model is a checkpoint after `steps` steps (else 0); calibrate; export.

    Returns a model with the average of the weights, and the artifact.
    """
    cfg, ranks, log, _ = run
    with log.phase("open training data"):
        local_buffers, buffer_tokens = split_step(cfg, ranks.world_size)
        loader = PackedLoader(files.train, tokenizer.bos, cfg, buffer_tokens, hash_shards=ranks.is_main)
        manifest.check_train(files.train, loader.epoch_tokens)
        loader.check_documents(tokenizer)
        result.train_sha256 = loader.digest()
    averaged = model
    needs_training = steps == 0
    if needs_training:
        averaged, steps = warm_up_and_train(run, model, loader, result, validate)
    result.steps = steps
    with log.phase("calibrate", "training"):
        sums = calibrate(run, averaged, loader, steps * local_buffers * ranks.world_size)
    with log.phase("export"):
        if ranks.is_main and needs_training:
            save_checkpoint(averaged, cfg, steps, tokenizer.sha256, log.folder / "final_model.pt")
        measure_code(run, result)
        artifact = export(run, averaged, sums, result.code_bytes, log.folder / "final_model.int6.ptz",
                          tokenizer.sha256)
    with log.phase("hash training data"):
        if ranks.is_main:
            result.train_data_sha256 = hash_training_data(run, loader, manifest)
    return averaged, artifact

def hash_training_data(run: Run, loader: PackedLoader, manifest: Manifest) -> str:
    """One hash of all shards that were read; waits for theirs. One unlike the manifest's is a caveat."""
    lines = []
    for index in sorted(loader.hashes):
        path = loader.paths[index]
        digest = loader.hashes[index].result()
        lines.append(f"{digest}  {path.name}\n")
        if fault := manifest.fault(path, digest):
            run.log.caveat(fault)
    run.log(f"training shards read: {len(lines)} of {len(loader.paths)}")
    return sha256("".join(lines).encode())

def warm_up_and_train(run: Run, model: GPT, loader: PackedLoader, result: Result,
                      validate: Callable) -> tuple[GPT, int]:
    """Returns a model with the average of the weights, and the number of steps."""
    with run.log.phase("warm-up"):
        trainer = Trainer(run, model, loader)
        trainer.warm_up()
    shapes = " or ".join(f"{shape.tokens} tokens in at most {spans} spans of up to {shape.max_len}"
                         for shape, spans in loader.max_spans.items())
    run.log(f"buffers: {trainer.local_buffers} a step on a rank, of {shapes}; "
            f"first step after {time.perf_counter() - PROCESS_START:.1f} s")
    averaged = trainer.train(validate)
    tokens = trainer.tokens
    result.targets_left_out = tokens - run.ranks.all_reduce_(trainer.targets).item()
    run.log(f"train: steps:{trainer.steps} tokens:{tokens} epochs:{tokens / loader.epoch_tokens:.2f} "
            f"targets_left_out:{result.targets_left_out}")
    return averaged, trainer.steps

class Scored(NamedTuple):
    """The scores of the artifact."""
    final: Score
    quantized: Score  # the plain one
    nll: Tensor  # (targets,) of the final score
    unadapted: int  # targets for which the plain model stands in for the adapted one

def score(run: Run, model: GPT, val: Validation) -> Scored:
    """The plain score of the artifact's model, the adapted one, and their mixture, which is the headline."""
    cfg, ranks, log, backend = run
    plan = depth_plan(cfg, cfg.loops_at_end)
    # 1) The plain score.
    with log.phase("score quantized", "scoring"):
        plain = evaluate(run, model, val, plan)
        quantized = Score.of(plain, val)
        log(f"quantized {quantized}")
    # 2) The adapted score, and the mixture.
    nll = plain
    adapted = torch.full_like(plain, UNSCORED)
    if cfg.ttt_enabled:
        with log.phase("count n-grams", "scoring"):
            votes = count_votes(val, cfg.vocab_size, ranks.device)
        with log.phase("prepare adaptation"):
            adapters = Adapters(cfg, len(plan.visits), ranks.device, backend.fused)
            if backend.compilable:
                warm_up_adaptation(run, model, adapters, backend)
        with log.phase("adapt", "scoring"):
            budget = 0.99 * (cfg.eval_max_seconds or math.inf)
            deadline = time.perf_counter() + budget - log.spent("scoring")
            adapted = score_documents(run, model, val, adapters, backend, deadline)
            filled_up = torch.where(adapted == UNSCORED, plain, adapted)
            log(f"adapted {Score.of(filled_up, val)}")
            nll = final_losses(filled_up, plain, votes)
    with log.phase("report"):
        unadapted = int((adapted == UNSCORED).sum())
        if unadapted and cfg.ttt_enabled:
            log(f"EVAL_MAX_SECONDS={cfg.eval_max_seconds:g} passed: {unadapted} targets are not adapted, and "
                "the score depended on time")
        final = Score.of(nll, val)
        log(f"final {final}")
    return Scored(final, quantized, nll, unadapted)

def caveats(run: Run, result: Result) -> list[str]:
    """Why this result would not count as a record, by the challenge's limits."""
    cfg, ranks, log, _ = run
    training, scoring = log.spent("training"), log.spent("scoring")
    return log.caveats + [why for why, holds in (
        (f"preset {cfg.preset}", cfg.preset),
        (f"not trained by this run, which read {cfg.eval_only_path}", cfg.eval_only_path),
        (f"training took {training:.1f} s of {CLOCK_SECONDS}", training > CLOCK_SECONDS),
        (f"scoring took {scoring:.1f} s of {CLOCK_SECONDS}", scoring > CLOCK_SECONDS),
        (f"{result.total_bytes} bytes of {CAP_BYTES}", result.total_bytes > CAP_BYTES),
        (f"{result.unadapted_tokens} targets have their plain score", result.unadapted_tokens),
        (f"VAL_DOC_FRACTION={cfg.val_doc_fraction}: not all documents", cfg.val_doc_fraction < 1),
        ("unknown validation set", not result.is_fineweb()),
        (f"VAL_LOSS_EVERY={cfg.val_loss_every}: validation was read during training", cfg.val_loss_every),
        ("not on 8 GPUs", not ranks.on_gpu or ranks.world_size != 8)) if holds]

def close_run(run: Run, result: Result):
    """Write the table of phases, then the RESULT line: the last one, and the content of result.json."""
    cfg, ranks, log, _ = run
    # 1) Phases and clocks.
    result.phases = {}
    result.clocks = {}
    for phase in log.phases:
        log(f"phase {phase.name:20}{phase.seconds:9.1f} s  {phase.clock}".rstrip())
        seconds = result.phases.get(phase.name, 0.0) + phase.seconds  # of each validation in training, too
        result.phases[phase.name] = round(seconds, 3)
    for clock, budget in (("training", cfg.max_wallclock_seconds), ("scoring", cfg.eval_max_seconds)):
        seconds = log.spent(clock)
        log(f"clock {clock:20}{seconds:9.1f} s" + (f"  of {budget:g} s" if budget else ""))
        result.clocks[clock] = {"seconds": round(seconds, 3), "budget": budget}
    # 2) The result with its caveats.
    result.seconds = round(time.perf_counter() - PROCESS_START, 3)
    if ranks.on_gpu:
        result.peak_gpu_bytes = torch.cuda.max_memory_allocated()
    result.caveats = caveats(run, result)
    log("caveats: " + ("; ".join(result.caveats) or "none"))
    values = result.as_dict()
    log.metrics("result", **values)
    if ranks.is_main:
        write_file(log.folder / "result.json", (json.dumps(values, indent=1) + "\n").encode())
    log("RESULT " + json.dumps(values))

def run_phases(run: Run, saved: Saved | None):
    """The whole run. On rank 0 `saved` is what EVAL_ONLY_PATH holds."""
    cfg, ranks, log, _ = run
    plan = depth_plan(cfg, cfg.loops_at_end)
    # 1) Check all that would fail late; take the weights or the artifact of a saved model.
    with log.phase("setup"):
        result = open_run(run)
        model = GPT(cfg).to(ranks.device)
        parameters = sum(p.numel() for p in model.parameters())
        log(f"model_params:{parameters}")
        artifact, steps = ranks.broadcast_object(open_saved(run, model, saved) if saved else (b"", 0))
        result.mode = "checkpoint" if steps else "artifact" if artifact else "train"
        for p in model.parameters():
            # Rank 0 alone has read a checkpoint; and orthogonal initial values may differ between machines.
            ranks.broadcast_(p.data)
        files = find_data(cfg, need_train=not artifact)
        manifest = Manifest.read(files.manifest, log)
        tokenizer = open_tokenizer(run, files, manifest, saved, result)
        check_disk(run, parameters)
        if artifact:
            measure_code(run, result)

    @functools.cache
    def validation() -> Validation:
        manifest.check_val(files.val)
        return load_validation(files.val, tokenizer, cfg)

    def validate(candidate: GPT, plan: Plan) -> Score:
        return Score.of(evaluate(run, candidate, validation(), plan), validation())

    # 2) Train, calibrate, export, unless there is an artifact.
    averaged = model if steps else None
    if not artifact:
        averaged, artifact = produce(run, model, steps, files, tokenizer, manifest, result, validate)
    result.model_sha256 = sha256(artifact)
    result.model_bytes = len(artifact)
    result.total_bytes = result.code_bytes + result.model_bytes
    log(f"bytes: code:{result.code_bytes} model:{result.model_bytes} total:{result.total_bytes} "
        f"cap:{CAP_BYTES}")
    # 3) Open validation. Score what was exported before quantization, and then the artifact alone.
    with log.phase("open validation"):
        val = validation()
        log(f"validation: documents:{len(val.starts)} tokens:{len(val.token_bytes)} "
            f"bytes:{val.token_bytes.sum()} documents_a_byte_short:{val.begin_with_space} (a space first)")
    with log.phase("count bytes"):
        tokenizer.check_bytes(val.documents(ranks.rank, ranks.world_size), files.val[0])
    if averaged is not None:
        with log.phase("score unquantized"):
            unquantized = validate(averaged, plan)
            log(f"unquantized {unquantized}")
        result.val_loss_unquantized, result.val_bpb_unquantized = unquantized.loss, unquantized.bpb
    with log.phase("open artifact", "scoring"):
        _, tensors = unpack_artifact(artifact, Path("artifact"))
        quantized = restore(model, tensors).requires_grad_(False)
    scored = score(run, quantized, val)
    # 4) Report.
    result.add_scores(scored, val)
    close_run(run, result)
    if cfg.save_scores and ranks.is_main:  # last: a full disk then costs no result
        save_scores(Path(cfg.save_scores), scored.nll, val)

def save_scores(path: Path, nll: Tensor, val: Validation):
    """Write every loss, with what it takes to compute the score from them."""
    file = io.BytesIO()
    np.savez(file, nll=nll.numpy(), token_bytes=val.token_bytes.astype(np.uint16), document_starts=val.starts)
    write_file(path, file.getvalue())

def read_settings(env: Mapping[str, str], ranks: Ranks) -> tuple[Config, Saved | None]:
    """The settings of rank 0, for all ranks, and on rank 0 what EVAL_ONLY_PATH holds.

    One thread computes, unless OMP_NUM_THREADS says otherwise: more would wait for each other, in the small
    models of a CPU and in runs side by side. On a CPU there is no scoring deadline, unless the user sets one.
    """
    saved = None
    cfg = None
    if not env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    if ranks.is_main:
        path = env.get("EVAL_ONLY_PATH")
        saved = read_saved(Path(path)) if path else None
        if not ranks.on_gpu and not env.get("EVAL_MAX_SECONDS"):
            env = {**env, "EVAL_MAX_SECONDS": "0"}
        cfg = Config.from_env(env, saved.settings if saved else {})
    return ranks.broadcast_object(cfg), saved

def main(env: Mapping[str, str] = os.environ, arguments: Sequence[str] = ()) -> int:
    """Run; returns the exit status: 2 after a user's mistake, with one line that says what to change."""
    if arguments and arguments[0] in ("-h", "--help"):
        say(settings_help())
        return 0
    # 1) Run all phases.
    began = time.perf_counter()
    log = None
    try:
        if arguments:
            raise UserError(f"{arguments[0]!r}: settings are environment variables; --help lists them")
        ranks = Ranks.join()
        if ranks.on_gpu:  # torch.optim and FlashAttention-3 need it, and to import it takes seconds
            ThreadPoolExecutor(1).submit(lazy_import, "torch._dynamo")
        cfg, saved = read_settings(env, ranks)
        backend = Backend.for_machine(cfg, ranks.device)
        log = RunLog(cfg, ranks, began)
        run_phases(Run(cfg, ranks, log, backend), saved)
        return 0
    except UserError as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = (f"out of memory in phase {log.under_way() if log else None}: raise TRAIN_BUFFERS "
                   "(training), lower VAL_BATCH_TOKENS (plain scores) or TTT_BATCH_SIZE (adaptation)")
    # 2) Say what went wrong, and leave no empty folder.
    report_mistake(message)
    if log:
        log.withdraw()
    return 2

def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or a CPU, where PyTorch has no error of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)

def report_mistake(message: str):
    """Print it as one line, whatever a file or a variable has put into it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # let rank 0 report an error that all ranks have; torchrun then ends the others
    say("error: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), sys.stderr)

# ---- A Appendix: attention backends and Triton kernels -----------------------------------------------------
# Attention is causal within each span and never crosses one; scale 1/sqrt(E); (T, H, E) in and out.

def flash3_attention(q, k, v, spans: Spans):
    """FlashAttention-3 (https://arxiv.org/abs/2407.08608) on Hopper, package flash_attn_3; bf16 or fp16."""
    from flash_attn_interface import flash_attn_varlen_func
    bounds, longest = spans.cu_seqlens, spans.max_seqlen
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest,
                                  max_seqlen_k=longest, causal=True)

def varlen_attention(causal: dict, q, k, v, spans: Spans):
    """PyTorch's own varlen attention, on NVIDIA GPUs from Ampere on; bf16 or fp16.

    `causal` is the argument that makes it causal, whose name depends on the version of PyTorch.
    """
    from torch.nn.attention.varlen import varlen_attn
    bounds, longest = spans.cu_seqlens, spans.max_seqlen
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **causal)

ATTENTION = {"flash3": flash3_attention, "varlen": varlen_attention, "sdpa": sdpa_attention}

def choose_attention(name: str, device: torch.device) -> Callable:
    """What ATTENTION names; for "auto" the fastest that this machine has. UserError if it cannot run here."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if name == "auto":
        has_flash = capability[0] == 9 and importlib.util.find_spec("flash_attn_interface")
        name = "flash3" if has_flash else "varlen" if capability[0] >= 8 else "sdpa"
    if name == "flash3":
        lazy_import("flash_attn_interface", "install flash-attn-3 as README says, or set ATTENTION=varlen")
    if (name == "flash3" and capability[0] != 9) or (name == "varlen" and capability[0] < 8):
        need = "a Hopper" if name == "flash3" else "an Ampere or newer"
        raise UserError(f"ATTENTION={name} needs {need} GPU, here is {device_name(device)}: use sdpa")
    if name == "varlen":  # looked up here, as torch.compile cannot trace inspect.signature
        known = inspect.signature(lazy_import("torch.nn.attention.varlen").varlen_attn).parameters
        causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        return functools.update_wrapper(functools.partial(varlen_attention, causal), varlen_attention)
    return ATTENTION[name]

# What follows are the kernels: the MLP sublayer, the split into heads, the exclusion of a token's own value,
# the entry of a layer, the lanes, the loss, and the adapters' optimizer. PyTorch alone would carry their
# tensors through memory too often, and torch.compile takes longer to start. Each comes in this order:
# mathematics; kernels, forward and backward in one; functions that launch them; autograd. Values are fp32 in
# registers, and in memory bf16, if nothing else is said. The gradient of x is dx. An argument may be an
# output forward and an input backward, or hold a value one way and a gradient the other; the first comment in
# a kernel says what its arguments hold.

def contiguous(*tensors):
    """The same tensors, or None, each contiguous, as kernels read them."""
    return tuple(x if x is None else x.contiguous() for x in tensors)

def import_triton() -> tuple[Any, Any]:
    """Triton and its language, at their first use."""
    return lazy_import("triton"), lazy_import("triton.language")

class KernelCompiler:
    """In its block a launched kernel is not run, but compiled by a thread, each form of it once.

    What the kernels should have written is undefined. The block ends when all are compiled.
    """
    active: "KernelCompiler | None" = None  # of all threads, as autograd launches kernels in its own

    def __init__(self, device: torch.device):
        self.pool = ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(device,))
        self.forms: dict[tuple, Any] = {}  # futures

    def __enter__(self):
        KernelCompiler.active = self

    def __exit__(self, error, *rest):
        KernelCompiler.active = None
        self.pool.shutdown(cancel_futures=error is not None)
        for future in () if error else self.forms.values():
            future.result()  # raises what compilation has raised

    def submit(self, kernel, grid: tuple[int, ...], *args, **constants):
        form = (id(kernel), *(getattr(x, "dtype", type(x)) for x in args), *constants.values())
        if form not in self.forms:
            self.forms[form] = self.pool.submit(kernel.warmup, *args, grid=grid, **constants)

def compile_kernels(backend: Backend, ranks: Ranks, call: Callable):
    """If there are kernels, make a call in which these are compiled in threads and compute nothing."""
    if backend.fused and ranks.on_gpu:
        with KernelCompiler(ranks.device):
            call()

def launcher(kernel, *grid: int) -> Callable:
    """What launches a kernel on a grid or, in the block of a KernelCompiler, has it compiled."""
    compiler = KernelCompiler.active
    return functools.partial(compiler.submit, kernel, grid) if compiler else kernel[grid]

def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()

def multiprocessors(x) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2

# MLP sublayer     y = x + a, n = norm(y) depth, out = y + f(n up.T) down.T      f(p) = leaky_relu(p, .5)^2
# The join kernel computes y and n; the epilogue of the product p = n up.T applies f. Backward, the product's
# epilogue multiplies by the slope f'(p), and the join kernel takes the gradient through the norm.
#
# With leaky = leaky_relu(p, .5), f(p) is leaky^2, and its slope 2 leaky where p > 0, and leaky elsewhere: the
# larger of the two, whichever the sign. So the forward pass keeps leaky, and act for the gradient of down.
#
# In training all products of the MLP take FP8 factors, whose names contain an 8. They are e4m3: 3 mantissa
# bits, from 2^-9 to 448, at which conversion saturates. n, leaky and act fit as they are, weights and
# gradients once they are multiplied by constants. Hopper needs both factors of an FP8 product contiguous
# along the dimension that is summed over. For dup and ddown that is the tokens, so what these are computed
# from is also written transposed, (features, tokens): n8_t, act8_t, dout8_t, dp8_t.

E4M3 = torch.float8_e4m3fn
FP8_WEIGHT_SCALE = 64.0
FP8_GRAD_SCALE = 32.0  # and times about the tokens of a step, by which the loss is divided

@functools.cache
def join_kernel():
    """A program takes BLOCK tokens; WIDTH is D or the next power of two."""
    triton, tl = import_triton()

    @triton.jit
    def join_program(x_or_dn, a_or_dy, depth, n, r, y_or_dx, T, D, EPS: tl.constexpr, ADD: tl.constexpr,
                     BLOCK: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr):
        # Forward: y = x + a, written if there is an a; r = 1 / rms(y); n = y r depth.
        # Backward: dx = r depth (dn - h mean(dn h)) + dy, where h = y r = n / depth; no dy if there was no a.
        d = tl.arange(0, WIDTH)[None, :]
        t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = t[:, None] * D + d
        inside = (t[:, None] < T) & (d < D)
        scale = tl.load(depth).to(tl.float32)
        value = tl.load(x_or_dn + at, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            h = tl.load(n + at, mask=inside, other=0.0).to(tl.float32) / scale
            value -= h * (tl.sum(value * h, 1) / D)[:, None]
            value *= (tl.load(r + t, mask=t < T) * scale)[:, None]
        if ADD:
            value += tl.load(a_or_dy + at, mask=inside, other=0.0).to(tl.float32)
        if ADD or BACKWARD:
            tl.store(y_or_dx + at, value.to(y_or_dx.dtype.element_ty), mask=inside)
        if not BACKWARD:
            factor = tl.rsqrt(tl.sum(value * value, 1) / D + EPS)
            normed = value * (factor * scale)[:, None]
            tl.store(r + t, factor, mask=t < T)
            tl.store(n + at, normed.to(n.dtype.element_ty), mask=inside)

    return join_program

def launch_join(x_or_dn, a_or_dy, depth, n, r, y_or_dx, backward: bool):
    """Run the kernel on tensors (T, D), one way or the other."""
    T, D = n.shape
    block = 4
    programs = ceil_div(T, block)
    launch = launcher(join_kernel(), programs)
    launch(x_or_dn, a_or_dy, depth, n, r, y_or_dx, T, D, EPS=NORM_EPS, ADD=a_or_dy is not None, BLOCK=block,
           WIDTH=power_of_2(D), BACKWARD=backward)

@functools.cache
def fp8_kernel():
    """A program takes a tile of BLOCK tokens by BLOCK features."""
    triton, tl = import_triton()

    @triton.jit
    def fp8_program(x, y, y_t, scale, T, D, BLOCK: tl.constexpr):
        # y (T, D) becomes x scale, and y_t (D, T) its transpose, which Triton 3.6 gets wrong if x is fp32.
        index = tl.arange(0, BLOCK)
        t = tl.program_id(0) * BLOCK + index[:, None]
        d = tl.program_id(1) * BLOCK + index[None, :]
        inside = (t < T) & (d < D)
        at = t * D + d
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
        value8 = value.to(y.dtype.element_ty)
        tl.store(y + at, value8, mask=inside)
        tl.store(y_t + d * T + t, value8, mask=inside)

    return fp8_program

def to_fp8(x, scale: float = 1.0):
    """x (T, D) in bf16, times scale, in FP8, and the same transposed."""
    T, D = x.shape
    y = torch.empty_like(x, dtype=E4M3)
    y_t = y.new_empty(D, T)
    block = 128
    launch = launcher(fp8_kernel(), ceil_div(T, block), ceil_div(D, block))
    launch(x, y, y_t, scale, T, D, BLOCK=block, num_warps=4)
    return y, y_t

def fp8_product(a, b, scale: float, dtype: torch.dtype):
    """a b.T times scale, (M, N), of a (M, K) and b (N, K) in FP8."""
    root = torch.full((), scale**0.5, device=a.device)  # _scaled_mm takes a scale for each factor
    return torch._scaled_mm(a, b.T, root, root, out_dtype=dtype)

@functools.cache
def mlp_kernel():
    """A persistent matrix product, each program of which computes tile after tile.

    M, N and K are those of a product, (M, K) by (N, K) transposed, not the letters of the model.
    """
    triton, tl = import_triton()

    @triton.jit
    def mlp_program(a_desc, b_desc, out_desc, leaky_or_y_desc, out_t_desc, M, N, scale, K: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                    GROUP_M: tl.constexpr, PROGRAMS: tl.constexpr, EPILOGUE: tl.constexpr,
                    STORE_T: tl.constexpr):
        # Here a (M, K) and b (N, K) are the factors of a product, and value is a b.T scale in fp32. By
        # EPILOGUE, with leaky or y at leaky_or_y (M, N), out (M, N) becomes
        #   "act"    leaky^2; leaky is written
        #   "slope"  value times the slope
        #   "add"    value + y
        #   "none"   value
        # With STORE_T, out_t (N, M) becomes out, transposed.
        tiles_m = tl.cdiv(M, BLOCK_M)
        tiles_n = tl.cdiv(N, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
            # GROUP_M rows of tiles run together, so that b stays in the L2 cache.
            group = tile // (GROUP_M * tiles_n)
            rows = min(tiles_m - group * GROUP_M, GROUP_M)
            within = tile % (GROUP_M * tiles_n)
            m = (group * GROUP_M + within % rows) * BLOCK_M
            n = (within // rows) * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                acc = tl.dot(a_desc.load([m, k]), b_desc.load([n, k]).T, acc)
            # Half a tile at a time leaves shared memory for one more stage of a and b.
            halves = tl.permute(tl.reshape(acc * scale, (BLOCK_M, 2, HALF)), (0, 2, 1))
            left, right = tl.split(halves)
            for half in tl.static_range(2):
                value = left if half == 0 else right
                at = n + half * HALF
                if EPILOGUE == "act":
                    leaky = tl.maximum(value, 0.5 * value)
                    leaky_or_y_desc.store([m, at], leaky.to(leaky_or_y_desc.dtype))
                    value = leaky * leaky
                if EPILOGUE == "slope":
                    leaky = leaky_or_y_desc.load([m, at]).to(tl.float32)
                    value *= tl.maximum(2 * leaky, leaky)
                if EPILOGUE == "add":
                    value += leaky_or_y_desc.load([m, at]).to(tl.float32)
                out_desc.store([m, at], value.to(out_desc.dtype))
                if STORE_T:
                    out_t_desc.store([at, m], value.to(out_t_desc.dtype).T)

    return mlp_program

def launch_mlp(epilogue: str, a, b, out, leaky_or_y=None, out_t=None, scale: float = 1.0):
    """Run the product with one of the kernel's epilogues: a (M, K), b (N, K) -> out (M, N), out_t (N, M).

    leaky_or_y (M, N) is written by "act", and read by "slope" and "add".
    """
    descriptor = lazy_import("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor
    M, K = a.shape
    N = len(b)
    block_m, block_n, block_k = (128, 256, 128 // a.element_size()) if a.is_cuda else (32, 32, 32)
    half = block_n // 2
    programs = multiprocessors(a)
    rows = ceil_div(M, block_m)
    tiles = rows * ceil_div(N, block_n)
    a_desc = descriptor(a, [block_m, block_k])
    b_desc = descriptor(b, [block_n, block_k])
    out_desc = descriptor(out, [block_m, half])
    # Where there is none, out is a placeholder.
    leaky_or_y_desc = out_desc if leaky_or_y is None else descriptor(leaky_or_y, [block_m, half])
    out_t_desc = out_desc if out_t is None else descriptor(out_t, [half, block_m])
    launch = launcher(mlp_kernel(), min(programs, tiles))
    launch(a_desc, b_desc, out_desc, leaky_or_y_desc, out_t_desc, M, N, scale, K=K, BLOCK_M=block_m,
           BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=16, PROGRAMS=programs, EPILOGUE=epilogue,
           STORE_T=out_t is not None, num_stages=3, num_warps=8)

class FusedMLP(torch.autograd.Function):
    """The MLP of mlp_sublayer by these kernels: (x, a, up, down, depth) -> (out, n, x), (T, D) all.

    Without a, out is what to add to x; with it, the third is None. With fp8, that of Layer, products take
    FP8, and grad_scale brings dout into its range; without, frozen weights cost no gradient.
    """

    @staticmethod
    def forward(ctx, x, a, up, down, depth, fp8: tuple = (), grad_scale: float = 1.0):
        # 1) The sum, and its norm.
        x, a, up, down, depth = contiguous(x, a, up, down, depth)
        n = torch.empty_like(x)
        r = x.new_empty(len(x), dtype=torch.float32)  # the norm's factor
        y = n if a is None else torch.empty_like(x)  # without an a, a placeholder
        launch_join(x, a, depth, n, r, y, backward=False)
        # 2) The products.
        if fp8:
            up8, _, down8, _ = fp8
            n8, n8_t = to_fp8(n)
            act8 = x.new_empty(len(x), len(up), dtype=E4M3)
            act8_t, leaky8_t = act8.new_empty(2, len(up), len(x))
            out = torch.empty_like(x)
            launch_mlp("act", up8, n8, act8_t, leaky8_t, out_t=act8, scale=1 / FP8_WEIGHT_SCALE)
            launch_mlp("none" if a is None else "add", act8, down8, out, y, scale=1 / FP8_WEIGHT_SCALE)
            kept = leaky8_t, act8_t, n8_t
        else:
            act = x.new_empty(len(x), len(up))
            leaky = torch.empty_like(act)  # without gradients it is dropped
            launch_mlp("act", n, up, act, leaky)
            out = F.linear(act, down) if a is None else y.addmm_(act, down.T)
            kept = leaky, (act if ctx.needs_input_grad[3] else None)
        ctx.set_materialize_grads(False)
        ctx.adds = a is not None
        ctx.fp8 = fp8
        ctx.grad_scale = grad_scale
        ctx.save_for_backward(up, down, depth, n, r, *kept)
        return out, n, x.view_as(x) if a is None else None

    @staticmethod
    def backward(ctx, dout, dn, dx_later):  # dn is None unless a hook has used n; out is always used
        # 1) The products.
        up, down, depth, n, r, *kept = ctx.saved_tensors
        dout = dout.contiguous()
        if ctx.fp8:
            leaky8_t, act8_t, n8_t = kept
            _, up8_t, _, down8_t = ctx.fp8
            dout8, dout8_t = to_fp8(dout, ctx.grad_scale)
            dp8_t = torch.empty_like(leaky8_t)
            dp8 = dp8_t.new_empty(len(n), len(up))
            dn_product = torch.empty_like(n)
            launch_mlp("slope", down8_t, dout8, dp8_t, leaky8_t, out_t=dp8, scale=1 / FP8_WEIGHT_SCALE)
            launch_mlp("none", dp8, up8_t, dn_product, scale=1 / (FP8_WEIGHT_SCALE * ctx.grad_scale))
            dup = fp8_product(dp8_t, n8_t, 1 / ctx.grad_scale, n.dtype)
            ddown = fp8_product(dout8_t, act8_t, 1 / ctx.grad_scale, n.dtype)
        else:
            leaky, act = kept
            dp = torch.empty_like(leaky)
            launch_mlp("slope", dout, down.T.contiguous(), dp, leaky)
            dn_product = dp @ up
            dup = dp.T @ n if ctx.needs_input_grad[2] else None
            ddown = dout.T @ act if ctx.needs_input_grad[3] else None
        # 2) The norm.
        dn = dn_product if dn is None else dn_product + dn
        dx = torch.empty_like(n)
        dy, = contiguous(dout if ctx.adds else dx_later)
        launch_join(dn, dy, depth, n, r, dx, backward=True)
        da = dx if ctx.adds else None
        return dx, da, dup, ddown, None, None, None

# Norm     n = norm(x + a), by the join kernel

class FusedNorm(torch.autograd.Function):
    """norm_of_sum: (x, a) -> n, (T, D) all; x may be fp32."""

    @staticmethod
    def forward(ctx, x, a, dtype):
        x, a = contiguous(x, a)
        n = torch.empty_like(x, dtype=dtype)
        r = x.new_empty(len(x), dtype=torch.float32)
        depth = r.new_ones(())
        y = n if a is None else torch.empty_like(x)  # a placeholder, or a sum that nobody reads
        launch_join(x, a, depth, n, r, y, backward=False)
        ctx.adds = a is not None
        ctx.dtype = x.dtype
        ctx.save_for_backward(depth, n, r)
        return n

    @staticmethod
    def backward(ctx, dn):
        depth, n, r = ctx.saved_tensors
        dx = torch.empty_like(n, dtype=ctx.dtype)
        launch_join(dn.contiguous(), None, depth, n, r, dx, backward=True)
        return dx, dx if ctx.adds else None, None

# Heads     split_heads in one pass: split into heads; norm and rotate q and k; multiply q by its gain

HEADS_BLOCK = 16

@functools.cache
def heads_kernel():
    """A program takes one of the H + 2K heads of BLOCK tokens. G query heads share a key/value head."""
    triton, tl = import_triton()

    @triton.jit
    def heads_program(qkv, gain, cos, sin, positions, q, k, v, own, dqkv, dgain, T, K, G: tl.constexpr,
                      E: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
                      BACKWARD: tl.constexpr):
        # Forward: write the heads. Backward: read their gradients there; write dqkv and, by program, dgain.
        h = tl.program_id(0)
        H = K * G
        d = tl.arange(0, E)[None, :]
        t = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
        in_t = t < T
        is_value = h >= H + K
        # 1) Pointers: to the head in q, or to its first copy of G in k or v; and, for a head of v, to where
        #    it is kept without copies.
        if h < H:
            copies = q + (t * H + h) * E
        elif h < H + K:
            copies = k + (t * H + (h - H) * G) * E
        else:
            copies = v + (t * H + (h - H - K) * G) * E
        own_value = own + (t * K + h - H - K) * E + d
        row = (t * (H + 2 * K) + h) * E
        # 2) The angle by which each dimension turns with its partner.
        normed = h < H + K
        partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
        turns = in_t & (d < R) & normed
        angle_index = tl.load(positions + t, mask=in_t, other=0) * (R // 2) + tl.minimum(d, partner)
        direction = tl.where(d < R // 2, 1.0, -1.0)
        c = tl.load(cos + angle_index, mask=turns, other=1.0)
        s = tl.load(sin + angle_index, mask=turns, other=0.0) * direction
        # 3) The norm's factor.
        x = tl.load(qkv + row + d, mask=in_t, other=0.0).to(tl.float32)
        mean_square = tl.sum(x * x, 1) / E
        r = tl.where(normed, tl.rsqrt(mean_square + EPS), 1.0)[:, None]
        scale = r * tl.load(gain + h, mask=h < H, other=1.0).to(tl.float32)
        if BACKWARD:
            # 4) Add up the gradients of all copies; of a query head there is one.
            dy = tl.load(own_value, mask=in_t & is_value, other=0.0).to(tl.float32)
            across = tl.zeros_like(dy)
            for g in tl.static_range(G):
                exists = (h >= H) | (g == 0)
                dy += tl.load(copies + g * E + d, mask=in_t & exists, other=0.0).to(tl.float32)
                across += tl.load(copies + g * E + partner, mask=turns & exists, other=0.0).to(tl.float32)
            # y = gain * rotation(n) and n = x r. Let dn be dy rotated back, still without the gain, which
            # `scale` = r gain applies. n.dn serves twice: in the norm's gradient and, since a rotation keeps
            # products, as dgain = dy.rotation(n) = n.dn.
            n = x * r
            dn = dy * c - across * s
            along = tl.where(normed, tl.sum(n * dn, 1), 0.0)[:, None]
            dx = scale * (dn - n * (along / E))
            tl.store(dgain + tl.program_id(1) * H + h, tl.sum(along), mask=h < H)
            tl.store(dqkv + row + d, dx.to(dqkv.dtype.element_ty), mask=in_t)
        else:
            # 4) Norm, rotate, scale, and write all copies.
            across = tl.load(qkv + row + partner, mask=turns, other=0.0).to(tl.float32)
            y = ((x * c + across * s) * scale).to(qkv.dtype.element_ty)
            tl.store(own_value, y, mask=in_t & is_value)
            for g in tl.static_range(G):
                tl.store(copies + g * E + d, y, mask=in_t & ((h >= H) | (g == 0)))

    return heads_program

def launch_heads(heads: Sequence, inputs: tuple, *grads):
    """heads are q, k, v and own values. Forward, write them. With grads, dqkv and dgain, go backward: heads
    hold their gradients, and grads are written.
    """
    T, H, E = heads[0].shape
    K = heads[3].size(1)
    R = 2 * inputs[2].size(-1)
    backward = bool(grads)
    grads = grads or (None, None)
    launch = launcher(heads_kernel(), H + 2 * K, ceil_div(T, HEADS_BLOCK))
    launch(*inputs, *heads, *grads, T, K, G=H // K, E=E, R=R, EPS=NORM_EPS, BLOCK=HEADS_BLOCK,
           BACKWARD=backward, num_warps=2)

class FusedHeads(torch.autograd.Function):
    """split_heads in one pass."""

    @staticmethod
    def forward(ctx, qkv, gain, cos, sin, positions, K):
        inputs = contiguous(qkv, gain, cos, sin, positions)
        ctx.save_for_backward(*inputs)
        H = len(gain)
        E = qkv.size(1) // (H + 2 * K)
        heads = tuple(qkv.new_empty(len(qkv), n, E) for n in (H, H, H, K))
        launch_heads(heads, inputs)
        return heads

    @staticmethod
    def backward(ctx, *dheads):
        inputs = ctx.saved_tensors
        qkv, gain, *_ = inputs
        dqkv = torch.empty_like(qkv)
        programs = ceil_div(len(qkv), HEADS_BLOCK)
        dgain = gain.new_empty(programs, len(gain), dtype=torch.float32)
        launch_heads(contiguous(*dheads), inputs, dqkv, dgain)
        dgain = dgain.sum(0)
        return dqkv, dgain.to(gain.dtype), None, None, None, None

# Exclusive self-attention     exclude_self in one pass: z = y - (y.u) u, where u = v / |v|

@functools.cache
def exclude_kernel():
    """A program takes one key/value head of BLOCK tokens and its G query heads."""
    triton, tl = import_triton()

    @triton.jit
    def exclude_program(y, v, out, dz, dv, T, K, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
                        BACKWARD: tl.constexpr):
        # Forward: write z to out. Backward: write dy to out, and dv. With a for a head's y:
        #     z = a - (a.u) u;   da = dz - (dz.u) u;   du = - sum over heads of ((dz.u) a + (a.u) dz)
        # So dy is the same projection of dz that z is of y.
        d = tl.arange(0, E)[None, :]
        t = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
        in_t = t < T
        kv_head = t * K + tl.program_id(0)
        u = tl.load(v + kv_head * E + d, mask=in_t, other=0.0).to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(u * u, 1)[:, None]), 1e-12)
        u /= length
        du = tl.zeros_like(u)
        for g in tl.static_range(G):
            at = (kv_head * G + g) * E + d
            a = tl.load(y + at, mask=in_t, other=0.0).to(tl.float32)
            along = tl.sum(a * u, 1)[:, None]
            if BACKWARD:
                g_z = tl.load(dz + at, mask=in_t, other=0.0).to(tl.float32)
                g_along = tl.sum(g_z * u, 1)[:, None]
                du -= g_along * a + along * g_z
                a = g_z  # to be projected in place of y
                along = g_along
            projected = a - along * u
            tl.store(out + at, projected.to(out.dtype.element_ty), mask=in_t)
        if BACKWARD:
            du -= tl.sum(du * u, 1)[:, None] * u
            tl.store(dv + kv_head * E + d, (du / length).to(dv.dtype.element_ty), mask=in_t)

    return exclude_program

def launch_exclude(y, v, out, *grads):
    """Forward, write z to `out`. With grads, dz and dv, go backward: write dy to `out`, and dv."""
    T, H, E = y.shape
    K = v.size(1)
    block = 16
    backward = bool(grads)
    grads = grads or (None, None)
    launch = launcher(exclude_kernel(), K, ceil_div(T, block))
    launch(y, v, out, *grads, T, K, G=H // K, E=E, BLOCK=block, BACKWARD=backward)

class FusedExclude(torch.autograd.Function):
    """exclude_self in one pass."""

    @staticmethod
    def forward(ctx, *inputs):
        y, v = contiguous(*inputs)
        ctx.save_for_backward(y, v)
        z = torch.empty_like(y)
        launch_exclude(y, v, z)
        return z

    @staticmethod
    def backward(ctx, dz):
        y, v = ctx.saved_tensors
        dy = torch.empty_like(y)
        dv = torch.empty_like(v)
        launch_exclude(y, v, dy, dz.contiguous(), dv)
        return dy, dv

# Entry of a layer     mix_and_norm in one pass: merge of a skip, mix with the embedding, norm

ENTRY_BLOCK = 4

@functools.cache
def entry_kernel():
    """A program takes BLOCK tokens at a time; WIDTH is D or the next power of two."""
    triton, tl = import_triton()

    @triton.jit
    def entry_program(x, x0, mix, depth, skip, scale, gate, out, normed, dx_later, dx0_later, dx, dx0, dskip,
                      sums, T, D, EPS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
                      WIDTH: tl.constexpr, BACKWARD: tl.constexpr):
        # Forward: write out and normed. Backward: out and normed hold their gradients; write dx, dx0, dskip
        # and, by program, the gradients of mix, scale and the gate's sigmoid, summed over tokens. dx and dx0
        # include dx_later and dx0_later, where there are such.
        # In registers: a = x, a0 = x0, s = scale, k = skip, u = merged stream, y = mixed stream.
        d = tl.arange(0, WIDTH)
        in_d = d < D
        m = tl.load(mix + d, mask=in_d, other=0.0).to(tl.float32)
        m0 = tl.load(mix + D + d, mask=in_d, other=0.0).to(tl.float32)
        if skip is not None:
            s = tl.load(scale + d, mask=in_d, other=0.0).to(tl.float32)
            open_gate = tl.sigmoid(tl.load(gate + d, mask=in_d, other=0.0).to(tl.float32))
        dm = tl.zeros((WIDTH,), tl.float32)
        dm0 = dm
        ds = dm
        dopen = dm
        for block in range(tl.program_id(0), tl.cdiv(T, BLOCK), tl.num_programs(0)):
            # 1) The forward pass, which the backward pass repeats.
            t = (block * BLOCK + tl.arange(0, BLOCK))[:, None]
            at = t * D + d
            inside = (t < T) & in_d
            a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            a0 = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
            u = a
            if skip is not None:
                k = tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
                u = k * s + (a - k * s) * open_gate
            y = u * m + a0 * m0
            r = tl.rsqrt(tl.sum(y * y, 1)[:, None] / D + EPS)
            scaled = r * tl.load(depth).to(tl.float32)
            if BACKWARD:
                # 2) Back through the norm: g is the gradient of the mix.
                dn = tl.load(normed + at, mask=inside, other=0.0).to(tl.float32)
                dout = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
                g = scaled * (dn - y * (tl.sum(dn * y, 1)[:, None] * r * r / D))
                if not LANES:
                    g += dout
                # 3) Back through the mix.
                dm += tl.sum(g * u, 0)
                dm0 += tl.sum(g * a0, 0)
                if dx0 is not None:
                    g0 = g * m0
                    if dx0_later is not None:
                        g0 += tl.load(dx0_later + at, mask=inside, other=0.0).to(tl.float32)
                    tl.store(dx0 + at, g0.to(x.dtype.element_ty), mask=inside)
                g = g * m + dout if LANES else g * m
                # 4) Back through the merge.
                if skip is not None:
                    tl.store(dskip + at, (g * (1 - open_gate) * s).to(x.dtype.element_ty), mask=inside)
                    ds += tl.sum(g * (1 - open_gate) * k, 0)
                    dopen += tl.sum(g * (a - k * s), 0)
                    g *= open_gate
                if dx_later is not None:
                    g += tl.load(dx_later + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(dx + at, g.to(x.dtype.element_ty), mask=inside)
            else:
                tl.store(out + at, (u if LANES else y).to(x.dtype.element_ty), mask=inside)
                tl.store(normed + at, (y * scaled).to(x.dtype.element_ty), mask=inside)
        if BACKWARD:
            own_sums = sums + tl.program_id(0) * 4 * D + d
            tl.store(own_sums, dm, mask=in_d)
            tl.store(own_sums + D, dm0, mask=in_d)
            tl.store(own_sums + 2 * D, ds, mask=in_d)
            tl.store(own_sums + 3 * D, dopen, mask=in_d)

    return entry_program

def launch_entry(inputs: Sequence, lanes: bool, out, normed, programs: int, *grads):
    """Forward, write out and normed. With grads, dx_later, dx0_later, dx, dx0, dskip and sums, go backward:
    out and normed hold their gradients, the first two are read, and the others are written.
    """
    T, D = out.shape
    backward = bool(grads)
    grads = grads or [None] * 6
    block = 1 if backward else ENTRY_BLOCK
    warps = 1 if backward else 4
    launch = launcher(entry_kernel(), programs)
    launch(*inputs, out, normed, *grads, T, D, EPS=NORM_EPS, LANES=lanes, BLOCK=block, WIDTH=power_of_2(D),
           BACKWARD=backward, num_warps=warps)

class FusedEntry(torch.autograd.Function):
    """mix_and_norm in one pass."""

    @staticmethod
    def forward(ctx, x, x0, mix, depth, lanes, *skip):
        inputs = contiguous(x, x0, mix, depth, *skip)
        ctx.lanes = lanes
        ctx.save_for_backward(*inputs)
        out = torch.empty_like(inputs[0])
        normed = torch.empty_like(out)
        launch_entry(inputs, lanes, out, normed, ceil_div(len(x), ENTRY_BLOCK))
        ctx.set_materialize_grads(False)
        return out, normed, x0.view_as(x0), x.view_as(x)

    @staticmethod
    def backward(ctx, dout, dnormed, dx0_later, dx_later):
        # Of x0 and x there are gradients only if later visits have read them.
        inputs = ctx.saved_tensors
        x, _, mix, _, skip, _, gate = inputs
        dout, dnormed, dx_later, dx0_later = contiguous(dout, dnormed, dx_later, dx0_later)
        per_multiprocessor = 12 if skip is None else 8  # the fastest that were tried on an H200
        programs = min(len(x), per_multiprocessor * multiprocessors(x))
        dx = torch.empty_like(x)
        dx0 = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        dskip = None if skip is None else torch.empty_like(x)
        sums = x.new_empty(programs, 4, x.size(1), dtype=torch.float32)
        launch_entry(inputs, ctx.lanes, dout, dnormed, programs, dx_later, dx0_later, dx, dx0, dskip, sums)
        sums = sums.new_ones(1, programs) @ sums.flatten(1)  # sum(0) as a product, which is faster
        dmix, dscale, dopen = sums.view(4, -1).to(mix.dtype).split((2, 1, 1))
        if skip is None:
            return dx, dx0, dmix, None, None, None, None, None
        dgate = torch.ops.aten.sigmoid_backward(dopen[0], gate.sigmoid())
        return dx, dx0, dmix, None, None, dskip, dscale[0], dgate

# Lanes     mix_lanes in one pass: both lanes are sums of four tensors, with a matrix of weights

@functools.cache
def lanes_kernel():
    """A program takes BLOCK numbers of each tensor."""
    triton, tl = import_triton()

    @triton.jit
    def lanes_program(x, lane, a, m, weights, out_x, out_lane, dx, dlane, da, dm, sums, N,
                      BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
        # Forward: from both lanes and the outputs a of attention and m of the MLP, write out_x and out_lane.
        # Backward: these hold their gradients; write dx, dlane, da, dm and, by program, that of the weights.
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < N
        if BACKWARD:
            to_x = tl.load(out_x + at, mask=inside, other=0.0).to(tl.float32)
            to_lane = tl.load(out_lane + at, mask=inside, other=0.0).to(tl.float32)
        else:
            to_x = tl.zeros((BLOCK,), tl.float32)
            to_lane = to_x
        for i in tl.static_range(4):
            source = tl.load((x, lane, a, m)[i] + at, mask=inside, other=0.0).to(tl.float32)
            w_x = tl.load(weights + i).to(tl.float32)
            w_lane = tl.load(weights + 4 + i).to(tl.float32)
            if BACKWARD:
                grad = w_x * to_x + w_lane * to_lane
                tl.store((dx, dlane, da, dm)[i] + at, grad.to(x.dtype.element_ty), mask=inside)
                own_sums = sums + tl.program_id(0) * 8 + i
                tl.store(own_sums, tl.sum(source * to_x, 0))
                tl.store(own_sums + 4, tl.sum(source * to_lane, 0))
            else:
                to_x += w_x * source
                to_lane += w_lane * source
        if not BACKWARD:
            tl.store(out_x + at, to_x.to(x.dtype.element_ty), mask=inside)
            tl.store(out_lane + at, to_lane.to(x.dtype.element_ty), mask=inside)

    return lanes_program

def launch_lanes(inputs: Sequence, out_x, out_lane, *grads):
    """Forward, write out_x and out_lane. With grads, dx, dlane, da and dm, go backward: write these, and
    return the gradient of the weights (2, 4).
    """
    N = out_x.numel()
    block = 2048
    programs = ceil_div(N, block)
    sums = out_x.new_empty(programs, 2, 4, dtype=torch.float32) if grads else None
    launch = launcher(lanes_kernel(), programs)
    launch(*inputs, out_x, out_lane, *(grads or [None] * 4), sums, N, BLOCK=block, BACKWARD=bool(grads))
    return sums.sum(0) if grads else None

class FusedLanes(torch.autograd.Function):
    """The two lanes (T, D) from four tensors (T, D) and their weights (2, 4)."""

    @staticmethod
    def forward(ctx, *inputs):
        inputs = contiguous(*inputs)
        ctx.save_for_backward(*inputs)
        lanes = tuple(map(torch.empty_like, inputs[:2]))
        launch_lanes(inputs, *lanes)
        return lanes

    @staticmethod
    def backward(ctx, *dlanes):
        inputs = ctx.saved_tensors
        grads = tuple(map(torch.empty_like, inputs[:4]))
        dweights = launch_lanes(inputs, *contiguous(*dlanes), *grads)
        return *grads, dweights.to(inputs[4].dtype)

def fused_mix_lanes(x, mlp_lane, attn_out, mlp_out, keep, post):
    """mix_lanes in one pass."""
    weights = torch.cat((keep.diag(), post.T), dim=1)  # rows: out_x and out_lane; columns: what they are of
    return FusedLanes.apply(x, mlp_lane, attn_out, mlp_out, weights)

# Loss     softcapped_nll of logits = x embed.T, with its gradient
# The kernel overwrites a row of logits with the gradient of its loss with respect to them. The backward pass
# gets one factor a row, dnll, and multiplies x and dx by it rather than the gradients of the logits, which
# are V / D = 16 times larger.

@functools.cache
def loss_kernel():
    """A program takes a row; WIDTH is V or the next power of two."""
    triton, tl = import_triton()

    @triton.jit
    def loss_program(logits, targets, nll, V, SOFTCAP: tl.constexpr, WIDTH: tl.constexpr):
        token = tl.program_id(0)
        v = tl.arange(0, WIDTH)
        target = tl.load(targets + token)
        row = logits + token.to(tl.int64) * V + v
        logit = tl.load(row, mask=v < V, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(logit * (-2 / SOFTCAP)))  # tanh(x) = 2 sigmoid(2x) - 1
        z = 2 * SOFTCAP * (sigmoid - 1)  # softcapped_nll's z - softcap, which is not above 0
        p = tl.where(v < V, tl.exp(z), 0.0)
        total = tl.sum(p, 0)
        is_target = v == target
        is_scored = tl.where(target >= 0, 1.0, 0.0)
        loss = tl.log(total) - tl.sum(tl.where(is_target, z, 0.0), 0)
        tl.store(nll + token, is_scored * loss)
        dz = p * (is_scored / total) - tl.where(is_target, is_scored, 0.0)
        grad = dz * (4 * sigmoid * (1 - sigmoid))
        tl.store(row, grad.to(logits.dtype.element_ty), mask=v < V)

    return loss_program

def launch_loss(logits, targets, softcap: float):
    """Returns the losses (T,) of logits (T, V), which become their gradients."""
    T, V = logits.shape
    nll = logits.new_empty(T, dtype=torch.float32)
    launch = launcher(loss_kernel(), T)
    launch(logits, targets.contiguous(), nll, V, SOFTCAP=softcap, WIDTH=power_of_2(V), num_warps=8)
    return nll

class FusedLoss(torch.autograd.Function):
    """softcapped_nll of x (T, D) times embed.T, from embed (V, D), by the kernel."""

    @staticmethod
    def forward(ctx, x, embed, targets, softcap):
        logits = F.linear(x, embed)
        nll = launch_loss(logits, targets, softcap)
        ctx.save_for_backward(x, embed, logits)  # the kernel has written their gradient there
        return nll

    @staticmethod
    def backward(ctx, dnll):
        x, embed, dlogits = ctx.saved_tensors
        factor = dnll[:, None]
        dx = (dlogits @ embed).mul_(factor)
        scaled = torch.mul(x, factor, out=torch.empty_like(x))  # factor is fp32, and the result should not be
        return dx, dlogits.T @ scaled, None, None

class FusedNLL(torch.autograd.Function):
    """softcapped_nll by the kernel, of logits that nothing else reads: they become their gradients."""

    @staticmethod
    def forward(ctx, logits, targets, softcap):
        dlogits = logits.contiguous()
        nll = launch_loss(dlogits, targets, softcap)
        ctx.save_for_backward(dlogits)
        return nll

    @staticmethod
    def backward(ctx, dnll):
        (dlogits,) = ctx.saved_tensors
        return dlogits.mul_(dnll[:, None]), None, None

# Adapters     add_outputs without a copy of what it adds; adapter_adamw_ in one pass

class FusedAddOutputs(torch.autograd.Function):
    """add_outputs in one pass, without a kernel of its own."""

    @staticmethod
    def forward(ctx, y, *outputs):
        ctx.widths = [output.size(1) for output in outputs]
        total = torch.empty_like(y)
        for columns, output, out in zip(y.split(ctx.widths, 1), outputs, total.split(ctx.widths, 1)):
            torch.add(columns, output, out=out)
        return total

    @staticmethod
    def backward(ctx, dtotal):
        return dtotal, *dtotal.split(ctx.widths, 1)

@functools.cache
def adapter_adamw_kernel():
    """A program takes BLOCK numbers of one slot, in one visit."""
    triton, tl = import_triton()

    @triton.jit
    def adapter_adamw_program(tensor, compute_copy, grad, moment, bias_correction, decay, beta2, lr, slots, N,
                              BLOCK: tl.constexpr):
        # tensor and moment, in fp32, and compute_copy are updated; the last three pointers are by slot.
        slot = tl.program_id(1) % slots
        beta = tl.load(beta2 + slot)
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < tl.where(beta < 1, N, 0)  # a slot that stays as it is is not even read
        at += tl.program_id(1).to(tl.int64) * N
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(moment + at, mask=inside, other=0.0)
        v += (1 - beta) * (g * g - v)
        w = tl.load(tensor + at, mask=inside, other=0.0) * (1 - lr * tl.load(decay + slot))
        w -= lr * g / (tl.sqrt(v / tl.load(bias_correction + slot)) + 1e-10)
        tl.store(moment + at, v, mask=inside)
        tl.store(tensor + at, w, mask=inside)
        tl.store(compute_copy + at, w.to(compute_copy.dtype.element_ty), mask=inside)

    return adapter_adamw_program

def launch_adapter_adamw(tensor, compute_copy, grad, second_moment, bias_correction, decay, beta2, lr: float):
    """adapter_adamw_ by the kernel, of contiguous tensors."""
    visits, slots, *shape = tensor.shape
    N = math.prod(shape)
    block = 1024
    launch = launcher(adapter_adamw_kernel(), ceil_div(N, block), visits * slots)
    launch(tensor, compute_copy, grad.contiguous(), second_moment, bias_correction, decay, beta2, lr, slots,
           N, BLOCK=block)

if __name__ == "__main__":
    try:
        status = main(arguments=sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)  # at once: threads of collectives may abort a slow end, or keep other ranks waiting
