"""Compiled code fits whatever comes: after the warm-up of adaptation, no document makes another graph."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as tg
from conftest import silent, tiny_config, tiny_model

CFG = tiny_config(ttt_chunk_growth=0.0)  # every kind of visit: with and without skips, lanes and loops
LENGTHS = 100, 7, 41, 1, 64, 130, 17, 90, 33  # of the documents that come after the warm-up
ROUNDS = 12  # of adaptation that are run


def attend(q, k, v, spans):
    """Attention that torch.compile can trace; and not the one for CPUs, with which nothing is compiled."""
    index = torch.arange(q.size(0))
    span = torch.bucketize(index, spans.cu_seqlens, right=True)
    mask = (span[:, None] == span) & (index[:, None] >= index)
    heads = [t.transpose(0, 1) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)


real_compile = torch.compile


def compile_for_cpu(function, **options):
    """torch.compile, less the generation of code."""
    return real_compile(function, backend="aot_eager", **options)


def without_gpu(monkeypatch):
    """Let all of a compiled forward and backward pass run on a CPU; kernels compute nothing."""
    monkeypatch.setattr(torch, "compile", compile_for_cpu)
    for launch in ("launch_mlp", "launch_heads", "launch_exclude", "launch_entry", "launch_join"):
        monkeypatch.setattr(tg, launch, lambda *args, **options: None)
    monkeypatch.setattr(tg, "PACK_MULTIPLE", 4)  # so that few rounds are alike


def test_whole_visits_are_compiled_for_two_lengths_at_most(monkeypatch):
    """As training and plain scores without kernels compile them: no third length makes a graph."""
    torch._dynamo.reset()
    without_gpu(monkeypatch)
    backend = tg.Backend(attend=attend).compiled()
    model = tiny_model(CFG)
    graphs = []
    for length in (64, 40, 24, 33):
        tokens = np.random.default_rng(0).integers(4, 1024, length + 1)
        batch = tg.make_batch(tokens[:-1], tokens[1:], np.array([0, length]), 2, 64)
        nll = model(batch, tg.depth_plan(CFG, True), backend)
        nll.sum().backward()
        torch.testing.assert_close(nll, model(batch, tg.depth_plan(CFG, True)))
        graphs.append(tg.compiled_graphs())
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


def test_weights_are_cast_to_fp8_in_one_graph(monkeypatch):
    without_gpu(monkeypatch)
    model = tiny_model(CFG)
    backend = tg.Backend(attend=attend, fused=True, fp8=True)
    compiled, plain = (model.layers(torch.bfloat16, b) for b in (backend.compiled(), backend))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert len(ours.fp8) == 4 and all(map(torch.equal, ours.fp8, theirs.fp8))


def graphs_of(monkeypatch, fused):
    """(graphs after the warm-up, those that the first round adds that adds any)"""
    torch._dynamo.reset()
    without_gpu(monkeypatch)
    backend = tg.Backend(attend=attend, fused=fused).compiled(hooked=True)
    run = tg.Run(CFG, tg.Ranks(), silent, backend)
    plan = tg.depth_plan(CFG, CFG.loops_at_end)
    model = tiny_model(CFG).requires_grad_(False)
    adapters = tg.Adapters(CFG, len(plan.visits), torch.device("cpu"))
    adapters.compile()
    lengths = np.array(LENGTHS)
    tokens = np.random.default_rng(0).integers(4, 1024, sum(lengths) + 1)
    val = tg.Validation(tokens, np.ones(len(tokens) - 1), np.cumsum(lengths) - lengths, lengths, 0)

    before = tg.compiled_graphs()  # of all tests so far
    tg.warm_up_adaptation(run, model, adapters, backend)
    warmed_up = tg.compiled_graphs()
    for this in itertools.islice(tg.rank_rounds(run, val), ROUNDS):
        tg.adapt(model, adapters, plan, backend, this)
        if tg.compiled_graphs() > warmed_up:
            break
    return warmed_up - before, tg.compiled_graphs() - warmed_up


@pytest.mark.parametrize("fused", [False, True])
def test_no_document_makes_a_graph(monkeypatch, fused):
    warmed_up, added = graphs_of(monkeypatch, fused)
    assert 0 < warmed_up < 16 and added == 0


def test_code_for_one_length_is_caught(monkeypatch):
    monkeypatch.setattr(tg.Backend, "compiled", lambda self, hooked: self._replace(
        mix_lanes=torch.compile(tg.mix_lanes, dynamic=False)))
    _, added = graphs_of(monkeypatch, fused=False)
    assert added > 0
