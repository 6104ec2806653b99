"""The three implementations of attention agree; nothing crosses a span, nothing sees ahead."""
import sys

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import silent


def softmax_attention(q, k, v, bounds):
    """Causal attention within each span, written out token by token in the dtype of the arguments."""
    out = torch.empty_like(q)
    for lo, hi in zip(bounds[:-1], bounds[1:]):
        for t in range(lo, hi):
            logits = torch.einsum("he,she->hs", q[t], k[lo : t + 1]) / q.size(-1) ** 0.5
            out[t] = torch.einsum("hs,she->he", logits.softmax(-1), v[lo : t + 1])
    return out


def draw_qkv(T, dtype=torch.float64, device="cpu", heads=4, width=16):
    """q, k and v (T, heads, width), the same draw in every dtype."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(T, heads, width, generator=generator, dtype=torch.float64) for _ in "qkv"]
    return [draw.to(device, dtype) for draw in draws]


def spans_with(bounds, longest, device="cpu"):
    return tg.Spans(torch.tensor(bounds, dtype=torch.int32, device=device), None, longest)


@pytest.mark.parametrize("bounds", [
    [0, 40], [0, 1, 2, 40], [0, 8, 16, 24, 40], [0, 8, 16, 16, 17, 40, 40, 40], [0, 0, 40]])
def test_sdpa_is_softmax_attention_span_by_span(bounds):
    q, k, v = draw_qkv(40)
    ours = tg.sdpa_attention(q, k, v, spans_with(bounds, 40))
    torch.testing.assert_close(ours, softmax_attention(q, k, v, bounds))


def test_the_choice_is_explained():
    cpu = torch.device("cpu")
    assert tg.choose_attention("auto", cpu) is tg.choose_attention("sdpa", cpu) is tg.sdpa_attention
    with pytest.raises(tg.UserError, match="ATTENTION=varlen needs an Ampere"):
        tg.choose_attention("varlen", cpu)
    with pytest.raises(tg.UserError, match="flash_attn_interface|ATTENTION=flash3 needs a Hopper"):
        tg.choose_attention("flash3", cpu)


@pytest.mark.parametrize("parameters,expected", [
    ("is_causal", {"is_causal": True}), ("window_size, enable_gqa", {"window_size": (-1, 0)})])
def test_varlen_adapts_to_the_signature(monkeypatch, parameters, expected):
    """Once, where attention is chosen: torch.compile takes what was chosen as it is."""
    module = type(tg)("torch.nn.attention.varlen")
    exec(f"def varlen_attn(q, k, v, *bounds, {parameters}=0):\n    return q + k + v", module.__dict__)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    chosen = tg.choose_attention("auto", torch.device("cuda"))
    assert chosen.args == (expected,) and chosen.__name__ == "varlen_attention"
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    spans = spans_with([0, 4], 4)
    assert torch.equal(compiled(*torch.ones(3, 4, 2, 8), spans), torch.full((4, 2, 8), 3.0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash3", "varlen"])
@pytest.mark.parametrize("heads,width", [(4, 128), (8, 64)])
@pytest.mark.parametrize("spans", [1, 7, 150])
def test_gpu_implementations_are_as_exact_as_bf16_allows(name, spans, heads, width):
    """Output and gradients err by at most twice what SDPA itself does in bf16, against SDPA in fp32."""
    try:
        attend = tg.choose_attention(name, torch.device("cuda"))
    except tg.UserError as error:
        pytest.skip(str(error))
    T = 4096
    rng = np.random.default_rng(spans)
    inner = sorted(rng.choice(np.arange(1, T), spans - 1, replace=False).tolist())
    bounds = [0, *inner, T, T]  # the last span is empty
    out_grad = torch.randn(T, heads, width, device="cuda")

    def output_and_gradients(attend, dtype):
        leaves = [t.requires_grad_() for t in draw_qkv(T, dtype, "cuda", heads, width)]
        out = attend(*leaves, spans_with(bounds, T, "cuda"))
        out.backward(out_grad.to(dtype))
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    exact = output_and_gradients(tg.sdpa_attention, torch.float32)
    rounded = output_and_gradients(tg.sdpa_attention, torch.bfloat16)
    ours = output_and_gradients(attend, torch.bfloat16)
    for e, r, o in zip(exact, rounded, ours):
        assert (o - e).norm() <= 2 * (r - e).norm() + 1e-6 * e.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [True, False])
def test_captured_rounds_are_plain_rounds(monkeypatch, kernels):
    """All rounds of documents of any length are replays of CUDA graphs, and score as they do without."""
    cfg = tg.Config(
        num_layers=5, model_dim=256, num_heads=4, num_kv_heads=2, vocab_size=1024, loop_start=1, loop_end=2,
        parallel_start_layer=3, ttt_batch_size=4, ttt_eval_seq_len=256, ttt_chunk_size=16,
        ttt_chunk_growth=0.1, ttt_lora_rank=8, ttt_sites="qkv,attn,mlp,head", val_batch_tokens=8192)
    device = torch.device("cuda")
    model = tg.GPT(cfg).to(device).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    backend = tg.Backend.for_machine(cfg, device)
    backend = backend._replace(fused=backend.fused and kernels)
    run = tg.Run(cfg, tg.Ranks(device="cuda:0"), silent, backend)
    adapters = tg.Adapters(cfg, len(tg.depth_plan(cfg, True).visits), device, backend.fused)
    lengths = np.array([700, 3, 90, 256, 17, 40, 1, 333, 16])
    tokens = np.random.default_rng(0).integers(4, 1024, lengths.sum() + 1)
    val = tg.Validation(tokens, np.ones(len(tokens) - 1), np.cumsum(lengths) - lengths, lengths, 0)

    def score():
        return tg.score_documents(run, model, val, adapters, backend, float("inf"))

    tg.warm_up_adaptation(run, model, adapters, backend)
    assert sorted(adapters.graphs) == [*tg.round_sizes(cfg)]
    with monkeypatch.context() as patch:
        patch.setattr(tg, "adapt", None)  # a round that is no replay would call it
        replayed = [score(), score()]
    adapters.graphs.clear()
    plain = score()
    noise = (plain - score()).square().mean().sqrt()
    for scores in replayed:
        assert (scores - plain).square().mean().sqrt() <= max(3 * noise, 2e-3), (noise, scores)
    adapters.cfg = tg.dataclasses.replace(cfg, ttt_lora_lr=0.0)
    assert (score() - plain).abs().max() > 0.01, "there is something to learn"
