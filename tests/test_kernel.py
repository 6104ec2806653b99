"""Every kernel against the PyTorch beside it: interpreted at small shapes, compiled for Hopper without one, on a GPU at real ones."""
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

def same(fused, reference, leaves, rtol=1e-4, atol=1e-4):
    # outputs and all gradients, where kernels write into memory that holds NaN
    torch.empty_like = lambda x, **kw: torch.full_like(x, float("nan"), **kw)
    a, b = ([x.clone().requires_grad_() for x in leaves] for _ in range(2))
    ours, theirs = fused(*a), reference(*b)
    ours, theirs = ((y if isinstance(y, tuple) else (y,)) for y in (ours, theirs))
    grads = [torch.randn(y.shape) for y in theirs]
    torch.autograd.backward(ours, grads), torch.autograd.backward(theirs, grads)
    for x, y in zip((*ours, *(t.grad for t in a)), (*theirs, *(t.grad for t in b))):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)

for T, D, M in ((64, 32, 64), (37, 32, 64), (1, 64, 96), (130, 64, 160)):
    x, up, down, dy = torch.randn(T, D), torch.randn(M, D), torch.randn(D, M), torch.randn(T, D)
    pre, act, depth = x @ up.T, tg.launch_mlp(x, up), torch.tensor(0.5)
    torch.testing.assert_close(act, tg.activation(pre), rtol=1e-4, atol=1e-3)
    sure = pre.abs() > 1e-3
    assert torch.equal((act.view(torch.int32) & 1)[sure], (pre < 0).int()[sure]), "the last bit knows the sign"
    mlp, reference = (lambda *args, f=f: f(*args, depth) for f in (tg.FusedMLP.apply, tg.mlp_reference))
    alone, alone_reference = (lambda x, *w, f=f: f(x, None, *w, depth) for f in (tg.FusedMLP.apply, tg.mlp_reference))
    same(mlp, reference, (x, dy, up, down), atol=1e-2)
    same(alone, alone_reference, (x, up, down), atol=1e-2)
    leaf, again = (x.clone().requires_grad_() for _ in range(2))
    mlp(leaf, dy, up, down)[0].backward(dy), reference(again, dy, up, down)[0].backward(dy)  # frozen weights, no gradient of n
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-4, atol=1e-2)
for T, H, K, E, R in ((37, 4, 2, 16, 8), (5, 2, 2, 32, 0), (64, 4, 1, 16, 16), (1, 1, 1, 8, 2)):
    rope = *torch.randn(2, 50, 1, R // 2), torch.randint(50, (T,))
    qkv, gain = torch.randn(T, (H + 2 * K) * E), 5 * torch.rand(H)
    same(lambda x, g: tg.fused_heads(x, g, *rope, K), lambda x, g: tg.split_heads(x, g, *rope, K), (qkv, gain))
    same(tg.fused_exclude, tg.exclude_self, (torch.randn(T, H, E), torch.randn(T, K, E)))
v = torch.zeros(3, 1, 8)
assert torch.equal(tg.fused_exclude(torch.ones(3, 2, 8), v), torch.ones(3, 2, 8)), "a value of zero excludes nothing"
for T, D in ((37, 32), (3, 48), (64, 64), (1, 8)):
    x, x0, skip, mix, scale, gate = *torch.randn(3, T, D), torch.randn(2, D), *torch.randn(2, D)
    depth, none = torch.tensor(0.5), (None,) * 3
    for apart in (False, True):
        fused, plain = (lambda x, x0, mix, *skip, f=f: f(x, x0, mix, depth, apart, *(skip or none))
                        for f in (tg.FusedEnter.apply, tg.enter))
        same(fused, plain, (x, x0, mix)), same(fused, plain, (x, x0, mix, skip, scale, gate))
        same(lambda x, mix: fused(x, x0, mix)[:2], lambda x, mix: plain(x, x0, mix)[:2], (x, mix))  # frozen embedding
        sliced = torch.randn(T, 2 * D)[:, ::2]  # not contiguous
        same(lambda x0, mix: fused(sliced, x0, mix)[1:], lambda x0, mix: plain(sliced, x0, mix)[1:], (x0, mix))
for T, V, D in ((5, 64, 8), (3, 100, 16)):
    x, embed, targets = 8 * torch.randn(T, D), torch.randn(V, D), torch.randint(V, (T,))
    targets[1] = tg.IGNORE
    same(lambda x, e: tg.FusedHead.apply(x, e, targets, 30.0),
         lambda x, e: tg.softcapped_nll(x @ e.T, targets, 30.0), (x, embed), atol=1e-3)
print("interpreted")
"""


def test_kernels_under_the_interpreter():
    """Whole and ragged tiles in fp32; in a process of its own, as Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True,
                          cwd=Path(tg.__file__).parent, env={**os.environ, "TRITON_INTERPRET": "1"})
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter cannot loop with this NumPy")
    assert done.stdout.strip() == "interpreted", done.stderr[-3000:]


LAUNCHES = {  # kernel -> settings that are compiled in; which arguments a direction lacks
    "heads_kernel": (dict(G=2, E=64, R=16, EPS=tg.NORM_EPS, BLOCK=tg.HEADS_BLOCK), "dqkv dgain"),
    "exclude_kernel": (dict(G=2, E=64, BLOCK=16), "dz dv"),
    "enter_kernel": (dict(APART=True, EPS=tg.NORM_EPS, BLOCK=tg.ENTER_BLOCK, WIDTH=512), "dx0_next dx dx0 dskip sums"),
    "join_kernel": (dict(ADD=True, EPS=tg.NORM_EPS, BLOCK=4, WIDTH=512), ""),
    "nll_kernel": (dict(SOFTCAP=30.0, WIDTH=8192), ""),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_compile_for_hopper(name, backward):
    """The interpreter does not check types; the compiler does, and needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel, (constants, absent) = getattr(tg, name)(), LAUNCHES[name]
    constants = {**constants, "BACKWARD": backward, **({} if backward else dict.fromkeys(absent.split()))}
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    kinds = {**dict.fromkeys("THKDV", "i32"), **dict.fromkeys(("positions", "targets"), "*i64"),
             **dict.fromkeys(("cos", "sin", "dgain", "sums", "depth", "r", "nll"), "*fp32")}
    signature = {arg: "constexpr" if arg in constants else kinds.get(arg, "*bf16") for arg in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000


def test_no_length_makes_a_kernel(monkeypatch):
    """What is compiled into a kernel does not follow from the number of tokens: adaptation has a new one in every round."""
    settings = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **constants: settings.setdefault((self.name, constants.get("BACKWARD")), set()).add(
                tuple(sorted(constants.items())))

    for name in ("mlp_kernel", "heads_kernel", "exclude_kernel", "enter_kernel", "join_kernel", "nll_kernel"):
        monkeypatch.setattr(tg, name, lambda name=name: Recorder(name))
    monkeypatch.setattr(tg, "multiprocessors", lambda x: 132)
    monkeypatch.setattr(tg, "tool", lambda name: type("", (), {"TensorDescriptor": type("", (), {"from_tensor": lambda *args: 0})}))
    for T in (128, 1280, 6400, 129_024):
        x, mix, scale = torch.empty(T, 8), torch.empty(2, 8), torch.empty(8)
        inputs = x, x, mix, torch.tensor(1.0), None, None, None
        one, r, up, down = torch.tensor(1.0), torch.empty(T), torch.empty(32, 8), torch.empty(8, 32)
        tg.fused_mlp(x, x, up, down, one), tg.mlp_grad(x, down, torch.empty(T, 32)), tg.join_grad(x, x, one, x, r)
        tg.fused_nll(x, up, torch.zeros(T, dtype=torch.long), 30.0)
        q, k = torch.empty(T, 2, 8), torch.empty(T, 1, 8)
        rest = torch.empty(T, 32), torch.empty(2), *torch.empty(2, 64, 1, 2), torch.zeros(T, dtype=torch.long)
        tg.fused_heads(*rest, 1), tg.fused_heads_grad([q, q, q, k], *rest)
        tg.fused_exclude(q, k), tg.fused_exclude_grad(q, q, k)
        tg.fused_enter(*inputs[:4], False, *inputs[4:]), tg.fused_enter_grad(x, x, x, False, list(inputs))
    assert len(settings) == 11 and all(len(variants) == 1 for variants in settings.values()), settings


def mlp_case(T, draw):
    depth = torch.tensor(0.5, device="cuda")
    fused, reference = (lambda *args, f=f: f(*args, depth) for f in (tg.FusedMLP.apply, tg.mlp_reference))
    return fused, reference, (draw(T, 512), draw(T, 512), draw(2048, 512) / 22, draw(512, 2048) / 45)


def lane_mlp_case(T, draw):
    fused, reference, (x, _, *weights) = mlp_case(T, draw)
    return lambda x, *w: fused(x, None, *w), lambda x, *w: reference(x, None, *w), (x, *weights)


def nll_case(T, draw):
    targets = torch.randint(-1, 8192, (T,), generator=torch.Generator().manual_seed(T)).cuda()
    return (lambda x, e: tg.FusedHead.apply(x, e, targets, 30.0),
            lambda x, e: tg.softcapped_nll(x @ e.T, targets, 30.0), (draw(T, 512), draw(8192, 512) / 4))


def heads_case(T, draw):
    rope = draw(64, 1, 8), draw(64, 1, 8), (torch.arange(T) % 64).cuda()
    return (lambda x, g: tg.fused_heads(x, g, *rope, 4), lambda x, g: tg.split_heads(x, g, *rope, 4),
            (draw(T, 1024), 5 * draw(8).abs()))


def exclude_case(T, draw):
    return tg.fused_exclude, tg.exclude_self, (draw(T, 8, 64), draw(T, 4, 64))


def enter_case(T, draw, skip=(), apart=False):
    depth, rest = torch.tensor(0.5, device="cuda"), () if skip else (None,) * 3
    fused, reference = (lambda x, x0, mix, *s, f=f: f(x, x0, mix, depth, apart, *s, *rest) for f in (tg.FusedEnter.apply, tg.enter))
    return fused, reference, (draw(T, 512), draw(T, 512), draw(2, 512), *skip)


def merge_case(T, draw):
    return enter_case(T, draw, (draw(T, 512), draw(512), draw(512)))


def lane_case(T, draw):
    return enter_case(T, draw, (draw(T, 512), draw(512), draw(512)), apart=True)


@pytest.mark.gpu
@pytest.mark.parametrize("T,compiled", [(98_304, False), (1000, True), (129, False), (1, False)])
@pytest.mark.parametrize("case", [mlp_case, lane_mlp_case, heads_case, exclude_case, enter_case, merge_case, lane_case, nll_case])
def test_kernels_on_gpu(case, T, compiled):
    """Outputs and gradients within twice the error of PyTorch in bf16, both against fp32; poisoned memory; fullgraph."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(T)
    fused, reference, leaves = case(T, lambda *shape: torch.randn(*shape, generator=generator).cuda())
    whole = torch.compile(lambda *args: fused(*args), fullgraph=True) if compiled else fused

    def run(f, dtype):
        torch.full((T, 8192), float("nan"), device="cuda", dtype=dtype)  # what is freed here is reused for outputs
        own = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        outputs = f(*own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        noise = torch.Generator().manual_seed(1)
        torch.autograd.backward(outputs, [torch.randn(y.shape, generator=noise).cuda().to(dtype) for y in outputs])
        return [y.detach().float() for y in (*outputs, *(t.grad for t in own))]

    exact, plain, ours = run(reference, torch.float32), run(reference, torch.bfloat16), run(whole, torch.bfloat16)
    for r, p, o in zip(exact, plain, ours):
        assert (o - r).norm() <= 2 * (p - r).norm() + 1e-6 * r.norm(), ((o - r).norm() / r.norm(), (p - r).norm() / r.norm())


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
