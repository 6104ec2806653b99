#!/usr/bin/env python3
"""Time each Triton kernel of train_gpt.py, forward and backward, against PyTorch and against its floor.

    python tools/bench_kernels.py [--tokens 98304]

One line a kernel and direction: microseconds of the kernel, of the PyTorch beside it in train_gpt.py compiled by torch.compile,
and the floor: the bytes that have to be read and written at the copy speed of this GPU or, for what holds matrix products,
their operations at the speed of an 8192^3 product, whichever is longer. Shapes are the record's; inputs are normal noise.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from bench_step import ceilings, kernel_times

import train_gpt as tg

H, K, E, D, M, V = 8, 4, 64, 512, 2048, 8192


def microseconds(call) -> float:
    """What the kernels of a call take on the GPU; the host takes longer to launch some of them."""
    for _ in range(3):
        call()
    return 1e3 * sum(kernel_times(call, 15)[0].values())


def cases(T: int, draw) -> dict:
    """{name: (kernel, PyTorch, leaves, bytes forward, bytes backward, operations forward)}; backward does twice the operations."""
    depth, none = torch.tensor(0.5, device="cuda"), (None,) * 3
    rope = *torch.rand(2, 2048, 1, 8, device="cuda"), torch.arange(T, device="cuda") % 2048
    targets, row = torch.randint(V, (T,), device="cuda"), 2 * T * D  # bytes of (T, D)
    entry = lambda f: lambda x, x0, mix, *skip: f(x, x0, mix, depth, False, *(skip or none))
    return {
        "heads": (lambda x, g: tg.fused_heads(x, g, *rope, K), lambda x, g: tg.split_heads(x, g, *rope, K),
                  (draw(T, (H + 2 * K) * E), draw(H)), 5.5 * row, 7.5 * row, 0),
        "exclusion": (tg.fused_exclude, tg.exclude_self, (draw(T, H, E), draw(T, K, E)), 2.5 * row, 4 * row, 0),
        "entry": (entry(tg.FusedEnter.apply), entry(tg.enter), (draw(T, D), draw(T, D), draw(2, D)), 4 * row, 7 * row, 0),
        "entry with a skip": (entry(tg.FusedEnter.apply), entry(tg.enter),
                              (draw(T, D), draw(T, D), draw(2, D), draw(T, D), draw(D), draw(D)), 5 * row, 9 * row, 0),
        "MLP sublayer": (lambda *a: tg.FusedMLP.apply(*a, depth)[0], lambda *a: tg.mlp_reference(*a, depth)[0],
                         (draw(T, D), draw(T, D), draw(M, D) / 22, draw(D, M) / 45), 14 * row, 28 * row, 4 * T * D * M),
        "head and loss": (lambda x, e: tg.FusedHead.apply(x, e, targets, 30.0),
                          lambda x, e: tg.softcapped_nll(x @ e.T, targets, 30.0),
                          (draw(T, D), draw(V, D) / 4), 48 * row, 34 * row, 2 * T * D * V),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98_304)
    T = parser.parse_args().tokens
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("error: this needs a Hopper GPU")
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    _, product, copy = ceilings(tg.Ranks())
    print(f"{tg.device_name(torch.device('cuda'))}: product {product / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s, {T} tokens")
    print(f"{'kernel':20}{'':10}{'us':>9}{'PyTorch':>9}{'floor':>9}{'of floor':>10}")
    for name, (fused, plain, leaves, read, back, work) in cases(T, draw).items():
        rows = []
        for f in (fused, torch.compile(plain, dynamic=False)):
            own = [leaf.clone().requires_grad_() for leaf in leaves]
            y = f(*own)
            outputs = [y for y in (y if isinstance(y, tuple) else (y,)) if y.requires_grad]
            grads = [torch.randn_like(y) for y in outputs]
            rows.append((microseconds(lambda: f(*own)),
                         microseconds(lambda: torch.autograd.grad(outputs, own, grads, retain_graph=True, allow_unused=True))))
        floors = max(read / copy, work / product), max(back / copy, 2 * work / product)
        for way, ours, theirs, floor in zip(("forward", "backward"), *rows, floors):
            print(f"{name:20}{way:10}{ours:9.0f}{theirs:9.0f}{1e6 * floor:9.0f}{1e6 * floor / ours:10.0%}")


if __name__ == "__main__":
    main()
