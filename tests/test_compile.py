"""Compiled code fits whatever comes: as many graphs after rehearsal as before, for documents of any length."""
import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import Tensor

import train_gpt as tg

CFG = tiny_config(ttt_chunk_growth=0.0)


def stand_in(name, fake, grad=None):
    """An operator that allocates what the real one, which needs a GPU, would return, and computes nothing."""
    def register(f):
        op = torch.library.custom_op(f"stand_in::{name}", f, mutates_args=())
        op.register_fake(fake)
        if grad:
            op.register_autograd(lambda ctx, dy: (*grad(dy, *ctx.saved_tensors), None),
                                 setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
        return op
    return register


@stand_in("attend_grad", lambda dy, q, k, v, cu: tuple(map(torch.empty_like, (q, k, v))))
def attend_grad(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@stand_in("attend", lambda q, k, v, cu: torch.empty_like(q), attend_grad)
def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    return torch.zeros_like(q)


@stand_in("grouped_grad", lambda dy, x, w, ends: (torch.empty_like(x), torch.empty_like(w)))
def grouped_grad(dy: Tensor, x: Tensor, w: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.zeros_like(w)


@stand_in("grouped", lambda x, w, ends: x.new_empty(x.size(0), w.size(2)), grouped_grad)
def grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_zeros(len(x), w.size(2))


def graphs_of(monkeypatch, fused):
    """Graphs after the rehearsal, and those that documents of many lengths add."""
    torch._dynamo.reset()
    compile_ = torch.compile

    def compile_for_cpu(f, **options):
        compiled = compile_(f, backend="aot_eager", **options)

        def call(x, lane, x0, *rest):  # of a view, the compiler knows no size; nor may one operator get one tensor twice
            given = [t for t in (x, x0, *rest[0][:1]) if isinstance(t, Tensor)] if f is tg.block else []
            assert len(set(map(id, given))) == len(given) and not any(t._is_view() for t in given)
            return compiled(x, lane, x0, *rest)

        return call if f is tg.block else compiled

    monkeypatch.setattr(torch, "compile", compile_for_cpu)
    monkeypatch.setattr(tg, "grouped_linear", lambda x, w, ends: grouped(x, w.contiguous(), ends))
    monkeypatch.setattr(tg, "launch_mlp", lambda a, b, act=None: torch.zeros(len(a), b.size(int(act is not None))))
    for launch in ("launch_heads", "launch_exclude", "launch_enter", "launch_join"):
        monkeypatch.setattr(tg, launch, lambda *args, **options: None)
    monkeypatch.setattr(tg, "PACK_MULTIPLE", 4)  # so that few rounds are alike
    ops = tg.Ops(attend=lambda q, k, v, seqs: attend(q, k, v, seqs.cu_seqlens), fused=fused).compiled(any_length=True)
    run = tg.Run(CFG, tg.Ranks(), lambda *a, **k: None, ops)
    model, adapters = tiny_model(CFG).requires_grad_(False), tg.Adapters(CFG, 9, torch.device("cpu"))
    before = tg.compiled_graphs()  # of all tests so far
    tg.rehearse(run, model, adapters, ops)
    rehearsed, lengths = tg.compiled_graphs(), (100, 7, 41, 1, 64, 130, 17, 90, 33)
    starts = np.cumsum((0, *lengths[:-1]))
    tokens = np.random.default_rng(0).integers(4, 1024, sum(lengths) + 1)
    val = tg.Validation(tokens, np.ones(len(tokens) - 1), starts, np.array(lengths), 0)
    for _, this, *_ in itertools.islice(tg.rounds(run, val), 12):
        tg.adapt(model, adapters, tg.depth_plan(CFG, True), ops, this)
    return rehearsed - before, tg.compiled_graphs() - rehearsed


@pytest.mark.parametrize("fused", [False, True])
def test_no_document_makes_a_graph(monkeypatch, fused):
    rehearsed, more = graphs_of(monkeypatch, fused)
    assert rehearsed < 16 and more == 0


def test_an_operator_that_fixes_its_length_is_caught(monkeypatch):
    """What len() of a tensor does where outputs are allocated for the compiler."""
    fixed = torch.library.custom_op("stand_in::heads_of_one_length", tg.fused_heads._init_fn, mutates_args=())
    fixed.register_fake(lambda qkv, gain, cos, sin, positions, K: tuple(
        qkv.new_empty(int(qkv.size(0)), n, qkv.size(1) // (len(gain) + 2 * K)) for n in (*[len(gain)] * 3, K)))
    fixed.register_autograd(lambda ctx, *grads: (*tg.fused_heads_grad(list(grads), *ctx.saved_tensors), *[None] * 4),
                            setup_context=tg.keep_tensors)
    monkeypatch.setattr(tg, "fused_heads", fixed)
    assert graphs_of(monkeypatch, True)[1] > 0
