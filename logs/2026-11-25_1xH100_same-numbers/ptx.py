"""PTX for Hopper of every kernel variant of a script, without a GPU: ptx.py train_gpt.py OUT.json

Triton 3.6 compiles for sm_90 on any machine. Arguments are bf16 tensors on the CPU with the shapes of a record run
(fewer tokens); a launch compiles and does not run. OUT.json then holds, by kernel and variant: hash of the PTX without
comments, grid, warps, stages, shared memory. tests/kernel_cases.py has to be on PYTHONPATH.
"""
import hashlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

script, out = sys.argv[1:]
FLAGS = "ADD", "BACKWARD", "LANES", "BLOCK", "UNIT", "BLOCK_M"
found = {}
run = JITFunction.run


class NoGpu:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    ptx = re.sub(r"//.*", "", kernel.asm["ptx"])
    flags = {name: options[name] for name in FLAGS if name in options}
    absent = [i for i, value in enumerate(args) if value is None]
    meta = kernel.metadata
    row = [hashlib.sha256(ptx.encode()).hexdigest()[:16], grid, meta.num_warps, meta.num_stages, meta.shared]
    found.setdefault(f"{self.__name__} {flags} without arguments {absent}", []).append(row)
    return kernel


driver.set_active(NoGpu())
JITFunction.run = compile_only
source = Path(script).read_text()
for size_on_gpu in ("if a.is_cuda else (32, 32, 32)", "if x.is_cuda else 2"):  # tiles, multiprocessors
    assert source.count(size_on_gpu) == 1
source = source.replace("if a.is_cuda else (32, 32, 32)", "").replace(
    "torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2", "132")
copy = Path(out).with_suffix(".py")
copy.write_text(source)
spec = importlib.util.spec_from_file_location("train_gpt", copy)
tg = importlib.util.module_from_spec(spec)
sys.modules["train_gpt"] = tg
spec.loader.exec_module(tg)
import kernel_cases as kc


def draw(*shape):
    return torch.randn(*shape).bfloat16()


def both_ways(case):
    fused, _, leaves = case
    outputs = fused(*(leaf.clone().requires_grad_() for leaf in leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [y for y in outputs if y.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


T = 1024
both_ways(kc.mlp_case(T, 512, 2048, draw))
both_ways(kc.mlp_case(T, 512, 2048, draw, alone=True))
both_ways(kc.heads_case(T, 8, 4, 64, 16, draw))
both_ways(kc.exclude_case(T, 8, 4, 64, draw))
for skip in (False, True):
    for lanes in (False, True):
        both_ways(kc.entry_case(T, 512, draw, skip=skip, lanes=lanes))
both_ways(kc.loss_case(T, 512, 8192, draw))
Path(out).write_text(json.dumps(found, indent=1, sort_keys=True))
