"""Without kernels compiled code fits batches of any length; with kernels nothing is compiled."""
import numpy as np
import torch
import torch.nn.functional as F

import train_gpt as tg
from conftest import compiled_graphs, tiny_config, tiny_model

CFG = tiny_config()  # every kind of visit: with and without skips, lanes and loops


def attend(q, k, v, spans):
    """Attention that torch.compile can trace; and not the one for CPUs, with which nothing is compiled."""
    index = torch.arange(q.size(0))
    span = torch.bucketize(index, spans.cu_seqlens, right=True)
    mask = (span[:, None] == span) & (index[:, None] >= index)
    heads = [t.transpose(0, 1) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)


def test_visits_are_compiled_for_two_lengths_at_most(monkeypatch):
    """As training has them without kernels, less the generation of code: no third length makes a graph."""
    torch._dynamo.reset()
    compile_part = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, **options: compile_part(
        part, backend="aot_eager", **options))
    backend = tg.Backend(attend=attend).compiled()
    model = tiny_model(CFG)
    graphs = []
    for length in (64, 40, 24, 33):
        tokens = np.random.default_rng(0).integers(4, 1024, length + 1)
        batch = tg.make_batch(tokens[:-1], tokens[1:], np.array([0, length]), 2, 64)
        nll = model(batch, tg.depth_plan(CFG, True), backend)
        nll.sum().backward()
        torch.testing.assert_close(nll, model(batch, tg.depth_plan(CFG, True)))
        graphs.append(compiled_graphs())
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


def test_with_kernels_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    for backend in (tg.Backend(attend=attend, fused=True, fp8=True), tg.Backend()):
        assert backend.compiled() is backend
