"""Muon, AdamW, clipping, averaging, and what warm-up leaves behind (nothing)."""
import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from conftest import launch, tiny_config, tiny_model

import train_gpt as tg

CFG = tiny_config()


def batch(seed=0, T=128):
    stream = np.random.default_rng(seed).integers(2, 1024, T + 1)
    return tg.make_batch(stream[:-1], stream[1:], np.arange(0, T + 1, 64), T // 64, 64)


def test_singular_values_come_into_the_band():
    torch.manual_seed(0)
    for shape in ((4, 32, 32), (2, 64, 16), (2, 16, 64)):
        values = torch.linalg.svdvals(tg.orthogonalize(torch.randn(shape), 5))
        assert values.min() > 0.3 and values.max() < 1.3
    assert torch.linalg.svdvals(tg.orthogonalize(torch.randn(4, 32, 32), 1)).min() < 0.1, "steps matter"


def test_every_parameter_has_exactly_one_optimizer():
    model = tiny_model(CFG)
    optimizers = tg.Optimizers(model, tg.Ranks(), CFG)
    owned = [p for group in optimizers.groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="extra"):
        tg.Optimizers(model, tg.Ranks(), CFG)


def test_learning_rates_and_decays_go_where_they_belong():
    optimizers = tg.Optimizers(tiny_model(CFG), tg.Ranks(), CFG)
    by_lr = [(g["lr"], g["weight_decay"]) for g in optimizers.groups]
    assert by_lr == [(CFG.matrix_lr, CFG.muon_wd), (CFG.tied_embed_lr, CFG.embed_wd), (CFG.scalar_lr, CFG.adam_wd)]


def test_adamw_is_torchs_own_and_clipping_is_global():
    model, cfg = tiny_model(CFG), tg.dataclasses.replace(CFG, grad_clip_norm=0.05)
    twin = copy.deepcopy(model)
    optimizers = tg.Optimizers(model, tg.Ranks(), cfg)
    names = tg.Optimizers.EMBED + tg.Optimizers.SCALARS
    of = lambda m, names: [dict(m.named_parameters())[n] for n in names]
    reference = torch.optim.AdamW([dict(params=of(twin, tg.Optimizers.EMBED), lr=cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
                                   dict(params=of(twin, tg.Optimizers.SCALARS), lr=cfg.scalar_lr, weight_decay=cfg.adam_wd)],
                                  betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)
    for step in range(3):
        for m in (model, twin):
            m(batch(step), tg.depth_plan(cfg, True)).mean().backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05, "clipping does something"
        for g, peak in zip(reference.param_groups, (cfg.tied_embed_lr, cfg.scalar_lr)):
            g["lr"] = 0.5 * peak
        optimizers.step(0.5, 0.9)
        reference.step()
        for a, b in zip(of(model, names), of(twin, names)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()


@pytest.mark.parametrize("loops", [0, 2])
def test_parameters_that_a_depth_does_not_use(loops):
    """A single layer has neither skips nor lanes; a step must not trip over gradients that never came."""
    cfg = tiny_config(num_layers=1, num_loops=0) if not loops else tiny_config(parallel_start_layer=99)
    model = tiny_model(cfg)
    optimizers = tg.Optimizers(model, tg.Ranks(), cfg)
    model(batch(), tg.depth_plan(cfg, loops > 0)).mean().backward()
    optimizers.step(1.0, 0.9)
    assert all(p.isfinite().all() for p in model.parameters())


class Stub:
    buffer_tokens, max_spans = 128, 4


def trainer(cfg=CFG):
    log = lambda *a, **k: None
    return tg.Trainer(tg.Run(cfg, tg.Ranks(), log, tg.Ops()), tiny_model(cfg), Stub())


def flat_state(t: tg.Trainer) -> list[torch.Tensor]:
    out = [*t.model.state_dict().values()]
    for optimizer in (t.optimizers.muon, t.optimizers.adamw):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            out += [v if isinstance(v, torch.Tensor) else torch.tensor(v) for _, v in sorted(optimizer.state[p].items())]
        out += [torch.tensor(float(g["lr"])) for g in optimizer.param_groups]
    return [v.clone() for v in out]


def test_warm_up_leaves_everything_bitwise_as_it_was():
    t = trainer()
    torch.manual_seed(5)
    before, random = flat_state(t), torch.get_rng_state()
    buffers = [next(t.own_buffers()) for _ in range(3)]
    t.warm_up()
    after = flat_state(t)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert torch.equal(random, torch.get_rng_state()) and buffers == [next(t.own_buffers()) for _ in range(3)]
    assert all(p.grad is None for p in t.model.parameters())


def test_training_after_warm_up_is_training_without_it():
    def steps(warm):
        t = trainer()
        if warm:
            t.warm_up()
        for i in range(3):
            t.step([batch(i)] * 8, t.plans[1], 1.0, 0.9)
        return flat_state(t)

    for a, b in zip(steps(True), steps(False)):
        assert torch.equal(a, b)


def test_a_forgotten_momentum_is_caught(monkeypatch):
    """What the reference does: keep Muon's momentum where state_dict() does not see it."""
    monkeypatch.setattr(tg.Muon, "load_state_dict", lambda self, state: None)
    t = trainer()
    before = flat_state(t)
    t.warm_up()
    assert not all(torch.equal(a, b) for a, b in zip(before, flat_state(t)))


def test_snapshot_resumes_bitwise():
    t = trainer()
    for i in range(2):
        t.step([batch(i)] * 8, t.plans[0], 1.0, 0.9)
    with tg.preserved(t.model, t.optimizers):
        for i in range(2, 4):
            t.step([batch(i)] * 8, t.plans[0], 1.0, 0.9)
        there = flat_state(t)
    for i in range(2, 4):
        t.step([batch(i)] * 8, t.plans[0], 1.0, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(there, flat_state(t)))


def test_training_lowers_the_loss():
    t = trainer()
    losses = [t.step([batch(0)] * 8, t.plans[1], 1.0, 0.9).item() for _ in range(12)]
    assert losses[-1] < losses[0] - 1.0


def test_average_follows_the_formula_and_any_length():
    model = tiny_model(CFG)
    ema, expected = tg.Ema(model, 0.9965), [p.detach().clone() for p in model.parameters()]
    for t in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        ema.update()
        decay = min(0.9965, (t + 1) / (t + 18))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters())]
    for a, e in zip(ema.average, expected):
        torch.testing.assert_close(a, e)
    first = next(model.parameters()).flatten()[0].item()
    assert 0.05 < (first - ema.average[0].flatten()[0].item()) / (30 * 0.1) < 0.12, "it trails by about 1/17 of the run"
    ema.copy_to_model()
    assert all(torch.equal(p, a) for p, a in zip(model.parameters(), ema.average))
    full = next(t for t in range(10**5) if (t + 1) / (t + 18) >= 0.9965)
    assert 4500 < full < 5000, "the record's own decay is reached where the record ends"


def test_momentum_warms_up_in_short_runs_too():
    cfg = tg.Config()
    assert tg.muon_momentum(0, 0.0, cfg) == cfg.muon_momentum_warmup_start
    assert tg.muon_momentum(1500, 0.2, cfg) == tg.muon_momentum(40, 0.31, cfg) == tg.muon_momentum(9, 1, cfg) == pytest.approx(0.97)
    assert tg.muon_momentum(750, 0.1, cfg) == pytest.approx(0.945)


def test_learning_rate_falls_to_its_floor():
    cfg = tg.Config()
    values = [tg.lr_scale(p, cfg) for p in np.linspace(0, 1.2, 50)]
    assert values[0] == 1 and values[-1] == cfg.min_lr and all(a >= b for a, b in zip(values, values[1:]))
    assert tg.lr_scale(0.5, tg.Config(warmdown_frac=0.0)) == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Ranks


def steps_in_ranks(n):
    """A few steps on buffers dealt as in training; returns losses, weights and the whole of Muon's momentum."""
    torch.set_num_threads(1)
    ranks = tg.Ranks.join()
    t = tg.Trainer(tg.Run(CFG, ranks, lambda *a, **k: None, tg.Ops()), tiny_model(CFG), Stub())
    t.local_buffers = 8 // ranks.world
    own, losses = t.own_buffers(), []
    for i in range(n):
        loss = t.step([batch(next(own)) for _ in range(t.local_buffers)], t.plans[i > 1], 1.0, 0.9)
        losses.append(ranks.sum_(loss.clone()).item())
    momenta = {}
    for name in tg.Optimizers.MUON:
        p = dict(t.model.named_parameters())[name]
        shard = t.optimizers.muon.state[p]["momentum"]
        whole = [torch.empty_like(shard) for _ in range(ranks.world)]
        if ranks.world > 1:
            tg.dist.all_gather(whole, shard)
        momenta[name] = torch.cat(whole if ranks.world > 1 else [shard])[: len(p)]
    return losses, [p.detach() for p in t.model.parameters()], momenta


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_as_one(world, tmp_path):
    one_losses, one_weights, one_momenta = steps_in_ranks(4)
    results = launch(world, steps_in_ranks, 4, folder=tmp_path)
    for losses, weights, momenta in results:
        np.testing.assert_allclose(losses, one_losses, rtol=2e-5)
        for a, b in zip(weights, one_weights):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-4)
        for name in momenta:
            assert (momenta[name] - one_momenta[name]).norm() <= 1e-3 * one_momenta[name].norm()
    for losses, weights, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][1])), "ranks stay bitwise the same model"
        assert losses == results[0][0]
    assert not math.isclose(one_losses[0], one_losses[-1])


def sends_of_a_step(buffers):
    """For every bank sent in a step: whether gradients of embedding and of the bank itself were whole by then."""
    torch.set_num_threads(1)
    ranks = tg.Ranks.join()
    t = tg.Trainer(tg.Run(CFG, ranks, lambda *a, **k: None, tg.Ops()), tiny_model(CFG), Stub())
    t.local_buffers, seen, plain = buffers, [], tg.dist.reduce_scatter_tensor

    def spy(mine, full, **options):
        bank = next(p for p, shard in t.optimizers.muon.shards.items() if shard.full is full)
        seen.append((bank, full.clone(), None if t.model.embed.grad is None else t.model.embed.grad.clone()))
        return plain(mine, full, **options)

    tg.dist.reduce_scatter_tensor, step = spy, t.optimizers.step
    ends = []
    t.optimizers.step = lambda *a: ends.append((t.model.embed.grad.clone(), {p: p.grad.clone() for p in t.optimizers.muon.shards})) or step(*a)
    for n in range(2):
        t.step([batch(8 * n + i) for i in range(buffers)], t.plans[1], 1.0, 0.9)
    found = []
    for i, (bank, full, embed) in enumerate(seen):
        embed_in_the_end, banks = ends[i // 4]
        found.append((embed is None or not torch.equal(embed, embed_in_the_end), torch.equal(full[: len(bank)], banks[bank])))
    return found


@pytest.mark.parametrize("buffers", [1, 3])
def test_banks_leave_during_backward_and_only_when_they_are_whole(buffers, tmp_path):
    for found in launch(2, sends_of_a_step, buffers, folder=tmp_path):
        assert len(found) == 2 * len(tg.Optimizers.MUON), "each once a step"
        assert all(whole for _, whole in found), "with the last buffer's gradient in it"
        assert all(before for before, _ in found), "while the gradient of the embedding is still to come"


def test_nothing_keeps_an_optimizer_alive():
    t = trainer()
    t.step([batch(0)] * 8, t.plans[0], 1.0, 0.9)
    watched = weakref.ref(t.optimizers.muon)
    model = t.model
    del t
    gc.collect()
    assert watched() is None and model is not None


def optimizer_outlives_its_trainer():
    """The same where hooks send banks."""
    ranks = tg.Ranks.join()
    t = tg.Trainer(tg.Run(CFG, ranks, lambda *a, **k: None, tg.Ops()), tiny_model(CFG), Stub())
    t.step([batch(0)] * t.local_buffers, t.plans[0], 1.0, 0.9)
    watched, model = weakref.ref(t.optimizers.muon), t.model
    del t
    gc.collect()
    return watched() is not None and model is not None


def test_nothing_keeps_an_optimizer_of_ranks_alive(tmp_path):
    assert launch(2, optimizer_outlives_its_trainer, folder=tmp_path) == [False, False]


def test_a_gradient_is_applied_once(monkeypatch):
    """Neither a step without a backward pass nor one after a pass that broke off sees an older gradient."""
    t, seen = trainer(), []
    squared_norm = t.optimizers.muon.squared_norm
    monkeypatch.setattr(t.optimizers.muon, "squared_norm", lambda: seen.append(squared_norm()) or seen[-1])
    t.step([batch(0)] * 8, t.plans[0], 1.0, 0.9)
    assert seen[-1] > 0
    t.optimizers.step(1.0, 0.9)
    assert seen[-1] == 0
    handle = t.model.embed.register_post_accumulate_grad_hook(lambda p: 1 / 0)  # when banks have been sent
    with pytest.raises(ZeroDivisionError):
        t.step([batch(1)] * 8, t.plans[0], 1.0, 0.9)
    handle.remove()
    t.optimizers.zero_grad()
    t.optimizers.step(1.0, 0.9)
    assert seen[-1] == 0 and len(seen) == 3
