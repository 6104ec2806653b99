"""Muon, AdamW, clipping, averaging, and what warm-up leaves behind (nothing)."""
import contextlib
import copy
import functools
import gc
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import SMALL_CFG, launch, silent, tiny_config, tiny_model

CFG = tiny_config()
BUFFERS = 8  # of a step
MOMENTUM = 0.9


def draw_batch(seed=0, tokens=128, longest=64):
    stream = np.random.default_rng(seed).integers(2, 1024, tokens + 1)
    cut = longest - seed % 9  # spans of other lengths by another seed
    bounds = np.unique([*range(0, tokens, longest), cut, tokens])
    return tg.make_batch(stream[:-1], stream[1:], bounds, tokens // longest + 2, longest)


# ---- Optimizers --------------------------------------------------------------------------------------------


def test_singular_values_come_into_the_band():
    torch.manual_seed(0)
    for shape in ((4, 32, 32), (2, 64, 16), (2, 16, 64)):
        values = torch.linalg.svdvals(tg.orthogonalize(torch.randn(shape), 5))
        assert values.min() > 0.3 and values.max() < 1.3
    after_one = torch.linalg.svdvals(tg.orthogonalize(torch.randn(4, 32, 32), 1))
    assert after_one.min() < 0.1, "the number of iterations matters"


def test_every_parameter_has_exactly_one_optimizer():
    model = tiny_model(CFG)
    optimizers = tg.Optimizers(model, tg.Ranks(), CFG)
    optimized = [p for group in optimizers.groups for p in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="extra"):
        tg.Optimizers(model, tg.Ranks(), CFG)


def test_learning_rates_and_decays_go_where_they_belong():
    optimizers = tg.Optimizers(tiny_model(CFG), tg.Ranks(), CFG)
    assert [(group["lr"], group["weight_decay"]) for group in optimizers.groups] == [
        (CFG.matrix_lr, CFG.muon_wd), (CFG.tied_embed_lr, CFG.embed_wd), (CFG.scalar_lr, CFG.adam_wd)]


def test_adamw_is_torchs_own_and_clipping_is_global():
    """Beside a twin, which PyTorch's AdamW trains and which takes over Muon's weights after every step."""
    cfg = tg.dataclasses.replace(CFG, grad_clip_norm=0.05)
    model = tiny_model(cfg)
    twin = copy.deepcopy(model)
    optimizers = tg.Optimizers(model, tg.Ranks(), cfg)

    def parameters(of, names):
        return [dict(of.named_parameters())[name] for name in names]

    embed, scalars = tg.Optimizers.EMBED, tg.Optimizers.SCALARS
    reference = torch.optim.AdamW(
        [dict(params=parameters(twin, embed), lr=0.5 * cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
         dict(params=parameters(twin, scalars), lr=0.5 * cfg.scalar_lr, weight_decay=cfg.adam_wd)],
        betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)
    for step in range(3):
        for each in (model, twin):
            each(draw_batch(step), tg.depth_plan(cfg, True)).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        assert norm > 0.05, "clipping does something"
        optimizers.step(0.5, MOMENTUM)
        reference.step()
        for ours, theirs in zip(parameters(model, embed + scalars), parameters(twin, embed + scalars)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()


@pytest.mark.parametrize("loops", [0, 2])
def test_parameters_that_a_depth_does_not_use(loops):
    """A single layer has neither skips nor lanes; a step must not trip over gradients that never came."""
    cfg = tiny_config(parallel_start_layer=99) if loops else tiny_config(num_layers=1, num_loops=0)
    model = tiny_model(cfg)
    optimizers = tg.Optimizers(model, tg.Ranks(), cfg)
    model(draw_batch(), tg.depth_plan(cfg, loops > 0)).mean().backward()
    optimizers.step(1.0, MOMENTUM)
    assert all(p.isfinite().all() for p in model.parameters())


# ---- Warm-up, steps, averaging -----------------------------------------------------------------------------


class LoaderShape(tg.PackedLoader):
    """As much of a loader as a trainer asks for before it trains."""

    def __init__(self, cfg, buffer_tokens=128):
        self.cfg, self.buffer_tokens = cfg, buffer_tokens
        shapes = map(self.shape_at, sorted({*tg.LENGTHEN_AT, cfg.small_batch_frac}))
        self.max_spans = {shape: shape.tokens // shape.max_len + 2 for shape in shapes}


def make_trainer(ranks=None, **settings) -> tg.Trainer:
    cfg = tiny_config(**{"SMALL_BATCH_FRAC": 0.2, **settings})
    run = tg.Run(cfg, ranks or tg.Ranks(), silent, tg.Backend())
    return tg.Trainer(run, tiny_model(cfg), LoaderShape(cfg))


def take_step(trainer, seed, looped=False):
    """A step of a single rank on eight copies of one batch; returns its loss."""
    return trainer.step([draw_batch(seed)] * BUFFERS, trainer.plans[looped], 1.0, MOMENTUM)


def whole_state(trainer: tg.Trainer) -> list[torch.Tensor]:
    """Copies of all weights, of all that the optimizers keep, and of their learning rates."""
    state = [*trainer.model.state_dict().values()]
    for optimizer in (trainer.optimizers.muon, trainer.optimizers.adamw):
        for group in optimizer.param_groups:
            state.append(torch.tensor(float(group["lr"])))
            for p in group["params"]:
                state += [torch.as_tensor(value) for _, value in sorted(optimizer.state[p].items())]
    return [tensor.clone() for tensor in state]


def equal_states(states, others):
    return len(states) == len(others) and all(map(torch.equal, states, others))


def first_buffers(trainer):
    indices = trainer.own_buffers()
    return [next(indices) for _ in range(3)]


def test_warm_up_leaves_everything_bitwise_as_it_was(monkeypatch):
    """Whatever a call in which kernels do not run leaves in gradients and loss."""
    trainer = make_trainer()
    calls = []

    def compile_kernels(backend, ranks, call):
        calls.append(call)
        for tensor in (trainer.loss, *(p.grad for p in trainer.model.parameters())):
            tensor.fill_(math.nan)

    monkeypatch.setattr(tg, "compile_kernels", compile_kernels)
    torch.manual_seed(5)
    state = whole_state(trainer)
    random_state = torch.get_rng_state()
    buffers = first_buffers(trainer)
    trainer.warm_up()
    ((plan, largest),) = [call.args for call in calls]
    assert plan == trainer.plans[-1] and tg.shape_of(largest) == max(trainer.loader.max_spans)
    assert equal_states(whole_state(trainer), state)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first_buffers(trainer) == buffers
    assert not any(p.grad.any() for p in trainer.model.parameters()) and trainer.targets == 0


def test_what_graphs_write_stays_where_it_is():
    """Losses, counts and gradients are added in place, whatever steps and warm-up do."""
    trainer = make_trainer()

    def places():
        return [tensor.data_ptr() for tensor in (trainer.loss, trainer.targets)] + [
            p.grad.data_ptr() for p in trainer.model.parameters()]

    before = places()
    trainer.warm_up()
    losses = [take_step(trainer, seed, looped=seed > 0) for seed in range(3)]
    assert places() == before and trainer.targets > 0
    assert len({loss.item() for loss in losses}) == 3, "no later step changes a loss"


@pytest.mark.parametrize("attend, captured", [(tg.varlen_attention, 1), (tg.sdpa_attention, 0)])
def test_warm_up_captures_where_no_pass_waits_for_the_gpu(monkeypatch, attend, captured):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "step", lambda *args: None)
    monkeypatch.setattr(trainer, "backend", tg.Backend(attend, fused=True))
    seen = []
    monkeypatch.setattr(trainer, "capture", seen.append)
    trainer.warm_up()
    forms = [{(tg.shape_of(batch), plan) for plan, batch in calls} for calls in seen]
    assert forms == captured * [trainer.forms()]


@pytest.mark.parametrize("settings, plain, looped", [
    ({}, [(64, 21), (64, 42), (128, 42)], [(128, 42), (128, 64)]),
    (dict(SMALL_BATCH_FRAC=0.35), [(64, 21), (64, 42)], [(64, 42), (128, 42), (128, 64)]),
    (dict(SMALL_BATCH_FRAC=0, ENABLE_LOOPING_AT=0), [], [(128, 21), (128, 42), (128, 64)]),
    (dict(SMALL_BATCH_FRAC=1, ENABLE_LOOPING_AT=1), [(64, 21), (64, 42), (64, 64)], []),
    (dict(SMALL_BATCH_FRAC=0, NUM_LOOPS=0, WARMUP_STEPS=2), 2 * [(128, 21), (128, 42), (128, 64)], []),
])
def test_warm_up_runs_what_training_will_run(settings, plain, looped):
    """Each shape of buffers with its room, by the plans that come together with it; the largest first."""
    trainer = make_trainer(**settings)
    learn, seen = trainer.learn, []

    def noted(plan, batch):
        seen.append((plan, (tg.shape_of(batch), len(batch.spans.cu_seqlens) - 1)))
        learn(plan, batch)

    trainer.learn = noted
    trainer.warm_up()
    rooms = trainer.loader.max_spans
    forms = [(trainer.plans[is_looped], (shape, rooms[shape]))
             for is_looped, shapes in enumerate((plain, looped)) for shape in shapes]
    assert sorted(seen) == sorted(forms)
    sizes = [shape for _, (shape, _) in seen]
    assert sizes == sorted(sizes, reverse=True)


def test_training_after_warm_up_is_training_without_it():
    def state_after_steps(warm_up):
        trainer = make_trainer()
        if warm_up:
            trainer.warm_up()
        for seed in range(3):
            take_step(trainer, seed, looped=True)
        return whole_state(trainer)

    assert equal_states(state_after_steps(True), state_after_steps(False))


def test_replays_learn_the_buffers_that_they_are_given(monkeypatch):
    """With functions in place of graphs, each step learns its own buffers, by graphs of plan and shape."""
    def state_after_steps(trainer):
        losses = []
        for step, (shape, plan) in enumerate(sorted(trainer.forms())):
            batches = [draw_batch(10 * step + n, *shape) for n in range(BUFFERS)]
            losses.append(trainer.step(batches, plan, 1.0, MOMENTUM))
        return [*losses, trainer.targets.clone(), *whole_state(trainer)]

    plain = state_after_steps(make_trainer())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    trainer = make_trainer()
    honest_learn, seen = trainer.learn, []
    trainer.learn = lambda plan, batch: seen.append((plan, tg.shape_of(batch)))  # while it is captured
    trainer.capture([(plan, draw_batch(99, *shape)) for shape, plan in trainer.forms()])
    assert len(seen) == 5 and seen == [*trainer.graphs]
    for (plan, _), captured in trainer.graphs.items():
        captured.graph.replay = functools.partial(honest_learn, plan, captured.inputs)
    trainer.learn = None  # a buffer that is learned without a replay would call it
    assert equal_states(state_after_steps(trainer), plain)


@pytest.mark.gpu
def test_captured_buffers_are_learned_as_others_are(monkeypatch):
    """Replays of CUDA graphs give the losses and gradients of the same buffers without graphs."""
    cfg = SMALL_CFG
    device = torch.device("cuda")
    backend = tg.Backend.for_machine(cfg, device)
    if not backend.fused:
        pytest.skip("only kernels are captured")
    run = tg.Run(cfg, tg.Ranks(device="cuda:0"), silent, backend)
    trainer = tg.Trainer(run, tiny_model(cfg, noise=0.02).to(device), LoaderShape(cfg, 2048))
    trainer.warm_up()
    graphs, trainer.graphs = trainer.graphs, {}
    assert {(shape, plan) for plan, shape in graphs} == trainer.forms()
    monkeypatch.setattr(trainer.optimizers, "step", lambda *args: None)
    rng = np.random.default_rng(1)
    batches = []
    for shape, max_spans in trainer.loader.max_spans.items():
        size, longest = shape
        for starts in ((0, 700), (0, 30, 900)):
            tokens = rng.integers(0, cfg.vocab_size, size + 1)
            bounds = tg.span_bounds(np.array(starts), size, longest)
            batch = tg.make_batch(tokens[:-1], tokens[1:], bounds, max_spans, longest)
            batches.append(tg.to_device(batch, device))

    def losses_and_gradients(plan):
        trainer.optimizers.zero_grad()
        trainer.targets.zero_()
        own = [batch for batch in batches if (plan, tg.shape_of(batch)) in graphs]
        trainer.step(own, plan, 1.0, MOMENTUM)
        assert trainer.targets == sum((batch.targets != tg.IGNORE).sum() for batch in own) > 0
        return trainer.loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    for plan in trainer.plans:
        loss, gradient = losses_and_gradients(plan)
        _, again = losses_and_gradients(plan)
        noise = (again - gradient).norm()
        trainer.graphs = graphs
        monkeypatch.setattr(trainer, "learn", None)  # a buffer that is learned without a replay would call it
        for _ in range(2):
            replayed_loss, replayed = losses_and_gradients(plan)
            assert replayed_loss == pytest.approx(loss, rel=1e-5)
            assert (replayed - gradient).norm() <= max(3 * noise, 1e-5 * gradient.norm())
        monkeypatch.delattr(trainer, "learn")
        trainer.graphs = {}


def test_a_forgotten_momentum_is_caught(monkeypatch):
    """What the reference does: keep Muon's momentum where state_dict() does not see it."""
    monkeypatch.setattr(tg.Muon, "load_state_dict", lambda self, state: None)
    trainer = make_trainer()
    before = whole_state(trainer)
    trainer.warm_up()
    assert not equal_states(whole_state(trainer), before)


def test_preserved_state_resumes_bitwise():
    trainer = make_trainer()
    for seed in (0, 1):
        take_step(trainer, seed)
    states = []
    with tg.preserved(trainer.model, trainer.optimizers):
        for seed in (2, 3):
            take_step(trainer, seed)
        states.append(whole_state(trainer))
    for seed in (2, 3):
        take_step(trainer, seed)
    states.append(whole_state(trainer))
    assert equal_states(*states)


def test_training_lowers_the_loss():
    trainer = make_trainer()
    losses = [take_step(trainer, 0, looped=True).item() for _ in range(12)]
    assert losses[-1] < losses[0] - 1.0


def test_a_gradient_is_applied_once(monkeypatch):
    """Neither a step without a backward pass nor one after a pass that broke off sees an older gradient."""
    trainer = make_trainer()
    honest_squared_norm = trainer.optimizers.muon.squared_norm
    squared_norms = []

    def noting_squared_norm():
        squared_norms.append(honest_squared_norm())
        return squared_norms[-1]

    monkeypatch.setattr(trainer.optimizers.muon, "squared_norm", noting_squared_norm)
    take_step(trainer, 0)
    assert squared_norms[-1] > 0
    trainer.optimizers.step(1.0, MOMENTUM)
    assert squared_norms[-1] == 0
    handle = trainer.model.embed.register_post_accumulate_grad_hook(lambda p: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take_step(trainer, 1)
    handle.remove()
    trainer.optimizers.zero_grad()
    trainer.optimizers.step(1.0, MOMENTUM)
    assert squared_norms[-1] == 0 and len(squared_norms) == 3


def optimizer_outlives_its_trainer(ranks):
    trainer = make_trainer(ranks)
    batches = [draw_batch(0)] * trainer.local_buffers
    trainer.step(batches, trainer.plans[0], 1.0, MOMENTUM)
    optimizer = weakref.ref(trainer.optimizers.muon)
    model = trainer.model
    del trainer
    gc.collect()
    return optimizer() is not None and model is not None


def test_nothing_keeps_an_optimizer_alive():
    assert not optimizer_outlives_its_trainer(tg.Ranks())


def test_average_follows_the_formula_and_any_length():
    model = tiny_model(CFG)
    steps, added = 30, 0.1
    ema = tg.Ema(model, 0.9965)
    expected = [p.detach().clone() for p in model.parameters()]
    for t in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(added)
        ema.update()
        decay = min(0.9965, (t + 1) / (t + 18))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters())]
    for ours, theirs in zip(ema.average.values(), expected):
        torch.testing.assert_close(ours, theirs)
    behind = (model.embed[0, 0] - ema.average["embed"][0, 0]).item() / (steps * added)
    assert 0.05 < behind < 0.12, "it trails by about 1/17 of the run"
    averaged = model.with_weights(ema.average)
    assert all(map(torch.equal, averaged.parameters(), ema.average.values()))
    assert not torch.equal(averaged.embed, model.embed), "the model itself keeps the last weights"
    steps_to_full_decay = next(t for t in range(10**5) if (t + 1) / (t + 18) >= 0.9965)
    assert 4500 < steps_to_full_decay < 5000, "the record's own decay is reached where the record ends"


# ---- Schedules ---------------------------------------------------------------------------------------------


def test_momentum_warms_up_in_short_runs_too():
    cfg = tg.Config()
    assert tg.muon_momentum(0, 0.0, cfg) == cfg.muon_momentum_warmup_start
    by_steps = tg.muon_momentum(1500, 0.2, cfg)
    by_progress = tg.muon_momentum(40, 0.31, cfg)
    at_the_end = tg.muon_momentum(9, 1, cfg)
    assert by_steps == by_progress == at_the_end == pytest.approx(0.97)
    assert tg.muon_momentum(750, 0.1, cfg) == pytest.approx(0.945)


def test_learning_rate_falls_to_its_floor():
    cfg = tg.Config()
    scales = [tg.learning_rate_scale(progress, cfg) for progress in np.linspace(0, 1.2, 50)]
    assert scales[0] == 1 and scales[-1] == cfg.min_lr and scales == sorted(scales, reverse=True)
    assert tg.learning_rate_scale(0.5, tg.Config(warmdown_frac=0.0)) == 1.0


# ---- Ranks -------------------------------------------------------------------------------------------------


def train_in_ranks(steps):
    """Steps on buffers shared as in training; returns losses, weights and the whole of Muon's momentum."""
    torch.set_num_threads(1)
    ranks = tg.Ranks.join()
    trainer = make_trainer(ranks)
    trainer.local_buffers = BUFFERS // ranks.world_size
    indices = trainer.own_buffers()
    losses = []
    for step in range(steps):
        batches = [draw_batch(next(indices)) for _ in range(trainer.local_buffers)]
        loss = trainer.step(batches, trainer.plans[step > 1], 1.0, MOMENTUM)
        losses.append(ranks.all_reduce_(loss.clone()).item())
    momenta = {}
    parameters = dict(trainer.model.named_parameters())
    for name in tg.Optimizers.MUON:
        bank = parameters[name]
        slices = [trainer.optimizers.muon.state[bank]["momentum"]]
        if ranks.world_size > 1:
            gathered = [torch.empty_like(slices[0]) for _ in range(ranks.world_size)]
            tg.dist.all_gather(gathered, slices[0])
            slices = gathered
        momenta[name] = torch.cat(slices)[: len(bank)]
    return losses, [p.detach() for p in parameters.values()], momenta


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_as_one(world_size, tmp_path):
    losses_alone, weights_alone, momenta_alone = train_in_ranks(4)
    assert not math.isclose(losses_alone[0], losses_alone[-1])
    results = launch(world_size, train_in_ranks, 4, folder=tmp_path)
    for losses, weights, momenta in results:
        np.testing.assert_allclose(losses, losses_alone, rtol=2e-5)
        for ours, alone in zip(weights, weights_alone):
            torch.testing.assert_close(ours, alone, rtol=1e-3, atol=3e-4)
        for name, momentum in momenta.items():
            assert (momentum - momenta_alone[name]).norm() <= 1e-3 * momenta_alone[name].norm()
    first_losses, first_weights, _ = results[0]
    for losses, weights, _ in results[1:]:
        assert all(map(torch.equal, weights, first_weights)), "ranks stay bitwise the same model"
        assert losses == first_losses


def optimizer_of_a_rank_outlives_its_trainer():
    return optimizer_outlives_its_trainer(tg.Ranks.join())


def test_nothing_keeps_an_optimizer_of_ranks_alive(tmp_path):
    assert launch(2, optimizer_of_a_rank_outlives_its_trainer, folder=tmp_path) == [False, False]
