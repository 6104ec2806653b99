"""Every kernel against the PyTorch that it replaces: interpreted, compiled for Hopper, on a GPU."""
import ast
import collections
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as tg
from conftest import ROOT
from kernel_cases import (
    check_adapter_adamw,
    entry_case,
    exclude_case,
    heads_case,
    lanes_case,
    loss_case,
    mlp_case,
    nll_case,
    norm_case,
    to_fp8_without_kernel,
    weights8,
)

KERNELS = ("mlp_kernel", "fp8_kernel", "heads_kernel", "exclude_kernel", "entry_kernel", "join_kernel",
           "lanes_kernel", "loss_kernel", "adapter_adamw_kernel")


def test_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests/interpreted_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter cannot loop with this NumPy")
    assert done.stdout.strip() == "interpreted", done.stderr[-3000:]


# Of each kernel, what is compiled in, and the arguments that its forward direction lacks.
LAUNCHES = {
    "heads_kernel": (dict(G=2, E=64, R=16, EPS=tg.NORM_EPS, BLOCK=tg.HEADS_BLOCK), "dqkv dgain"),
    "exclude_kernel": (dict(G=2, E=64, BLOCK=16), "dz dv"),
    "entry_kernel": (dict(LANES=True, EPS=tg.NORM_EPS, BLOCK=tg.ENTRY_BLOCK, WIDTH=512),
                     "dx_later dx0_later dx dx0 dskip sums"),
    "join_kernel": (dict(ADD=True, EPS=tg.NORM_EPS, BLOCK=4, WIDTH=512), ""),
    "lanes_kernel": (dict(BLOCK=2048), "dx dlane da dm sums"),
    "loss_kernel": (dict(SOFTCAP=30.0, WIDTH=8192), ""),
}
SHARED_MEMORY = 232_448  # bytes that a block may have on a Hopper GPU
ARGUMENT_TYPES = {  # of those that are not bf16 tensors
    **dict.fromkeys("THKDVN", "i32"), **dict.fromkeys(("positions", "targets"), "*i64"),
    **dict.fromkeys(("cos", "sin", "dgain", "sums", "depth", "r", "nll"), "*fp32")}


def compile_for_hopper(kernel, constants, types, **options):
    """The compiler checks types, which the interpreter does not, and needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "*bf16")
                 for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000 and compiled.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_compile_for_hopper(name, backward):
    pytest.importorskip("triton")
    constants, lacking = LAUNCHES[name]
    constants = {**constants, "BACKWARD": backward, **({} if backward else dict.fromkeys(lacking.split()))}
    compile_for_hopper(getattr(tg, name)(), constants, ARGUMENT_TYPES)


class Recorder:
    """Stands for a kernel, and keeps (arguments, constants) of each launch."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((args, constants))


class RecordedDescriptor(NamedTuple):
    """Stands for Triton's TensorDescriptor."""
    dtype: torch.dtype
    block: list[int]

    @classmethod
    def from_tensor(cls, x, block):
        return cls(x.dtype, block)

    @property
    def type(self) -> str:
        return f"tensordesc<{'bf16' if self.dtype == torch.bfloat16 else 'fp8e4nv'}{self.block}>"


def record_kernels(monkeypatch) -> dict[str, Recorder]:
    """Recorders in the place of all kernels, by name."""
    recorders = {name: Recorder() for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(tg, name, lambda recorder=recorder: recorder)
    monkeypatch.setattr(tg, "multiprocessors", lambda x: 132)
    monkeypatch.setattr(tg, "lazy_import", lambda name: SimpleNamespace(TensorDescriptor=RecordedDescriptor))
    return recorders


@pytest.mark.parametrize("dtype, epilogue, transposes", [
    (torch.bfloat16, "act", False), (torch.bfloat16, "slope", False), (tg.E4M3, "act", True),
    (tg.E4M3, "add", False), (tg.E4M3, "none", False), (tg.E4M3, "slope", True)])
def test_products_compile_for_hopper(monkeypatch, dtype, epilogue, transposes):
    """As they are launched at the record's shapes: a tile has to fit shared memory."""
    pytest.importorskip("triton")
    kernel = tg.mlp_kernel()
    recorders = record_kernels(monkeypatch)
    with FakeTensorMode():
        up = epilogue in ("act", "slope")  # from D to M, or else from M to D
        T, N, K = 98_304, *((2048, 512) if up else (512, 2048))
        a, b = (torch.empty(n, K, device="cuda", dtype=dtype) for n in (T, N))
        out = torch.empty(T, N, device="cuda", dtype=torch.bfloat16)
        if transposes:
            tg.launch_mlp(epilogue, b, a, out.T.to(dtype), out.T.to(dtype), out.to(dtype))
        else:
            tg.launch_mlp(epilogue, a, b, out, out)
    (args, constants), = recorders["mlp_kernel"].launches
    assert constants["EPILOGUE"] == epilogue and constants["STORE_T"] == transposes
    types = {name: "i32" if isinstance(arg, int) else "fp32" if isinstance(arg, float) else arg.type
             for name, arg in zip(kernel.arg_names, args)}
    options = {name: constants[name] for name in ("num_stages", "num_warps")}
    compile_for_hopper(kernel, constants, types, **options)


def test_conversion_to_fp8_compiles_for_hopper():
    types = {"scale": "fp32", "T": "i32", "D": "i32", "y": "*fp8e4nv", "y_t": "*fp8e4nv"}
    compile_for_hopper(tg.fp8_kernel(), dict(BLOCK=128), types, num_warps=4)


def test_adamw_of_adapters_compiles_for_hopper():
    pytest.importorskip("triton")
    kernel = tg.adapter_adamw_kernel()
    types = {**dict.fromkeys(kernel.arg_names, "*fp32"), "compute_copy": "*bf16", "grad": "*bf16",
             "lr": "fp32", "slots": "i32", "N": "i32"}
    compile_for_hopper(kernel, dict(BLOCK=1024), types)


class CountedKernel:
    """Stands for a kernel; counts what is compiled, by which thread, and what runs."""

    def __init__(self):
        self.compiled, self.threads, self.ran = [], set(), 0

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.ran += 1
        return launch

    def warmup(self, *args, grid, **constants):
        time.sleep(0.05)
        self.threads.add(threading.current_thread().name)
        self.compiled.append((grid, *map(str, args), *constants.values()))


def test_kernels_are_compiled_ahead_in_threads(monkeypatch):
    """Each form once, and at the end of the block they are; before and after it they run."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kernels = CountedKernel(), CountedKernel()
    half, double = torch.ones(1, dtype=torch.half), torch.ones(1, dtype=torch.double)

    def launch_all():
        for kernel in kernels:
            for args, backward in (((1, 2), False), ((1, None), False), ((1, 2), True), ((3, 4), True),
                                   ((1, half), False), ((1, double), False)):
                tg.launcher(kernel, 5, 6)(*args, BACKWARD=backward)

    launch_all()
    before = threading.active_count()
    with tg.KernelCompiler(torch.device("cpu")):
        launch_all()
    assert threading.active_count() == before
    for kernel in kernels:
        assert kernel.ran == 6 and len(kernel.compiled) == len(set(kernel.compiled)) == 5
        assert len(kernel.threads) > 1
    launch_all()
    assert all(kernel.ran == 12 for kernel in kernels)


def test_a_kernel_that_does_not_compile_ends_the_block(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kernel = CountedKernel()
    kernel.warmup = lambda *args, **options: 1 / 0
    with pytest.raises(ZeroDivisionError), tg.KernelCompiler(torch.device("cpu")):
        tg.launcher(kernel, 1)()
    assert tg.KernelCompiler.active is None


def test_an_error_in_the_block_is_the_one_that_is_raised(monkeypatch):
    """Not that of a kernel beside it; and no more kernels are begun."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kernel = CountedKernel()
    compile_one = kernel.warmup
    kernel.warmup = lambda *args, **options: (compile_one(*args, **options), 1 / 0)
    with pytest.raises(MemoryError), tg.KernelCompiler(torch.device("cpu")):
        for n in range(100):
            tg.launcher(kernel, 1)(N=n)
        raise MemoryError
    assert len(kernel.compiled) < 50 and tg.KernelCompiler.active is None


def test_kernels_are_compiled_ahead_where_there_are_any(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    active = []

    def call():
        active.append(tg.KernelCompiler.active is not None)

    gpu = SimpleNamespace(on_gpu=True, device=torch.device("cpu"))
    tg.compile_kernels(tg.Backend(fused=True), gpu, call)
    assert active == [True]
    tg.compile_kernels(tg.Backend(fused=False), gpu, call)
    tg.compile_kernels(tg.Backend(fused=True), tg.Ranks(), call)
    assert active == [True]


def test_every_kernel_is_launched_by_the_launcher():
    """One that is not would run on what the others have not written."""
    source = Path(tg.__file__).read_text(encoding="utf-8")
    launched = {match[1] for match in re.finditer(r"launcher\((\w+_kernel)\(\),", source)}
    defined = set(re.findall(r"^def (\w+_kernel)\(", source, flags=re.M))
    assert launched == defined and not re.search(r"_kernel\(\)\s*\[", source)


def test_packing_leaves_nothing_on_what_syntax_trees_share():
    """Triton deep-copies the target of every += of a kernel: 0.3 s each while a script's tree hangs on it."""
    tg.pack_script.__wrapped__()
    shared = [node for node in ast.walk(ast.parse("a += b < -c")) if not node._fields]
    assert len(shared) > 4 and not any(map(vars, shared))


def test_no_length_makes_a_kernel(monkeypatch):
    """What is compiled into a kernel does not follow from the number of tokens, which every round changes."""
    recorders = record_kernels(monkeypatch)
    for T in (128, 1280, 6400, 129_024):
        def draw(*shape):
            return torch.empty(shape, requires_grad=True)

        x, one, number = draw(T, 8), torch.tensor(1.0), torch.zeros(T, dtype=torch.long)
        up, down = draw(32, 8), draw(8, 32)
        for outputs in (tg.FusedMLP.apply(x, x, up, down, one),
                        tg.FusedMLP.apply(x, x, up, down, one, weights8(up, down)),
                        tg.FusedMLP.apply(x, None, up, down, one, weights8(up, down)),
                        tg.FusedHeads.apply(draw(T, 32), draw(2), *torch.empty(2, 64, 1, 2), number, 1),
                        (tg.FusedExclude.apply(draw(T, 2, 8), draw(T, 1, 8)),),
                        tg.FusedEntry.apply(x, x, draw(2, 8), one, False, None, None, None),
                        (tg.FusedNorm.apply(x, None, x.dtype),), (tg.FusedNorm.apply(x, x, x.dtype),),
                        tg.FusedLanes.apply(x, x, x, x, draw(2, 4)),
                        (tg.FusedNLL.apply(draw(T, 32), number, 30.0),),
                        (tg.FusedLoss.apply(x, draw(32, 8), number, 30.0),)):
            sum(y.sum() for y in outputs if y is not None).backward()
    constants = collections.defaultdict(set)  # by kernel and what it is asked to do
    for name, recorder in recorders.items():
        for _, launch in recorder.launches:
            key = name, *(value for value in launch.values() if isinstance(value, bool | str))
            constants[key].add(tuple(sorted(launch.items())))
    assert len(constants) == 20 and all(len(variants) == 1 for variants in constants.values()), constants


def sixteens(T):
    """The next multiple of 16: FP8 products want no other number of tokens."""
    return 16 * tg.ceil_div(T, 16)


# The record's shapes, and those of earlier runs
GPU_CASES = {
    "mlp": lambda T, draw: mlp_case(T, 512, 2048, draw),
    "mlp of a lane": lambda T, draw: mlp_case(T, 512, 2048, draw, alone=True),
    "mlp in FP8": lambda T, draw: mlp_case(sixteens(T), 512, 2048, draw, training=True),
    "mlp of a lane in FP8": lambda T, draw: mlp_case(sixteens(T), 512, 2048, draw, True, training=True),
    "heads": lambda T, draw: heads_case(T, 4, 2, 128, 32, draw),
    "heads of 64": lambda T, draw: heads_case(T, 8, 4, 64, 16, draw),
    "exclusion": lambda T, draw: exclude_case(T, 4, 2, 128, draw),
    "exclusion with heads of 64": lambda T, draw: exclude_case(T, 8, 4, 64, draw),
    "entry": lambda T, draw: entry_case(T, 512, draw),
    "entry with a skip": lambda T, draw: entry_case(T, 512, draw, skip=True),
    "entry of a lane": lambda T, draw: entry_case(T, 512, draw, skip=True, lanes=True),
    "norm": lambda T, draw: norm_case(T, 512, draw),
    "norm of lanes": lambda T, draw: norm_case(T, 512, draw, lanes=True),
    "lanes": lambda T, draw: lanes_case(T, 512, draw),
    "loss": lambda T, draw: loss_case(T, 512, 8192, draw),
    "loss of logits": lambda T, draw: nll_case(T, 8192, draw),
}


def outputs_and_gradients(function, leaves, dtype) -> list[torch.Tensor]:
    """All outputs, and the gradients of all leaves for one draw of gradients of the outputs; fp32."""
    own = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
    outputs = function(*own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    noise = torch.Generator().manual_seed(2)  # another than those of leaves, which are numbers of tokens
    grads = [torch.randn(y.shape, generator=noise).cuda().to(dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    return [t.detach().float() for t in (*outputs, *(leaf.grad for leaf in own))]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [98_304, 1000, 129, 1])
@pytest.mark.parametrize("name", GPU_CASES)
def test_kernels_on_gpu(name, T):
    """Within twice the error of PyTorch in bf16, against fp32; in poisoned memory."""
    generator = torch.Generator().manual_seed(T)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).cuda()

    fused, reference, leaves = GPU_CASES[name](T, draw)
    exact = outputs_and_gradients(reference, leaves, torch.float32)
    plain = outputs_and_gradients(reference, leaves, torch.bfloat16)
    torch.full((T, 8192), float("nan"), device="cuda", dtype=torch.bfloat16)  # freed, and reused for outputs
    ours = outputs_and_gradients(fused, leaves, torch.bfloat16)
    for e, p, o in zip(exact, plain, ours, strict=True):
        error, base = (o - e).norm() / e.norm(), (p - e).norm() / e.norm()
        assert error <= 2 * base + 1e-6, (error, base)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(98_304, 512), (11 * 2048, 512), (11 * 512, 2048), (1000, 520), (1, 16)])
def test_conversion_to_fp8_on_gpu(shape):
    """As PyTorch converts, in poisoned memory; too large numbers become 448."""
    x = 20 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    torch.full(shape, float("nan"), device="cuda")
    y, y_t = tg.to_fp8(x, 8.0)
    for ours, theirs in zip((y, y_t), to_fp8_without_kernel(x, 8.0), strict=True):
        assert torch.equal(ours.float(), theirs.float())
    assert (y.float().abs() == 448).any() or len(x) == 1


@pytest.mark.gpu
def test_adamw_of_adapters_on_gpu():
    check_adapter_adamw((17, 4, 96, 512), "cuda")
    check_adapter_adamw((1, 4, 8192, 7), "cuda")


@pytest.mark.gpu
def test_grouped_linear_on_gpu():
    """Row groups of any size, empty ones too, and the gradients of all; those of empty groups are zero."""
    sizes = [100, 0, 1, 411, 0]
    ends = torch.tensor(sizes).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    shapes = (512, 64), (5, 64, 32), (512, 32)
    x, weights, dy = (torch.randn(*shape, generator=generator) for shape in shapes)

    def product_and_gradients(device, dtype):
        a, b = (t.detach().to(device, dtype).requires_grad_() for t in (x, weights))
        torch.full((5, 64, 32), float("nan"), device=device, dtype=dtype)
        y = tg.grouped_linear(a, b, ends.to(device))
        y.backward(dy.to(device, dtype))
        return [t.detach().float().cpu() for t in (y, a.grad, b.grad)]

    exact, ours = product_and_gradients("cpu", torch.float32), product_and_gradients("cuda", torch.bfloat16)
    for e, o in zip(exact, ours, strict=True):
        rounding = (e.bfloat16().float() - e).norm()
        assert o.isfinite().all() and (o - e).norm() <= 4 * rounding + 1e-3 * e.norm()
    assert (ours[2][1] == 0).all() and (ours[2][4] == 0).all()
