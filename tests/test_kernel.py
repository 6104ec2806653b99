"""The fused MLP: under Triton's interpreter at small shapes, on a GPU at real ones."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as tg

INTERPRETED = """
import torch, train_gpt as tg
torch.manual_seed(0)
for T, D, M in ((64, 32, 64), (37, 32, 64), (1, 64, 96), (130, 64, 160)):
    x, up, down, dy = torch.randn(T, D), torch.randn(M, D), torch.randn(D, M), torch.randn(T, D)
    pre, act = tg.launch_mlp(x, up, None)
    torch.testing.assert_close(pre, x @ up.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(act, tg.activation(x @ up.T), rtol=1e-4, atol=1e-3)
    dpre = tg.launch_mlp(dy, down, pre)[1]
    leaf = pre.clone().requires_grad_()
    tg.activation(leaf).backward(dy @ down)
    torch.testing.assert_close(dpre, leaf.grad, rtol=1e-4, atol=1e-3)
    a, b = ([t.clone().requires_grad_() for t in (x, up, down)] for _ in range(2))
    y, z = tg.FusedMLP.apply(*a), tg.mlp_reference(*b)
    y.backward(dy), z.backward(dy)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-2)
    for ours, reference in zip(a, b):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-2)
    frozen = [t.clone() for t in (x, up, down)]
    frozen[0].requires_grad_()
    tg.FusedMLP.apply(*frozen).backward(dy)
    torch.testing.assert_close(frozen[0].grad, b[0].grad, rtol=1e-4, atol=1e-2)
print("interpreted")
"""


def test_kernel_under_the_interpreter():
    """Whole and ragged tiles in fp32; in a process of its own, as Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True,
                          cwd=Path(tg.__file__).parent, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.stdout.strip() == "interpreted", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [98_304, 1000, 129, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernel_on_gpu(T, compiled):
    """Output and every gradient within twice the error of PyTorch in bf16, both against fp32; poisoned memory; fullgraph."""
    generator = torch.Generator().manual_seed(T)
    draw = lambda *shape: torch.randn(*shape, generator=generator).cuda()
    leaves, dy = (draw(T, 512), draw(2048, 512) / 22, draw(512, 2048) / 45), draw(T, 512)

    def run(f, dtype):
        torch.full((T, 4096), float("nan"), device="cuda", dtype=dtype)  # what is freed here is reused for outputs
        own = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        y = f(*own)
        y.backward(dy.to(dtype))
        return [y.detach().float(), *(t.grad.float() for t in own)]

    fused = torch.compile(lambda *args: tg.FusedMLP.apply(*args), fullgraph=True) if compiled else tg.FusedMLP.apply
    exact, base, ours = run(tg.mlp_reference, torch.float32), run(tg.mlp_reference, torch.bfloat16), run(fused, torch.bfloat16)
    for e, b, o in zip(exact, base, ours):
        assert o.isfinite().all() and (o - e).norm() <= 2 * (b - e).norm()


@pytest.mark.gpu
def test_grouped_linear_on_gpu():
    """Row groups of any size, empty ones too, and the gradients of all; those of empty groups are zero."""
    sizes = [100, 0, 1, 411, 0]
    ends = torch.tensor(sizes).cumsum(0).int()
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*shape, generator=g) for shape in ((512, 64), (5, 64, 32), (512, 32)))

    def run(device, dtype):
        a, b = (t.detach().to(device, dtype).requires_grad_() for t in (x, w))
        torch.full((5, 64, 32), float("nan"), device=device, dtype=dtype)
        y = tg.grouped_linear(a, b, ends.to(device))
        y.backward(dy.to(device, dtype))
        return [t.detach().float().cpu() for t in (y, a.grad, b.grad)]

    exact, ours = run("cpu", torch.float32), run("cuda", torch.bfloat16)
    base = [e.bfloat16().float() for e in exact]
    for e, b, o in zip(exact, base, ours):
        assert o.isfinite().all() and (o - e).norm() <= 4 * (b - e).norm() + 1e-3 * e.norm()
    assert (ours[2][1] == 0).all() and (ours[2][4] == 0).all()
