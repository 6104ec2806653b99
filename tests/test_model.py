"""One forward: order of layers, packing, causality, hooks, normalised predictions."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import SMALL_CFG, compiled_graphs, peeking_attention, silent, tiny_config, tiny_model
from kernel_cases import mlp_reference, saturated, to_fp8_without_kernel

pytestmark = pytest.mark.check

CFG = tiny_config()
PLAN = tg.depth_plan(CFG, True)
CPU = torch.device("cpu")


def pack(documents, max_spans=None, max_len=64):
    """Documents as one batch. Every token's target is the next one of its document, a BOS at the end."""
    tokens = np.concatenate(documents)
    targets = np.concatenate([np.append(document[1:], 1) for document in documents])
    bounds = np.cumsum([0] + [len(document) for document in documents])
    return tg.make_batch(tokens, targets, bounds, max_spans or len(documents), max_len)


def draw_documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [np.append(1, rng.integers(4, 1024, length - 1)) for length in lengths]


def with_other_tail(document, cut):
    """The document with other tokens from `cut` on."""
    (other,) = draw_documents(len(document) - cut, seed=9)
    return np.append(document[:cut], other)


# ---- Order, packing, causality -----------------------------------------------------------------------------


def test_record_plan_is_the_written_out_list():
    plan = tg.depth_plan(tg.Config(), True)
    assert plan.encoder == (0, 1, 2, 3, 4, 5, 3, 4) and plan.decoder == (5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert tg.depth_plan(tg.Config(), False) == tg.Plan((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))


@pytest.mark.parametrize("looped", [False, True])
def test_packing_changes_nothing(looped):
    model = tiny_model(CFG)
    plan = tg.depth_plan(CFG, looped)
    documents = draw_documents(20, 1, 33, 7)
    alone = torch.cat([model(pack([document]), plan) for document in documents])
    torch.testing.assert_close(model(pack(documents), plan), alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(model(pack(documents, max_spans=9), plan), alone, rtol=0, atol=2e-5)


def test_layers_have_their_weights_in_fp8_for_training_alone(monkeypatch):
    monkeypatch.setattr(tg, "to_fp8", to_fp8_without_kernel)
    model = tiny_model(CFG)
    run = tg.Run(CFG, tg.Ranks(), silent, tg.Backend(fused=True))
    training = tg.Trainer(run, model, loader=None).backend
    assert training.fp8 and not run.backend.fp8
    assert not tg.Trainer(run._replace(backend=tg.Backend()), model, loader=None).backend.fp8
    with torch.no_grad():
        model.down_bank[1, 0, :2] = torch.tensor([10.0, -10.0])  # 640 once multiplied by 64, over 448
    for i, layer in enumerate(model.layers(torch.bfloat16, training)):
        up, up_t, down, down_t = layer.fp8
        assert torch.equal(up, saturated(64 * model.up_bank[i].bfloat16()))
        scaled_down = model.down_bank[i] * model.mlp_scale[i][:, None]
        assert torch.equal(down, saturated(64 * scaled_down.bfloat16()))
        assert torch.equal(up_t, up.T) and torch.equal(down_t, down.T)
        assert not any(w8.requires_grad for w8 in layer.fp8)
    assert all(layer.fp8 == () for layer in model.layers(torch.bfloat16, run.backend))


def test_training_alone_computes_in_fp8(monkeypatch):
    """The plain score and adaptation do not, though they use the MLP's kernels; PyTorch stands for all."""
    in_fp8 = []

    def mlp(x, a, up, down, depth, fp8, grad_scale):
        assert grad_scale == tg.FP8_GRAD_SCALE * CFG.train_buffers * len(x), "what the loss is divided by"
        in_fp8.append(bool(fp8))
        return mlp_reference(x, a, up, down, depth)

    monkeypatch.setattr(tg, "to_fp8", to_fp8_without_kernel)
    monkeypatch.setattr(tg, "fused_mix_lanes", tg.mix_lanes)
    for name, apply in (("FusedMLP", mlp), ("FusedHeads", tg.split_heads), ("FusedExclude", tg.exclude_self),
                        ("FusedEntry", tg.mix_and_norm), ("FusedNorm", tg.norm_of_sum),
                        ("FusedNLL", tg.softcapped_nll),
                        ("FusedLoss", lambda x, w, *rest: tg.softcapped_nll(x @ w.T, *rest))):
        monkeypatch.setattr(tg, name, SimpleNamespace(apply=apply))
    run = tg.Run(CFG, tg.Ranks(), silent, tg.Backend(fused=True))
    model = tiny_model(CFG)
    tokens = np.concatenate(draw_documents(40, 30))
    val = tg.Validation(tokens, np.ones(69), np.array([0, 40]), np.array([40, 29]), 0)
    tg.Trainer(run, model, loader=None).learn(PLAN, pack(draw_documents(40, 30)))
    assert in_fp8 and all(in_fp8)
    in_fp8.clear()
    tg.evaluate(run, model, val, PLAN)
    adapters = tg.Adapters(CFG, len(PLAN.visits), CPU)
    tg.score_documents(run, model.requires_grad_(False), val, adapters, run.backend, float("inf"))
    assert len(in_fp8) > 2 * len(PLAN.visits) and not any(in_fp8)


@pytest.mark.parametrize("widths", [dict(mlp_mult=3.015625), dict(model_dim=520, num_heads=5, num_kv_heads=5),
                                    dict(ttt_lora_rank=12)])
def test_widths_that_a_gpu_cannot_read_are_refused(widths):
    """FP8 needs multiples of 16 of what its factors' rows are: 1544 and 520 are of 8."""
    with pytest.raises(tg.UserError, match="a GPU needs multiples of 8, and of 16"):
        tg.Backend.for_machine(tg.Config(**widths), torch.device("cuda"))


def test_no_prediction_sees_its_target_or_later_tokens():
    model = tiny_model(CFG)
    first, second = draw_documents(20, 30)
    before = model(pack([first, second]), PLAN)
    for cut in (1, 10, 29):
        after = model(pack([first, with_other_tail(second, cut)]), PLAN)
        unchanged = 20 + cut - 1
        torch.testing.assert_close(after[:unchanged], before[:unchanged], rtol=0, atol=1e-6)
        assert not torch.allclose(after[20 + cut :], before[20 + cut :], atol=1e-3), "the future did change"


def test_peeking_attention_is_caught():
    model = tiny_model(CFG)
    peeking = tg.Backend(attend=peeking_attention)
    first, second = draw_documents(20, 30)
    before = model(pack([first, second]), PLAN, peeking)
    after = model(pack([first, with_other_tail(second, 10)]), PLAN, peeking)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(after[:29], before[:29], rtol=0, atol=1e-6)


# ---- Predictions -------------------------------------------------------------------------------------------


def total_probability(model, backend=tg.Backend()):
    """Sum over the whole vocabulary of the probability of every possible target, at each of six positions."""
    (document,) = draw_documents(6)
    copies = CFG.vocab_size  # of the document; the targets of copy n are all n
    tokens = np.tile(document, copies)
    targets = np.repeat(np.arange(copies), len(document))
    bounds = len(document) * np.arange(copies + 1)
    nll = model(tg.make_batch(tokens, targets, bounds, copies, 64), PLAN, backend)
    return (-nll.double()).exp().view(copies, len(document)).sum(0)


def test_probabilities_sum_to_one():
    model = tiny_model(CFG).requires_grad_(False)
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(total_probability(model), ones, rtol=0, atol=1e-5)


def test_a_boost_of_the_realised_token_is_caught():
    def boosted(*args):
        return tg.loss_head(*args) * 0.99

    total = total_probability(tiny_model(CFG).requires_grad_(False), tg.Backend(head=boosted))
    assert (total - 1).abs().max() > 1e-3


def test_ignored_targets_cost_nothing():
    model = tiny_model(CFG)
    batch = pack(draw_documents(20, 30))
    second_half = torch.arange(50) >= 25
    nll = model(batch._replace(targets=batch.targets.masked_fill(second_half, tg.IGNORE)), PLAN)
    assert torch.equal(nll[:25], model(batch, PLAN)[:25]) and (nll[25:] == 0).all()


def test_init_is_the_same_whatever_happened_before():
    model = tg.GPT(CFG)
    torch.manual_seed(99)
    torch.randn(7)
    again = tg.GPT(CFG)
    for weight, same in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(weight, same)
    assert not torch.equal(model.embed, tg.GPT(tiny_config(seed=5)).embed)
    nll = model(pack(draw_documents(20)), PLAN)
    assert abs(nll.mean() - np.log(1024)) < 0.5, "an untrained model knows nothing"


@pytest.mark.parametrize("looped", [False, True])
def test_every_parameter_gets_gradient(looped):
    model = tiny_model(CFG)
    model(pack(draw_documents(20, 30)), tg.depth_plan(CFG, looped)).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.norm() > 0, name


# ---- Hooks -------------------------------------------------------------------------------------------------


def test_hooks_see_every_site_of_every_visit():
    seen = []

    def hooks(visit, layer):
        def hook(site, x, y, scale=None):
            seen.append((visit, layer, site))
            return y
        return hook

    model = tiny_model(CFG)
    batch = pack(draw_documents(20))
    watched = model(batch, PLAN, hooks=hooks)
    assert torch.equal(watched, model(batch, PLAN))
    sites = "qkv", "o", "attn", "up", "down", "mlp"
    of_layers = [(visit, layer, site) for visit, layer in enumerate(PLAN.visits) for site in sites]
    assert seen == [(-1, -1, "start"), *of_layers, (-1, -1, "head")]


def adapters_for_two(**settings):
    """Adapters for two documents, of 20 and 30 tokens that all predict, and what gives their hooks."""
    cfg = tg.dataclasses.replace(CFG, ttt_batch_size=2, **settings)
    adapters = tg.Adapters(cfg, len(PLAN.visits), CPU)
    ends = torch.tensor([20, 50], dtype=torch.int32)
    return adapters, lambda: adapters.hooks(ends, ends)


@pytest.mark.parametrize("site, names", tg.ADAPTER_SITES.items())
def test_what_adapters_add_has_the_residual_scale(site, names):
    generator = torch.Generator().manual_seed(0)
    x, y, A, *Bs = (torch.randn(shape, generator=generator) for shape in (
        (5, 8), (5, 6 * len(names)), (1, 3 * len(names), 8), *[(1, 6, 3)] * len(names)))
    hook = tg.AdapterHook({site: A}, dict(zip(names, Bs)), torch.tensor([5], dtype=torch.int32), False)
    added = [x @ rows.T @ B[0].T for rows, B in zip(A[0].chunk(len(names)), Bs)]
    scale = torch.arange(1.0, 7.0) if site in ("attn", "mlp") else None
    expected = y + torch.cat(added, 1) * (1.0 if scale is None else scale)
    torch.testing.assert_close(hook(site, x, y, scale), expected)


def test_new_adapters_change_nothing_bitwise():
    model = tiny_model(CFG)
    batch = pack(draw_documents(20, 30))
    _, hooks = adapters_for_two()
    assert torch.equal(model(batch, PLAN, hooks=hooks()), model(batch, PLAN))


@pytest.mark.parametrize("sites", [*tg.ADAPTER_SITES, "qkv,head", "attn,mlp", "qkv,attn,mlp,head"])
def test_adapters_are_where_they_are_wanted(sites):
    """And nowhere else: each of them learns, and changes what the model says."""
    adapters, hooks = adapters_for_two(ttt_sites=sites)
    assert set(adapters.B) == {name for site in sites.split(",") for name in tg.ADAPTER_SITES[site]}
    everywhere, _ = adapters_for_two()
    for site, draw in adapters.initial_A.items():
        assert torch.equal(draw, everywhere.initial_A[site]), "the same, whichever others there are"
    model = tiny_model(CFG).requires_grad_(False)
    batch = pack(draw_documents(20, 30))
    before = model(batch, PLAN, hooks=hooks())
    adapters.learn(before.sum(), torch.ones(2))
    for B in adapters.B.values():
        assert B.abs().amax((1, 2, 3)).min() > 0, "those of every visit learn"
    assert not torch.equal(model(batch, PLAN, hooks=hooks()), before)


def inputs_and_outputs(model, batch):
    """What hooks see in a forward pass: lists of inputs and of outputs, of every visit, by (layer, site)."""
    inputs, outputs = {}, {}

    def hooks(visit, layer):
        def hook(site, x, y, scale=None):
            inputs.setdefault((layer, site), []).append(x.detach())
            outputs.setdefault((layer, site), []).append(y)
            y.retain_grad()
            return y
        return hook

    model(batch, PLAN, hooks=hooks).sum().backward()
    return inputs, outputs


def test_statistics_are_those_of_inputs_and_gradients():
    model = tiny_model(CFG)
    batch = pack(draw_documents(20, 30))
    sums = tg.Calibration({}, {"start": torch.zeros(CFG.vocab_size)})
    with torch.no_grad():
        model(batch, PLAN, hooks=sums.hooks)
    model(batch, PLAN, hooks=sums.hooks).sum().backward()
    hessians, fishers = sums
    inputs, outputs = inputs_and_outputs(model, batch)

    matrices = {f"{layer}.{site}" for layer in range(5) for site in ("qkv", "o", "up", "down")}
    assert set(hessians) == matrices | {"embed"}
    for name, H in hessians.items():
        layer, _, site = name.rpartition(".")
        key = (int(layer), site) if layer else (-1, "head")
        x = torch.cat(inputs[key])
        torch.testing.assert_close(H, x.T @ x, rtol=1e-4, atol=1e-4)
        gradients = torch.cat([y.grad for y in outputs[key]])
        expected = gradients.square().sum(0) if site == "embed" else gradients.T @ gradients
        torch.testing.assert_close(fishers[name], expected, rtol=1e-4, atol=1e-6)
    (tokens,), (embedded,) = inputs[-1, "start"], outputs[-1, "start"]
    by_row = torch.zeros(CFG.vocab_size).index_add_(0, tokens, embedded.grad.square().sum(1))
    torch.testing.assert_close(fishers["start"], by_row, rtol=1e-4, atol=1e-6)
    assert PLAN.visits.count(1) == len(inputs[1, "up"]) == 3, "a looped layer sums its visits"


# ---- Compiled ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_compiled_forward_is_as_exact_as_bf16_allows():
    """Losses on the GPU err by at most twice what plain bf16 does, and no graph is compiled again."""
    cfg = SMALL_CFG
    looped, unlooped = tg.depth_plan(cfg, True), tg.depth_plan(cfg, False)
    gpu = torch.device("cuda")
    model = tiny_model(cfg, noise=0.02)
    documents = draw_documents(700, 1, 300, 47, 1000)
    batch = pack(documents, max_spans=8, max_len=2048)
    shorter, shortest = (tg.to_device(pack(documents[:n], max_spans=8, max_len=2048), gpu) for n in (3, 2))
    exact = model(batch, looped).detach()
    model = model.cuda()
    batch = tg.to_device(batch, gpu)
    plain = tg.Backend(attend=tg.choose_attention("varlen", gpu))
    base = model(batch, looped, plain).detach().cpu()
    fastest = tg.Backend.for_machine(cfg, gpu)
    for fused in sorted({False, fastest.fused}):
        backend = fastest._replace(fused=fused).compiled()
        ours = model(batch, looped, backend).detach().cpu()
        assert (ours - exact).norm() <= 2 * (base - exact).norm()
        for seen in (batch, shorter):
            model(seen, looped, backend).mean().backward()
            graphs = compiled_graphs()
            for plan in (looped, unlooped):
                model(seen, plan, backend).mean().backward()
            assert compiled_graphs() == graphs
        model(shortest, looped, backend).mean().backward()
        assert compiled_graphs() == graphs, "for any length"
