"""One forward: order of layers, packing, causality, taps, normalised predictions."""
import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model

import train_gpt as tg

CFG = tiny_config()
PLAN = tg.depth_plan(CFG, True)


def batch_of(documents, max_spans=None, max_len=64):
    """Documents (lists of tokens) packed; every token's target is the next of its document, a BOS at the end."""
    tokens = np.concatenate(documents)
    targets = np.concatenate([np.append(d[1:], 1) for d in documents])
    bounds = np.cumsum([0] + [len(d) for d in documents])
    return tg.make_batch(tokens, targets, bounds, max_spans or len(documents), max_len)


def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [np.append(1, rng.integers(4, 1024, n - 1)) for n in lengths]


def test_record_plan_is_the_written_out_list():
    plan = tg.depth_plan(tg.Config(), True)
    assert plan.encoder == (0, 1, 2, 3, 4, 5, 3, 4) and plan.decoder == (5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert tg.depth_plan(tg.Config(), False) == tg.Plan((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))


@pytest.mark.parametrize("looped", [False, True])
def test_packing_changes_nothing(looped):
    model, plan, docs = tiny_model(CFG), tg.depth_plan(CFG, looped), documents(20, 1, 33, 7)
    alone = torch.cat([model(batch_of([d]), plan) for d in docs])
    torch.testing.assert_close(model(batch_of(docs), plan), alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(model(batch_of(docs, max_spans=9), plan), alone, rtol=0, atol=2e-5)


def test_no_prediction_sees_its_target_or_later_tokens():
    model, docs = tiny_model(CFG), documents(20, 30)
    before = model(batch_of(docs), PLAN)
    for t in (1, 10, 29):
        changed = [docs[0], np.append(docs[1][:t], documents(30 - t, seed=9)[0])]
        after = model(batch_of(changed), PLAN)
        torch.testing.assert_close(after[: 20 + t - 1], before[: 20 + t - 1], rtol=0, atol=1e-6)
        assert not torch.allclose(after[20 + t :], before[20 + t :], atol=1e-3), "the future did change"


def peeking(q, k, v, seqs):
    """A cheat: attention that is not causal."""
    return torch.cat([torch.nn.functional.scaled_dot_product_attention(
        *(t[lo:hi].transpose(0, 1) for t in (q, k, v)), enable_gqa=True).transpose(0, 1)
        for lo, hi in zip(seqs.cu_seqlens[:-1], seqs.cu_seqlens[1:]) if hi > lo])


def test_peeking_attention_is_caught():
    with pytest.raises(AssertionError):
        model, docs = tiny_model(CFG), documents(20, 30)
        ops = tg.Ops(attend=peeking)
        changed = [docs[0], np.append(docs[1][:10], documents(20, seed=9)[0])]
        before, after = (model(batch_of(d), PLAN, ops) for d in (docs, changed))
        torch.testing.assert_close(after[:29], before[:29], rtol=0, atol=1e-6)


def total_probability(model, ops=tg.Ops()):
    """Sum over the whole vocabulary of the probability of every possible target, at each position."""
    (document,) = documents(6)
    total = 0
    for candidate in range(CFG.vocab_size):
        batch = tg.make_batch(document, np.full(6, candidate), np.array([0, 6]), 1, 64)
        total = total + (-model(batch, PLAN, ops).double()).exp()
    return total


def test_probabilities_sum_to_one():
    model = tiny_model(CFG).requires_grad_(False)
    torch.testing.assert_close(total_probability(model), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_boost_of_the_realised_token_is_caught():
    def boosted(x, lane, embed, targets, see, ctx):
        return tg.head(x, lane, embed, targets, see, ctx) * 0.99
    total = total_probability(tiny_model(CFG).requires_grad_(False), tg.Ops(head=boosted))
    assert (total - 1).abs().max() > 1e-3


@pytest.mark.parametrize("looped", [False, True])
def test_every_parameter_gets_gradient(looped):
    model = tiny_model(CFG)
    model(batch_of(documents(20, 30)), tg.depth_plan(CFG, looped)).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.norm() > 0, name


def test_ignored_targets_cost_nothing():
    model, batch = tiny_model(CFG), batch_of(documents(20, 30))
    ignored = batch._replace(targets=torch.where(torch.arange(50) < 25, batch.targets, tg.IGNORE))
    nll = model(ignored, PLAN)
    assert torch.equal(nll[:25], model(batch, PLAN)[:25]) and (nll[25:] == 0).all()


def test_taps_see_every_site_of_every_visit():
    seen = []

    def tap(visit, layer):
        def see(site, x, y, scale=None):
            seen.append((visit, layer, site))
            return y
        return see

    model, batch = tiny_model(CFG), batch_of(documents(20))
    tapped = model(batch, PLAN, tap=tap)
    assert torch.equal(tapped, model(batch, PLAN))
    order = PLAN.encoder + PLAN.decoder
    sites = ["qkv", "o", "attn", "up", "down", "mlp"]
    assert seen == [(-1, -1, "start")] + [(v, i, s) for v, i in enumerate(order) for s in sites] + [(-1, -1, "head")]


def test_new_adapters_change_nothing_bitwise():
    model, batch = tiny_model(CFG), batch_of(documents(20, 30))
    adapters = tg.Adapters(tg.dataclasses.replace(CFG, ttt_batch_size=2), len(PLAN.encoder + PLAN.decoder), torch.device("cpu"))
    tap = adapters.tap(torch.tensor([20, 50], dtype=torch.int32))
    assert torch.equal(model(batch, PLAN, tap=tap), model(batch, PLAN))


@pytest.mark.parametrize("sites", [*tg.SITES, "qkv,head", "attn,mlp", "qkv,attn,mlp,head"])
def test_adapters_are_where_they_are_wanted(sites):
    """And nowhere else: each of them learns, and changes what the model says."""
    model, batch = tiny_model(CFG).requires_grad_(False), batch_of(documents(20, 30))
    cfg = tg.dataclasses.replace(CFG, ttt_batch_size=2, ttt_sites=sites)
    adapters = tg.Adapters(cfg, len(PLAN.encoder + PLAN.decoder), torch.device("cpu"))
    assert set(adapters.B) == {name for site in sites.split(",") for name in tg.SITES[site]}
    every = tg.Adapters(tiny_config(ttt_batch_size=2), len(PLAN.encoder + PLAN.decoder), torch.device("cpu"))
    assert all(torch.equal(draw, every.draw[name]) for name, draw in adapters.draw.items()), "whichever others there are"
    score = lambda: model(batch, PLAN, tap=adapters.tap(torch.tensor([20, 50], dtype=torch.int32)))
    before = score()
    adapters.learn(before.sum())
    assert all(B.abs().amax((1, 2, 3)).min() > 0 for B in adapters.B.values()) and not torch.equal(score(), before)


def test_statistics_are_those_of_inputs_and_gradients():
    model, batch, hessians, inputs, outputs = tiny_model(CFG), batch_of(documents(20, 30)), {}, {}, {}
    fishers = {"start": torch.zeros(CFG.vocab_size)}

    def spy(visit, layer):
        def see(site, x, y, scale=None):
            inputs.setdefault((layer, site), []).append(x.detach())
            if y.requires_grad:
                outputs.setdefault((layer, site), []).append(y)
                y.retain_grad()
            return y
        return see

    with torch.no_grad():
        model(batch, PLAN, tap=tg.calibration_tap(hessians, fishers))
        model(batch, PLAN, tap=spy)
    model(batch, PLAN, tap=tg.calibration_tap(hessians, fishers)).sum().backward()
    looked_up = dict(inputs)[-1, "start"][0]
    seen = {key: list(xs) for key, xs in inputs.items()}
    model(batch, PLAN, tap=spy).sum().backward()
    inputs = seen
    assert set(hessians) == {f"{i}.{s}" for i in range(5) for s in ("qkv", "o", "up", "down")} | {"embed"}
    for name, H in hessians.items():
        layer, site = (-1, "head") if name == "embed" else (int(name[0]), name[2:])
        x = torch.cat(inputs[layer, site])
        torch.testing.assert_close(H, x.T @ x, rtol=1e-4, atol=1e-4)
        gradients = torch.cat([y.grad for y in outputs[layer, site]])
        torch.testing.assert_close(fishers[name], gradients.square().sum(0), rtol=1e-4, atol=1e-6)
    by_row = torch.zeros(CFG.vocab_size).index_add_(0, looked_up, outputs[-1, "start"][0].grad.square().sum(1))
    torch.testing.assert_close(fishers["start"], by_row, rtol=1e-4, atol=1e-6)
    visits = {i: (PLAN.encoder + PLAN.decoder).count(i) for i in range(5)}
    assert visits[1] == 3 and len(inputs[1, "up"]) == 3, "a looped layer sums its visits"


def test_init_is_the_same_whatever_happened_before():
    a = tg.GPT(CFG)
    torch.manual_seed(99)
    torch.randn(7)
    b = tg.GPT(CFG)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.embed, tg.GPT(tiny_config(seed=5)).embed)
    batch = batch_of(documents(20))
    nll = a(batch, PLAN)
    assert abs(nll.mean() - np.log(1024)) < 0.5, "an untrained model knows nothing"


@pytest.mark.gpu
def test_compiled_forward_is_as_exact_as_bf16_allows():
    """Losses of the compiled record model on the GPU against fp32 on the CPU, next to what plain bf16 loses; no recompiling."""
    cfg = tg.Config(num_layers=5, loop_start=1, loop_end=2, parallel_start_layer=3, train_batch_tokens=16_384)
    model, plan = tiny_model(cfg, noise=0.02), tg.depth_plan(cfg, True)
    docs = documents(700, 1, 300, 47, 1000)
    batch = batch_of(docs, max_spans=8, max_len=2048)
    exact = model(batch, plan).detach()
    model, batch = model.cuda(), tg.to_device(batch, torch.device("cuda"))
    plain, fast = tg.Ops(attend=tg.choose_attention("varlen", batch.tokens.device)), tg.Ops.choose(cfg, batch.tokens.device)
    for ops in (fast.compiled(), fast.compiled(any_length=True)):
        base, ours = (model(batch, plan, o).detach().cpu() for o in (plain, ops))
        assert (ours - exact).norm() <= 2 * (base - exact).norm()
        model(batch, plan, ops).mean().backward()
        graphs = tg.compiled_graphs()
        shorter = tg.to_device(batch_of(docs[:2], max_spans=8, max_len=2048), batch.tokens.device)
        for p in (plan, tg.depth_plan(cfg, False)):
            model(batch, p, ops).mean().backward()
        assert tg.compiled_graphs() == graphs
        if ops.block is not fast.block and "any_length" in ops.block.__name__:
            model(shorter, plan, ops).mean().backward()
            assert tg.compiled_graphs() == graphs
