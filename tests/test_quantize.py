"""GPTQ, the artifact and its limits."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

CFG = tiny_config()
PATH = Path("x.ptz")


def problem(out=24, inner=48, samples=500, seed=0):
    """A weight and correlated inputs, as after a norm and a few layers."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=g) * torch.logspace(0, -2, inner)
    x = torch.randn(samples, inner, generator=g) @ mix
    return torch.randn(out, inner, generator=g), x


def quantizer(W, H, F=None):
    return tg.Quantizer(["w"], [W], [H], [torch.ones(len(W)) if F is None else F])


def made(parts):
    """The matrix that codes stand for."""
    scale = tg.Quantizer.scale
    return parts["w.codes"] * scale(parts["w.rows"])[:, None] * scale(parts["w.columns"])


def bits(parts):
    """Ideal length of the codes in their contexts."""
    contexts, codes = tg.contexts_of(parts), parts["w.codes"].numpy().ravel().astype(np.int64)
    counts = np.bincount(contexts.astype(np.int64) * 256 + codes + 128, minlength=64 * 256).reshape(64, 256)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    return -(counts[counts > 0] * np.log2(share[counts > 0])).sum()


def test_gptq_beats_rounding_on_what_the_inputs_see():
    for seed in range(3):
        W, x = problem(seed=seed)
        q = quantizer(W, x.T @ x)
        for step in (3.0, 10.0):
            parts = q.codes(step)
            scale = tg.Quantizer.scale(parts["w.rows"])[:, None] * tg.Quantizer.scale(parts["w.columns"])
            assert parts["w.codes"].dtype == torch.int8 and parts["w.codes"].abs().max() <= tg.TOP
            error = lambda Q: ((Q - W) @ x.T).square().sum()
            assert error(made(parts)) < 0.8 * error((W / scale).round() * scale)


def test_gptq_on_edges():
    W, x = problem(out=3, inner=200, samples=5)
    parts = quantizer(W, x.T @ x).codes(1e-9)  # more inputs than samples; no finer than the largest code allows
    assert parts["w.codes"].abs().max() in (126, 127) and (made(parts) - W).abs().max() < 0.1
    assert (made(quantizer(torch.zeros(4, 8), torch.zeros(8, 8)).codes(1.0)) == 0).all()  # nothing ever came in
    parts = quantizer(torch.cat([W, torch.zeros(1, 200)]), x.T @ x).codes(1.0)
    assert (parts["w.codes"][-1] == 0).all() and made(parts).isfinite().all()
    dead = x.clone()
    dead[:, 7] = 0
    assert (made(quantizer(W, dead.T @ dead).codes(1.0))[:, 7] == 0).all(), "of an input that is always zero"


def test_statistics_of_any_size_give_the_same_codes():
    W, x = problem()
    a, b = quantizer(W, x.T @ x).codes(8.0), quantizer(W, (x.T @ x) / 512).codes(8.0 / 512**0.5)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_steps_by_sensitivity_beat_equal_ones():
    """Less loss at no more bits, where rows and columns matter differently; loss is sum of F (error x)^2."""
    for seed in range(3):
        W, x = problem(out=64, seed=seed)
        F = torch.logspace(-1.5, 1.5, 64)
        loss = lambda parts: (F[:, None] * ((made(parts) - W) @ x.T).square()).sum()
        ours, plain = quantizer(W, x.T @ x, F), quantizer(W, x.T @ x)
        plain.columns, plain.cost = torch.zeros_like(plain.columns), torch.ones_like(plain.cost)
        equal = plain.codes(0.4)
        step = next(s for s in torch.logspace(-2, 3, 500).tolist() if bits(ours.codes(s)) <= bits(equal))
        assert loss(ours.codes(step)) < 0.6 * loss(equal)


@given(st.integers(0, 3000), st.integers(0, 63), st.integers(0, 127), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_coder_round_trip(count, contexts, top, seed):
    """Any codes in any contexts: none, one, all alike, the extremes; never much longer than their entropy."""
    rng = np.random.default_rng(seed)
    where = rng.integers(0, contexts + 1, count).astype(np.uint8)
    codes = rng.integers(-top, top + 1, count).astype(np.int8)
    words, counts = tg.encode(codes, where)
    assert np.array_equal(tg.decode(words, counts, where), codes)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    ideal = -(counts[counts > 0] * np.log2(share[counts > 0])).sum()
    assert 32 * len(words) <= 1.001 * ideal + 100


def test_contexts_beat_one_histogram():
    W, x = problem(out=256, inner=256)
    parts = quantizer(W * torch.logspace(-1, 1, 256)[:, None], x.T @ x).codes(20.0)
    share = np.bincount(parts["w.codes"].numpy().ravel().astype(int) + 128) / W.numel()
    assert bits(parts) < 0.97 * -(share[share > 0] * np.log2(share[share > 0])).sum() * W.numel()


DTYPES = st.sampled_from([torch.int8, torch.float16, torch.float32, torch.uint8, torch.int64])


@given(st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 9), max_size=3)), max_size=6))
@settings(max_examples=50, deadline=None)
def test_container_round_trip(kinds):
    tensors = {f"t{i}.x": torch.from_numpy(np.random.default_rng(i).integers(0, 100, shape)).to(dtype).reshape(shape)
               for i, (dtype, shape) in enumerate(kinds)}
    settings_, back = tg.unpack_artifact(tg.pack_artifact({"a": [1, "ü"]}, tensors), PATH)
    assert settings_ == {"a": [1, "ü"]} and list(back) == list(tensors)
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and back[name].shape == t.shape and torch.equal(back[name], t)


def statistics_of(model):
    """As if all inputs and gradients were independent and of one size."""
    layers = range(CFG.num_layers)
    sizes = {"qkv": (CFG.model_dim, CFG.model_dim + 2 * CFG.kv_dim), "o": (CFG.model_dim,) * 2, "up": (CFG.model_dim, CFG.mlp_dim),
             "down": (CFG.mlp_dim, CFG.model_dim)}
    shapes = {f"{i}.{site}": shape for i in layers for site, shape in sizes.items()} | {"embed": (CFG.model_dim, CFG.vocab_size)}
    return tg.Calibration({n: torch.eye(inner) for n, (inner, _) in shapes.items()},
                          {n: torch.ones(out) for n, (_, out) in shapes.items()} | {"start": torch.zeros(CFG.vocab_size)})


def run_of(log=lambda *a, **k: None):
    return tg.Run(CFG, tg.Ranks(), log, tg.Ops())


def blob_of(model, step=0.015):
    quantizers = tg.make_quantizers(run_of(), model, statistics_of(model))
    return tg.pack_artifact({"settings": CFG.to_save()}, tg.quantize(run_of(), model, *quantizers, step))


def test_any_damage_is_refused():
    blob = blob_of(tiny_model(CFG))
    rng = np.random.default_rng(0)
    for cut in (0, 5, 23, 24, 25, len(blob) // 2, len(blob) - 1):
        with pytest.raises(tg.UserError, match="x.ptz is not an artifact of this script, or damaged"):
            tg.unpack_artifact(blob[:cut], PATH)
    for position in [0, 8, 24, 28, *rng.integers(0, len(blob), 40)]:
        bad = bytearray(blob)
        bad[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(tg.UserError, match="damaged"):
            tg.unpack_artifact(bytes(bad), PATH)
    with pytest.raises(tg.UserError, match="damaged"):
        tg.unpack_artifact(blob + b"\0", PATH)


def test_restored_model_is_close_and_complete():
    model, back = tiny_model(CFG), tg.GPT(CFG)
    _, tensors = tg.unpack_artifact(blob_of(model), PATH)
    tg.restore(back, tensors)
    for (name, a), b in zip(model.named_parameters(), back.parameters()):
        assert (a - b).norm() <= 0.14 * a.norm(), name
        assert name in tg.Optimizers.MUON + tg.Optimizers.EMBED or torch.equal(a.half().float(), b)
    batch = tg.make_batch(np.arange(1, 65), np.arange(2, 66), np.array([0, 64]), 1, 64)
    plan = tg.depth_plan(CFG, True)
    assert (model(batch, plan) - back(batch, plan)).abs().mean() < 0.2
    every = set(tensors)
    assert every == {n for n in tg.Optimizers.SCALARS} | {
        f"{n}.{k}" for n in ["embed", *dict(model.named_matrices())]
        for k in ("codes", "rows", "columns", "row_width", "column_width")}


def test_pickle_plays_no_part(monkeypatch):
    import pickle
    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    tg.restore(tg.GPT(CFG), tg.unpack_artifact(blob_of(tiny_model(CFG)), PATH)[1])


class Log:
    def __init__(self):
        self.lines = []

    def __call__(self, line, console=True):
        self.lines.append(line)


@pytest.mark.parametrize("room", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cap_is_met(monkeypatch, tmp_path, room, seed):
    """Whatever the weights, the artifact fits and is hardly smaller than it may be; and finer steps cost more bytes."""
    torch.manual_seed(seed)
    model, log = tiny_model(CFG), Log()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand(()) * 3).add_(0.02 * torch.randn_like(p))
    statistics = statistics_of(model)
    free = tg.export(run_of(log), model, statistics, 1000, tmp_path / "free.ptz")
    cap = int(1000 + len(free) * room)
    monkeypatch.setattr(tg, "CAP_BYTES", cap)
    blob = tg.export(run_of(log), model, statistics, 1000, tmp_path / "tight.ptz")
    assert 0.997 * cap <= len(blob) + 1000 <= cap and (tmp_path / "tight.ptz").read_bytes() == blob


def test_few_bits_a_weight_are_found_too(monkeypatch, tmp_path):
    """Where a doubled step saves far less than a bit; the search narrows and does not give up what fits."""
    model, log = tiny_model(CFG), Log()
    empty = len(blob_of(model, step=1e6))
    monkeypatch.setattr(tg, "CAP_BYTES", int(1000 + 1.4 * empty))
    blob = tg.export(run_of(log), model, statistics_of(model), 1000, tmp_path / "x.ptz")
    assert 0.99 * tg.CAP_BYTES <= len(blob) + 1000 <= tg.CAP_BYTES, log.lines


def test_what_cannot_fit_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(tg, "CAP_BYTES", 500)
    model = tiny_model(CFG)
    with pytest.raises(tg.UserError, match="does not fit into 500 bytes"):
        tg.export(run_of(Log()), model, statistics_of(model), 1000, tmp_path / "x.ptz")
    assert not list(tmp_path.iterdir())


def test_a_committed_artifact_still_decodes():
    """The format is a promise: this file was packed once and must read the same for ever."""
    blob = (Path(__file__).parent / "golden" / "artifact.ptz").read_bytes()
    settings_, tensors = tg.unpack_artifact(blob, PATH)
    digest = hashlib.sha256(json.dumps(settings_, sort_keys=True).encode())
    for name, t in tensors.items():
        digest.update(name.encode() + t.numpy().tobytes())
    assert digest.hexdigest() == (Path(__file__).parent / "golden" / "artifact.sha256").read_text().strip()


# ----------------------------------------------------------------------------------------------------------------------
# Ranks


def calibrate_and_quantize(folder):
    torch.set_num_threads(1)
    ranks, model = tg.Ranks.join(), tiny_model(CFG)
    run = tg.Run(CFG, ranks, lambda *a, **k: None, tg.Ops())
    loader = tg.PackedLoader(sorted(Path(folder, "datasets/fineweb10B_sp1024").glob("*train*")), 1, CFG, 128)
    found = tg.calibrate(run, model, loader, 48)
    return found, tg.quantize(run, model, *tg.make_quantizers(run, model, found), 0.5)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_quantize_as_one(world, tiny_data, tmp_path):
    """Three calibration buffers over two ranks, and over four, one of which has none."""
    assert CFG.gptq_calibration_batches == 3
    alone, one = calibrate_and_quantize(str(tiny_data))
    for found, tensors in launch(world, calibrate_and_quantize, str(tiny_data), folder=tmp_path):
        assert list(tensors) == list(one)
        for ours, theirs in zip(found, alone):
            assert list(ours) == list(theirs)
            for name, sums in ours.items():
                torch.testing.assert_close(sums, theirs[name], rtol=1e-3, atol=1e-4 * theirs[name].max().item())
        codes = [(tensors[n], one[n]) for n in one if n.endswith(".codes")]
        same = sum((a == b).sum().item() for a, b in codes) / sum(a.numel() for a, _ in codes)
        assert same >= 0.98
