"""Kernels by Triton's interpreter, in fp32 on a CPU, against PyTorch: whole and ragged tiles, all gradients.

Run by test_kernel.py in a process of its own with TRITON_INTERPRET=1: Triton decides at import whether it
interprets.
"""
import contextlib
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt as tg
from conftest import tiny_config, tiny_model
from kernel_cases import (
    check_adapter_adamw,
    entry_case,
    exclude_case,
    heads_case,
    in_fp8,
    lanes_case,
    loss_case,
    mlp_case,
    nll_case,
    norm_case,
    saturated,
    to_fp8_without_kernel,
)

REPLACED = ("add_outputs", "adapter_adamw_", "exclude_self", "leaky_relu_squared", "mix_and_norm",
            "mix_lanes", "norm_of_sum", "softcapped_nll", "split_heads")  # what kernels stand for


def poison_new_memory():
    """Let memory for outputs hold NaN, so that what a kernel does not write is noticed."""
    torch.empty_like = lambda x, **options: torch.full_like(x, float("nan"), **options)
    new_empty = torch.Tensor.new_empty

    def poisoned(x, *shape, **options):
        y = new_empty(x, *shape, **options)
        return y.fill_(float("nan")) if y.is_floating_point() else y

    torch.Tensor.new_empty = poisoned


def round_to_fp8_as_a_gpu_does():
    """The interpreter loses the carry as it rounds to FP8: 1.95 becomes 1. Let PyTorch convert."""
    from triton.runtime import interpreter
    convert = interpreter._convert_float

    def converted(x, source, target, rounding):
        if str(target) != "fp8e4nv":
            return convert(x, source, target, rounding)
        return saturated(torch.from_numpy(np.ascontiguousarray(x))).view(torch.uint8).numpy()

    interpreter._convert_float = converted


def assert_same(case, rtol=1e-4, atol=1e-4, fixed=()):
    """Outputs and all gradients agree; leaves in `fixed` want none."""
    fused, reference, leaves = case
    theirs, chosen = outputs_and_gradients(reference, leaves, fixed)
    ours, _ = outputs_and_gradients(fused, leaves, fixed, chosen)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=rtol, atol=atol)


def strided(x):
    """The same with gaps between its numbers: kernels read what is contiguous."""
    return torch.stack((x, x), -1)[..., 0]


def outputs_and_gradients(function, leaves, fixed, chosen=None):
    """The chosen outputs and the gradients of leaves; and which were chosen: those that have a gradient."""
    own = [leaf.clone().requires_grad_(i not in fixed) for i, leaf in enumerate(leaves)]
    outputs = function(*map(strided, own))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    chosen = [i for i, y in enumerate(outputs) if y.requires_grad] if chosen is None else chosen
    outputs = [outputs[i] for i in chosen]
    noise = torch.Generator().manual_seed(2)
    torch.autograd.backward(outputs, [strided(torch.randn(y.shape, generator=noise)) for y in outputs])
    return [*outputs, *(leaf.grad for leaf in own if leaf.requires_grad)], chosen


def first_outputs(case, count):
    """The case of a caller who uses no other outputs."""
    fused, reference, leaves = case
    return (lambda *inputs: fused(*inputs)[:count]), (lambda *inputs: reference(*inputs)[:count]), leaves


def check_mlp():
    for T, D, M in ((64, 32, 64), (37, 40, 72), (1, 64, 96), (130, 64, 160)):
        assert_same(mlp_case(T, D, M, torch.randn))
        assert_same(mlp_case(T, D, M, torch.randn, alone=True))
        for fixed in ((2,), (3,), (2, 3)):  # frozen weights
            assert_same(mlp_case(T, D, M, torch.randn), fixed=fixed)
        x, up, act, leaky = torch.randn(T, D), torch.randn(M, D), torch.empty(T, M), torch.empty(T, M)
        tg.launch_mlp("act", x, up, act, leaky)
        torch.testing.assert_close(leaky, F.leaky_relu(x @ up.T, 0.5), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(act, leaky.square(), rtol=1e-6, atol=0)
    assert_same(first_outputs(mlp_case(8, 16, 32, torch.randn, alone=True), 2))
    fused, _, leaves = mlp_case(8, 16, 32, torch.randn)
    for frozen, large in (((2, 3), 1), ((3,), 1), ((2,), 2)):  # act is for the gradient of down alone
        out, *_ = fused(*(leaf.clone().requires_grad_(i not in frozen) for i, leaf in enumerate(leaves)))
        kept = [x for x in out.grad_fn.saved_tensors if x is not None and x.shape == (8, 32)]
        assert len(kept) == large
    a, b, out = torch.randn(544, 32), torch.randn(64, 32), torch.full((544, 64), float("nan"))
    tg.launch_mlp("none", a, b, out)  # 17 rows of tiles: more than one group
    torch.testing.assert_close(out, a @ b.T, rtol=1e-4, atol=1e-4)


def check_mlp_in_fp8():
    """To fp32's rounding, as both sides round to the same FP8 numbers; whole and ragged tiles."""
    for T, D, M in ((64, 32, 64), (48, 48, 80), (16, 64, 96), (144, 64, 160)):
        for alone in (False, True):
            assert_same(mlp_case(T, D, M, torch.randn, alone, training=True), atol=1e-6)
    bank = 5 * torch.randn(3, 48, 32)
    _, stacks8 = tg.cast_banks(torch.zeros(6, 32, 32), torch.zeros(6, 16, 32), bank, bank.mT.contiguous(),
                               torch.ones(3, 32), 2 * torch.ones(3, 32), torch.float32, True)
    up8, down8 = in_fp8(64 * bank), in_fp8(128 * bank.mT)
    for ours, theirs in zip(stacks8, (up8, up8.mT, down8, down8.mT), strict=True):
        assert torch.equal(ours.float(), theirs)
    x = torch.randn(130, 144)
    for ours, theirs in zip(tg.to_fp8(x, 3.0), to_fp8_without_kernel(x, 3.0), strict=True):
        assert torch.equal(ours.float(), theirs.float())
    p = torch.linspace(-60, 60, 512).view(16, 32)  # tiny numbers, and those whose act saturates, too
    p8, one8 = saturated(p), saturated(torch.eye(32))
    act8, act8_t, leaky8_t = p8.new_empty(16, 32), p8.new_empty(32, 16), p8.new_empty(32, 16)
    tg.launch_mlp("act", one8, p8, act8_t, leaky8_t, act8)
    leaky = F.leaky_relu(p8.float(), 0.5)
    assert torch.equal(leaky8_t.T.float(), in_fp8(leaky))
    assert torch.equal(act8_t.T.float(), act8.float()) and torch.equal(act8.float(), in_fp8(leaky.square()))


def check_heads_and_exclusion():
    for T, H, K, E, R in ((37, 4, 2, 16, 8), (5, 2, 2, 32, 0), (64, 4, 1, 16, 16), (1, 1, 1, 8, 2)):
        assert_same(heads_case(T, H, K, E, R, torch.randn))
        assert_same(exclude_case(T, H, K, E, torch.randn))
    y, v = torch.ones(3, 2, 8), torch.zeros(3, 1, 8)
    assert torch.equal(tg.FusedExclude.apply(y, v), y), "a value of zero excludes nothing"


def check_entry():
    for T, D in ((37, 32), (3, 48), (64, 64), (1, 8)):
        for lanes in (False, True):
            assert_same(entry_case(T, D, torch.randn, lanes=lanes))
            assert_same(entry_case(T, D, torch.randn, skip=True, lanes=lanes))
            assert_same(entry_case(T, D, torch.randn, lanes=lanes), fixed=(1,))  # no gradient of x0 is wanted
    for count in (2, 3):  # later visits read neither x0 nor x, or x0 alone
        assert_same(first_outputs(entry_case(5, 16, torch.randn, skip=True), count))


def check_norm():
    for T, D in ((37, 32), (3, 48), (1, 8)):
        for lanes in (False, True):
            assert_same(norm_case(T, D, torch.randn, lanes))
    x = torch.full((1, 16), 1e-4)  # where eps matters
    torch.testing.assert_close(tg.FusedNorm.apply(x, None, x.dtype), tg.norm_of_sum(x, None, x.dtype))
    x = torch.randn(5, 16, requires_grad=True)
    n = tg.FusedNorm.apply(x, None, torch.bfloat16)
    torch.testing.assert_close(n, tg.norm_of_sum(x, None, torch.bfloat16))
    dx, = torch.autograd.grad(n, x, torch.randn(5, 16).bfloat16())
    assert not torch.equal(dx, dx.bfloat16().float()), "the embedding's gradient keeps its digits"


def check_lanes():
    for T, D in ((37, 32), (3, 48), (300, 64), (1, 8)):
        assert_same(lanes_case(T, D, torch.randn))


def check_loss():
    for T, D, V in ((5, 8, 64), (3, 16, 100)):
        assert_same(loss_case(T, D, V, torch.randn))
        assert_same(nll_case(T, V, torch.randn))


def state_of(adapters):
    return [t.detach() for t in (*adapters.tensors, *adapters.copies, *adapters.second_moments)]


def check_adaptation():
    """A round of adaptation by kernels has the losses, and leaves the adapters, of one without; a reset slot
    is as new.
    """
    cfg = tiny_config()
    model = tiny_model(cfg).requires_grad_(False)
    plan = tg.depth_plan(cfg, True)
    ends = tg.chunk_ends(cfg.ttt_eval_seq_len, cfg)
    tokens = np.random.default_rng(0).integers(4, cfg.vocab_size, 101)
    val = tg.Validation(tokens, np.ones(100), np.array([0, 60]), np.array([60, 40]), 0)
    this = tg.make_round(val, [tg.Turn(0, 0, 1), tg.Turn(2, 1, 0)], ends, cfg)
    found = []
    model.attn_scale.add_(0.5)
    for fused in (False, True):
        adapters = tg.Adapters(cfg, len(plan.visits), torch.device("cpu"), fused)
        new = [t.clone() for t in state_of(adapters)]
        replaced = mock.patch.multiple(tg, **dict.fromkeys(REPLACED))
        with replaced if fused else contextlib.nullcontext():
            for _ in range(2):  # with the second one's B no longer 0
                nll = tg.adapt(model, adapters, plan, tg.Backend(fused=fused), this)
        found.append([nll, *(t.clone() for t in state_of(adapters))])
        adapters.reset_slots([0])
        for now, old in zip(state_of(adapters), new, strict=True):
            assert torch.equal(now[:, 0], old[:, 0]) and not torch.equal(now[:, 2], old[:, 2])
        assert adapters.update_count.tolist() == [0, 0, 2]
    for plain, ours in zip(*found, strict=True):
        assert (ours - plain).norm() <= 3e-5 * plain.norm() and not torch.equal(ours, plain)
    assert (found[1][0] - found[0][0]).norm() <= 3e-6 * found[0][0].norm(), "the losses"


def check_model():
    """All kernels in their places: the looped model has the same losses and gradients with them.

    Gradients of tensors that are read twice are added up in passing, but of three: the embedding, the first
    skip to be merged, and the stream as it splits. With FP8 losses differ by less than 1 %, and most
    gradients by less than 8 %.
    """
    cfg = tiny_config()
    model = tiny_model(cfg)
    tokens = np.random.default_rng(0).integers(4, cfg.vocab_size, 49)
    batch = tg.make_batch(tokens[:-1], tokens[1:], np.array([0, 20, 48]), 3, 64)

    def losses_and_gradients(fused, fp8=False):
        model.zero_grad()
        nll = model(batch, tg.depth_plan(cfg, True), tg.Backend(fused=fused, fp8=fp8))
        (nll.sum() / (cfg.train_buffers * len(tokens))).backward()
        return [nll.detach(), *(p.grad for p in model.parameters())]

    plain = losses_and_gradients(False)
    with torch.profiler.profile(record_shapes=True) as profile:
        fused = losses_and_gradients(True)
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    stream = [len(tokens) - 1, cfg.model_dim]
    added = [event for event in profile.events()
             if event.name in ("aten::add", "aten::add_") and event.input_shapes[:2] == [stream] * 2]
    assert len(added) == 3, len(added)
    errors = [float((ours - theirs).norm() / theirs.norm())
              for ours, theirs in zip(losses_and_gradients(True, fp8=True), plain, strict=True)]
    assert 1e-5 < errors[0] < 0.01 and np.median(errors) < 0.08 and max(errors) < 0.4, errors


if __name__ == "__main__":
    torch.manual_seed(0)
    poison_new_memory()
    round_to_fp8_as_a_gpu_does()
    check_mlp()
    check_mlp_in_fp8()
    check_heads_and_exclusion()
    check_entry()
    check_norm()
    check_lanes()
    check_loss()
    check_adapter_adamw((3, 4, 8, 5), "cpu")
    check_adapter_adamw((1, 4, 300, 7), "cpu")
    check_adaptation()
    check_model()
    print("interpreted")
