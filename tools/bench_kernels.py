#!/usr/bin/env python3
"""Time each Triton kernel of training, forward and backward, against PyTorch and against its floor.

    python tools/bench_kernels.py [--tokens 98304]

One line a kernel and direction: microseconds of the kernel, of the PyTorch that it replaces, compiled by
torch.compile, and the floor: the bytes that have to be read and written at the copy speed of this GPU or, for
what holds matrix products, their operations at the speed of an 8192^3 product, whichever is longer. Shapes
are the record's; inputs are normal noise.
"""
import argparse
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import command

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
with command.imports("requirements-gpu.txt"):
    import torch
    from floors import ENTRY_ROWS, LANES_ROWS, NORM_ROWS, SKIP_ROWS, exclusion_rows, heads_rows

    import train_gpt as tg
    from bench_step import ceilings, kernel_times
    from kernel_cases import (
        entry_case,
        exclude_case,
        heads_case,
        lanes_case,
        loss_case,
        mlp_case,
        norm_case,
    )

CFG = tg.Config()
H, K, E, R = CFG.num_heads, CFG.num_kv_heads, CFG.head_dim, CFG.rope_dims
D, M, V = CFG.model_dim, CFG.mlp_dim, CFG.vocab_size


class Case(NamedTuple):
    """A kernel, what it replaces, and the least that either has to do."""
    fused: Callable
    plain: Callable
    leaves: tuple
    forward_bytes: float
    backward_bytes: float
    forward_operations: float = 0.0
    backward_operations: float = 0.0


def make_cases(T: int, draw: Callable) -> dict[str, Case]:
    row = 2 * T * D  # bytes of a bf16 tensor (T, D)
    mlp, head = 4 * T * D * M, 2 * T * D * V
    return {
        "heads": Case(*heads_case(T, H, K, E, R, draw), *(n * row for n in heads_rows(CFG))),
        "exclusion": Case(*exclude_case(T, H, K, E, draw), *(n * row for n in exclusion_rows(CFG))),
        "entry": Case(*entry_case(T, D, draw), *(n * row for n in ENTRY_ROWS)),
        "entry with a skip": Case(*entry_case(T, D, draw, skip=True),
                                  *((n + more) * row for n, more in zip(ENTRY_ROWS, SKIP_ROWS))),
        "lanes": Case(*lanes_case(T, D, draw), *(n * row for n in LANES_ROWS)),
        "norm of lanes": Case(*norm_case(T, D, draw, lanes=True), *(n * row for n in NORM_ROWS)),
        # Of the MLP the rows that all of its kernels and products read and write, where M is 4 D.
        "MLP sublayer": Case(*mlp_case(T, D, M, draw), 19 * row, 28 * row, mlp, 2 * mlp),
        "MLP in FP8": Case(*mlp_case(T, D, M, draw, training=True), 16.5 * row, 20.5 * row, mlp / 2, mlp),
        "head and loss": Case(*loss_case(T, D, V, draw), 48 * row, 34 * row, head, 2 * head),
    }


def microseconds(call: Callable) -> float:
    """What the kernels of a call take on the GPU; the host takes longer to launch some of them."""
    for _ in range(3):
        call()
    spent, _, _ = kernel_times(call, 15)
    return 1e3 * sum(spent.values())


def both_ways(function: Callable, leaves: tuple) -> tuple[float, float]:
    """Microseconds forward and backward."""
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs = function(*own)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    grads = [torch.randn_like(y) for y in outputs]

    def forward():
        function(*own)

    def backward():
        torch.autograd.grad(outputs, own, grads, retain_graph=True, allow_unused=True)

    return microseconds(forward), microseconds(backward)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98_304, help="rows of the inputs (98304)")
    T = parser.parse_args(argv).tokens
    if T < 1:
        parser.error("--tokens wants at least 1")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return command.report("this needs a Hopper GPU")

    def draw(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    _, product, copy = ceilings(tg.Ranks())
    name = tg.device_name(torch.device("cuda"))
    print(f"{name}: product {product / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s, {T} tokens")
    print(f"{'kernel':20}{'':10}{'us':>9}{'PyTorch':>9}{'floor':>9}{'of floor':>10}")
    for name, case in make_cases(T, draw).items():
        ours = both_ways(case.fused, case.leaves)
        theirs = both_ways(torch.compile(case.plain, dynamic=False), case.leaves)
        floors = (max(case.forward_bytes / copy, case.forward_operations / product),
                  max(case.backward_bytes / copy, case.backward_operations / product))
        for way, our, their, floor in zip(("forward", "backward"), ours, theirs, floors):
            print(f"{name:20}{way:10}{our:9.0f}{their:9.0f}{1e6 * floor:9.0f}{1e6 * floor / our:10.0%}")
    return 0


if __name__ == "__main__":
    command.run(main)
