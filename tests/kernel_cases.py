"""Every kernel beside the PyTorch that it replaces, with leaves to differentiate, for any number of tokens.

A case is (fused, reference, leaves): fused(*leaves) and reference(*leaves) return the same tensors.
`draw(*shape)` gives normal noise.
"""
import torch
import torch.nn.functional as F

import train_gpt as tg

NO_SKIP = (None, None, None)


def mlp_reference(x, a, up, down, depth):
    """What mlp_sublayer computes without kernels.

    (T, D), (T, D) or None, (M, D), (D, M), () -> the sum and the normed input, (T, D) both
    """
    y = x if a is None else x + a
    normed = (tg.norm(y) * depth).to(x.dtype)
    out = F.linear(tg.leaky_relu_squared(F.linear(normed, up)), down)
    return (out if a is None else y + out), normed


def mlp_case(T, D, M, draw, alone=False):
    """The MLP added to the stream, or `alone`, as a lane has it."""
    depth = torch.full((), 0.5, device=draw(1).device)
    weights = draw(M, D) / D**0.5, draw(D, M) / M**0.5
    if alone:
        return (lambda x, up, down: tg.FusedMLP.apply(x, None, up, down, depth),
                lambda x, up, down: mlp_reference(x, None, up, down, depth), (draw(T, D), *weights))
    return (lambda *leaves: tg.FusedMLP.apply(*leaves, depth),
            lambda *leaves: mlp_reference(*leaves, depth), (draw(T, D), draw(T, D), *weights))


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


def loss_case(T, D, V, draw):
    """Every third target is ignored."""
    targets = torch.arange(T) * 7919 % V
    targets = targets.where(torch.arange(T) % 3 != 1, tg.IGNORE).to(draw(1).device)
    return (lambda x, embed: tg.FusedLoss.apply(x, embed, targets, 30.0),
            lambda x, embed: tg.softcapped_nll(x @ embed.T, targets, 30.0), (draw(T, D), draw(V, D) / 4))
