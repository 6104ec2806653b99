"""Compiled code fits whatever comes: after the warm-up of adaptation, no document makes another graph."""
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import train_gpt as tg
from conftest import silent, tiny_config, tiny_model

WHOLE = tiny_config(ttt_chunk_growth=0.0)  # every kind of visit: with and without skips, lanes and loops
ONE_VISIT = tiny_config(ttt_chunk_growth=0.0, num_layers=1, num_loops=0)
LENGTHS = 100, 7, 41, 1, 64, 130, 17, 90, 33  # of the documents that come after the warm-up
ROUNDS = 12  # of adaptation that are run


def stand_in(name, fake, grad=None):
    """An operator that allocates what the real one, which needs a GPU, would return, and computes nothing."""
    def save_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, dy):
        return *grad(dy, *ctx.saved_tensors), None

    def register(function):
        op = torch.library.custom_op(f"stand_in::{name}", function, mutates_args=())
        op.register_fake(fake)
        if grad:
            op.register_autograd(backward, setup_context=save_inputs)
        return op
    return register


@stand_in("attend_grad", lambda dy, q, k, v, bounds: tuple(map(torch.empty_like, (q, k, v))))
def attend_grad(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@stand_in("attend", lambda q, k, v, bounds: torch.empty_like(q), attend_grad)
def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    return torch.zeros_like(q)


@stand_in("grouped_grad", lambda dy, x, weights, ends: (torch.empty_like(x), torch.empty_like(weights)))
def grouped_grad(dy: Tensor, x: Tensor, weights: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.zeros_like(weights)


@stand_in("grouped", lambda x, weights, ends: x.new_empty(x.size(0), weights.size(2)), grouped_grad)
def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_zeros(len(x), weights.size(2))


real_compile = torch.compile


def compile_for_cpu(function, **options):
    """torch.compile, less the generation of code; checks what visits of a layer are given."""
    compiled = real_compile(function, backend="aot_eager", **options)

    def checked_visit(x, mlp_lane, x0, skip, *rest):
        given = [tensor for tensor in (x, x0, skip.x) if tensor is not None]
        assert not any(tensor._is_view() for tensor in given), "of a view, the compiler knows no size"
        assert len(set(map(id, given))) == len(given), "one operator may not get one tensor twice"
        return compiled(x, mlp_lane, x0, skip, *rest)

    return checked_visit if function is tg.visit_layer else compiled


def without_gpu(monkeypatch):
    """Let all of a compiled forward and backward pass run on a CPU, with stand-ins for kernels."""
    monkeypatch.setattr(torch, "compile", compile_for_cpu)
    monkeypatch.setattr(tg, "grouped_linear", lambda x, w, ends: grouped(x, w.contiguous(), ends))
    monkeypatch.setattr(tg, "launch_mlp",
                        lambda a, b, act=None: torch.zeros(len(a), b.size(0 if act is None else 1)))
    for launch in ("launch_heads", "launch_exclude", "launch_entry", "launch_join"):
        monkeypatch.setattr(tg, launch, lambda *args, **options: None)
    monkeypatch.setattr(tg, "PACK_MULTIPLE", 4)  # so that few rounds are alike


def graphs_of(monkeypatch, cfg, fused):
    """(graphs after the warm-up, those that the first round adds that adds any)"""
    torch._dynamo.reset()
    without_gpu(monkeypatch)
    backend = tg.Backend(attend=lambda q, k, v, spans: attend(q, k, v, spans.cu_seqlens), fused=fused)
    backend = backend.compiled()
    run = tg.Run(cfg, tg.Ranks(), silent, backend)
    plan = tg.depth_plan(cfg, cfg.loops_at_end)
    model = tiny_model(cfg).requires_grad_(False)
    adapters = tg.Adapters(cfg, len(plan.visits), torch.device("cpu"))
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
    warmed_up, added = graphs_of(monkeypatch, WHOLE, fused)
    assert warmed_up < 16 and added == 0


def test_code_for_one_length_is_caught(monkeypatch):
    monkeypatch.setattr(tg.Backend, "compiled",
                        lambda self: self._replace(visit=torch.compile(tg.visit_layer, dynamic=False)))
    _, added = graphs_of(monkeypatch, ONE_VISIT, fused=False)
    assert added > 0
