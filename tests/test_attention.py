"""The three implementations of attention agree; nothing crosses a span, nothing sees ahead."""
import numpy as np
import pytest
import torch

import train_gpt as tg


def naive(q, k, v, cu):
    """Softmax attention written out, in the dtype of its arguments."""
    out = torch.empty_like(q)
    for lo, hi in zip(cu[:-1], cu[1:]):
        for t in range(lo, hi):
            score = torch.einsum("he,she->hs", q[t], k[lo : t + 1]) / q.size(-1) ** 0.5
            out[t] = torch.einsum("hs,she->he", score.softmax(-1), v[lo : t + 1])
    return out


def inputs(T, dtype=torch.float64, device="cpu", heads=4, width=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, heads, width, generator=generator, dtype=torch.float64).to(device, dtype) for _ in "qkv"]


def seqs(bounds, longest, device="cpu"):
    return tg.Seqs(torch.tensor(bounds, dtype=torch.int32, device=device), None, longest)


@pytest.mark.parametrize("bounds", [[0, 40], [0, 1, 2, 40], [0, 8, 16, 24, 40], [0, 8, 16, 16, 17, 40, 40, 40], [0, 0, 40]])
def test_sdpa_is_softmax_attention_span_by_span(bounds):
    q, k, v = inputs(40)
    torch.testing.assert_close(tg.sdpa_attention(q, k, v, seqs(bounds, 40)), naive(q, k, v, bounds))


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
    module = type(tg)("torch.nn.attention.varlen")
    exec(f"def varlen_attn(q, k, v, {parameters}): pass", module.__dict__)
    monkeypatch.setattr(tg, "tool", lambda name: module)
    assert tg.varlen_options.__wrapped__() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash3", "varlen"])
@pytest.mark.parametrize("spans", [1, 7, 150])
def test_gpu_implementations_are_as_exact_as_bf16_allows(name, spans):
    """Output and gradients within twice the error that SDPA itself makes in bf16, against SDPA in fp32."""
    try:
        attend = tg.choose_attention(name, torch.device("cuda"))
    except tg.UserError as error:
        pytest.skip(str(error))
    T, rng = 4096, np.random.default_rng(spans)
    bounds = [0, *sorted(rng.choice(np.arange(1, T), spans - 1, replace=False).tolist()), T, T]
    weight = torch.randn(T, 8, 64, device="cuda")

    def run(attend, dtype):
        leaves = [t.requires_grad_() for t in inputs(T, dtype, "cuda", heads=8, width=64)]
        out = attend(*leaves, seqs(bounds, T, "cuda"))
        out.backward(weight.to(dtype))
        return [out.detach().double(), *(t.grad.double() for t in leaves)]

    exact, base, ours = run(tg.sdpa_attention, torch.float32), run(tg.sdpa_attention, torch.bfloat16), run(attend, torch.bfloat16)
    for e, b, o in zip(exact, base, ours):
        assert (o - e).norm() <= 2 * (b - e).norm() + 1e-6 * e.norm()


@pytest.mark.gpu
def test_recorded_rounds_are_plain_rounds(monkeypatch):
    """All rounds of documents of any length are replayed graphs, and score as they do without."""
    cfg = tg.Config(num_layers=5, model_dim=256, num_heads=4, num_kv_heads=2, vocab_size=1024, loop_start=1, loop_end=2,
                    parallel_start_layer=3, ttt_batch_size=4, ttt_eval_seq_len=256, ttt_chunk_size=16, ttt_chunk_growth=0.1,
                    ttt_lora_rank=8, ttt_sites="qkv,attn,mlp,head", val_batch_tokens=8192)
    device = torch.device("cuda")
    run = tg.Run(cfg, tg.Ranks(device="cuda:0"), lambda *a, **k: None, tg.Ops.choose(cfg, device))
    model = tg.GPT(cfg).to(device).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    adapters, ops = tg.Adapters(cfg, len(sum(tg.depth_plan(cfg, True), ())), device), run.ops.compiled(any_length=True)
    lengths = np.array([700, 3, 90, 256, 17, 40, 1, 333, 16])
    tokens = np.random.default_rng(0).integers(4, 1024, lengths.sum() + 1)
    val = tg.Validation(tokens, np.ones(len(tokens) - 1), np.cumsum(lengths) - lengths, lengths, 0)
    tg.rehearse(run, model, adapters, ops)
    assert sorted(adapters.recorded) == [*tg.round_sizes(cfg)]
    score = lambda: tg.score_documents(run, model, val, adapters, ops, float("inf"))
    original = tg.adapt
    monkeypatch.setattr(tg, "adapt", None)
    recorded = [score(), score()]
    monkeypatch.setattr(tg, "adapt", original)
    adapters.recorded.clear()
    plain, again = score(), score()
    noise = (plain - again).square().mean().sqrt()
    assert all((r - plain).square().mean().sqrt() <= max(3 * noise, 2e-3) for r in recorded), (noise, recorded)
    adapters.cfg = tg.dataclasses.replace(cfg, ttt_lora_lr=0.0)
    assert (score() - plain).abs().max() > 0.01, "there is something to learn"
