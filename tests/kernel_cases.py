"""Every kernel beside the PyTorch that it replaces, with leaves to differentiate, for any number of tokens.

A case is (fused, reference, leaves): fused(*leaves) and reference(*leaves) return the same tensors.
`draw(*shape)` gives normal noise.
"""
import torch
import torch.nn.functional as F

import train_gpt as tg

NO_SKIP = (None, None, None)
GRAD_SCALE = 16.0  # of gradients on their way to FP8


def saturated(x):
    """x in FP8; what is too large becomes 448."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def in_fp8(x):
    """What FP8 leaves of x, fp32."""
    return saturated(x).float()


def to_fp8_without_kernel(x, scale: float = 1.0):
    """What tg.to_fp8 computes."""
    return saturated(scale * x), saturated(scale * x.T)


class FP8MLP(torch.autograd.Function):
    """f(n up.T) down.T with every factor of every product in FP8, and the gradients of n, up and down."""

    @staticmethod
    def forward(ctx, n, up, down, up8, down8):
        n8 = in_fp8(n.float())
        leaky = F.leaky_relu(n8 @ up8.T, 0.5)
        act8 = in_fp8(leaky.square())
        ctx.save_for_backward(n8, in_fp8(leaky), act8, up8, down8)
        return (act8 @ down8.T).to(n.dtype)

    @staticmethod
    def backward(ctx, grad):
        n8, leaky8, act8, up8, down8 = ctx.saved_tensors
        grad8 = in_fp8(GRAD_SCALE * grad.float())
        dp8 = in_fp8(grad8 @ down8 * leaky8 * torch.where(leaky8 > 0, 2, 1))
        grads = dp8 @ up8, dp8.T @ n8, grad8.T @ act8
        return *((g / GRAD_SCALE).to(grad.dtype) for g in grads), None, None


def weights8(up, down):
    """Layer.fp8 of the weights of one layer."""
    ones = up.new_ones(1, len(down))
    others = up.new_zeros(2, len(down), len(down)), up.new_zeros(2, 8, len(down))
    dtype = tg.compute_dtype(up.device)
    _, stacks8 = tg.cast_banks(*others, up[None], down[None], ones, ones, dtype, True)
    return tuple(stack8[0] for stack8 in stacks8)


def mlp_reference(x, a, up, down, depth, fp8=()):
    """What mlp_sublayer computes without kernels, or in training with them.

    (T, D), (T, D) or None, (M, D), (D, M), () -> the sum, the normed input and, if it is all there is, x
    """
    y = x if a is None else x + a
    normed = (tg.norm(y) * depth).to(x.dtype)
    if fp8:
        up8, _, down8, _ = (w8.float() / 64 for w8 in fp8)
        out = FP8MLP.apply(normed, up, down, up8, down8)
    else:
        out = F.linear(tg.leaky_relu_squared(F.linear(normed, up)), down)
    return (out, normed, x) if a is None else (y + out, normed, None)


def mlp_case(T, D, M, draw, alone=False, training=False):
    """The MLP added to the stream, or `alone`, as a lane has it; as training has it, in FP8."""
    depth = torch.full((), 0.5, device=draw(1).device)
    weights = draw(M, D) / D**0.5, draw(D, M) / M**0.5
    fp8 = weights8(*weights) if training else ()

    def fused(x, a, up, down):
        return tg.FusedMLP.apply(x, a, up, down, depth, fp8, GRAD_SCALE)[: 2 + alone]

    def reference(x, a, up, down):
        return mlp_reference(x, a, up, down, depth, fp8)[: 2 + alone]

    if alone:
        return (lambda x, *weights: fused(x, None, *weights),
                lambda x, *weights: reference(x, None, *weights), (draw(T, D), *weights))
    return fused, reference, (draw(T, D), draw(T, D), *weights)


def heads_case(T, H, K, E, R, draw):
    """R rotated dimensions; positions in a table of 64."""
    rope = draw(64, 1, R // 2), draw(64, 1, R // 2), torch.arange(T, device=draw(1).device) % 64
    return (lambda qkv, gain: tg.FusedHeads.apply(qkv, gain, *rope, K),
            lambda qkv, gain: tg.split_heads(qkv, gain, *rope, K),
            (draw(T, (H + 2 * K) * E), 5 * draw(H).abs()))


def exclude_case(T, H, K, E, draw):
    return tg.FusedExclude.apply, tg.exclude_self, (draw(T, H, E), draw(T, K, E))


def entry_case(T, D, draw, skip=False, lanes=False):
    """With or without a skip to merge; the stream as one of two lanes, or alone."""
    depth = torch.full((), 0.5, device=draw(1).device)
    leaves = draw(T, D), draw(T, D), draw(2, D)
    merged = (draw(T, D), draw(D), draw(D)) if skip else ()

    def entry(function):
        return lambda x, x0, mix, *rest: function(x, x0, mix, depth, lanes, *(rest or NO_SKIP))

    return entry(tg.FusedEntry.apply), entry(tg.mix_and_norm), (*leaves, *merged)


def norm_case(T, D, draw, lanes=False):
    """Of the embedding or, with lanes, of their sum."""
    leaves = [draw(T, D) for _ in range(1 + lanes)]

    def norm(function):
        return lambda x, a=None: function(x, a, x.dtype)

    return norm(tg.FusedNorm.apply), norm(tg.norm_of_sum), leaves


def lanes_case(T, D, draw):
    return tg.fused_mix_lanes, tg.mix_lanes, (*(draw(T, D) for _ in range(4)), draw(2), draw(2, 2))


def targets_for(T, V, device):
    """Every third one is ignored."""
    targets = torch.arange(T) * 7919 % V
    return targets.where(torch.arange(T) % 3 != 1, tg.IGNORE).to(device)


def loss_case(T, D, V, draw):
    targets = targets_for(T, V, draw(1).device)
    return (lambda x, embed: tg.FusedLoss.apply(x, embed, targets, 30.0),
            lambda x, embed: tg.softcapped_nll(x @ embed.T, targets, 30.0), (draw(T, D), draw(V, D) / 4))


def nll_case(T, V, draw):
    """Logits that come from somewhere, as the kernel writes over them."""
    targets = targets_for(T, V, draw(1).device)
    return (lambda x: tg.FusedNLL.apply(2 * x, targets, 30.0),
            lambda x: tg.softcapped_nll(2 * x, targets, 30.0), (draw(T, V),))


def check_adapter_adamw(shape, device):
    """The kernel against PyTorch. Two of four slots have no turn, and keep every bit, whatever the gradients.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator).to(device)

    tensor, moment, grad = (draw(*shape) - 0.5, draw(*shape), (draw(*shape) - 0.5).bfloat16())
    grad[:, 1] = torch.nan
    has_turn = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)[:, None, None]
    numbers = 0.1 + draw(4, 1, 1), 0.1 * has_turn, 1 - 0.01 * has_turn, 0.02
    before = tensor, tensor.bfloat16(), grad, moment
    ours, theirs = ([t.clone() for t in before] for _ in range(2))
    ours[2] = ours[2].mT.contiguous().mT
    tg.launch_adapter_adamw(*ours, *numbers)
    tg.adapter_adamw_(*theirs, *numbers)
    for our, their, old in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(our, their, equal_nan=True)
        if old is not grad:
            assert torch.equal(our[:, 1::2], old[:, 1::2]) and not torch.equal(our[:, 0::2], old[:, 0::2])
