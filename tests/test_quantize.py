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


@pytest.mark.parametrize("bits,clip", [(6, 12.85), (4, 4.0), (8, 20.0)])
def test_gptq_beats_rounding_on_what_the_inputs_see(bits, clip):
    for seed in range(3):
        W, x = problem(seed=seed)
        codes, scale = tg.gptq(W, x.T @ x, bits, clip)
        top = 2 ** (bits - 1) - 1
        s = scale.float()[:, None]
        assert codes.dtype == torch.int8 and codes.abs().max() <= top and scale.dtype == torch.float16
        rounded = (W / s).round().clamp(-top, top) * s
        error = lambda Q: ((Q - W) @ x.T).square().sum()
        assert error(codes * s) < 0.8 * error(rounded)


def test_gptq_on_edges():
    W, x = problem(out=3, inner=200, samples=5)
    codes, scale = tg.gptq(W, x.T @ x, 6, 12.85)  # more inputs than samples
    assert ((codes * scale.float()[:, None] - W).abs() <= 3 * scale.float()[:, None]).float().mean() > 0.9
    codes, _ = tg.gptq(torch.zeros(4, 8), torch.zeros(8, 8), 6, 12.85)  # nothing ever came in
    assert (codes == 0).all()
    codes, scale = tg.gptq(torch.cat([W, torch.zeros(1, 200)]), x.T @ x, 6, 12.85)
    assert (codes[-1] == 0).all() and scale.isfinite().all()


def test_scaling_the_hessian_changes_nothing():
    W, x = problem()
    a, b = tg.gptq(W, x.T @ x, 6, 12.85), tg.gptq(W, (x.T @ x) / 512, 6, 12.85)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


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


def hessians_of(model):
    matrices = dict(model.named_matrices(), embed=model.embed)
    return {hessian: torch.eye(matrices[name].size(1)) for name, (hessian, *_) in tg.quantization_plan(CFG).items()}


def blob_of(model):
    hessians = hessians_of(model)
    run = tg.Run(CFG, tg.Ranks(), lambda *a, **k: None, tg.Ops())
    return tg.pack_artifact({"settings": CFG.to_save()}, tg.quantize(run, model, hessians, 1.0))


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
        assert (a - b).norm() <= 0.14 * a.norm(), name  # a step is .42 of the standard deviation, 12 ** -.5 of it the error
        assert name in tg.Optimizers.MUON + tg.Optimizers.EMBED or torch.equal(a.half().float(), b)
    batch = tg.make_batch(np.arange(1, 65), np.arange(2, 66), np.array([0, 64]), 1, 64)
    plan = tg.depth_plan(CFG, True)
    assert (model(batch, plan) - back(batch, plan)).abs().mean() < 0.2
    every = set(tensors)
    assert every == {n for n in tg.Optimizers.SCALARS} | {
        f"{n}.{k}" for n in ["embed", *dict(model.named_matrices())] for k in ("codes", "scale")}


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


@pytest.mark.parametrize("room", [0.99, 0.9, 0.7])
def test_steps_widen_until_all_fits(monkeypatch, tmp_path, room):
    model, log = tiny_model(CFG), Log()
    run = tg.Run(CFG, tg.Ranks(), log, tg.Ops())
    hessians = hessians_of(model)
    free = tg.export(run, model, hessians, 1000, tmp_path / "free.ptz")
    assert not log.lines
    cap = int(1000 + len(free) * room)
    monkeypatch.setattr(tg, "CAP_BYTES", cap)
    blob = tg.export(run, model, hessians, 1000, tmp_path / "tight.ptz")
    assert len(blob) + 1000 <= cap and log.lines and (tmp_path / "tight.ptz").read_bytes() == blob
    assert len(blob) > 0.8 * (cap - 1000), "not wasteful"


def test_what_cannot_fit_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(tg, "CAP_BYTES", 500)
    model = tiny_model(CFG)
    hessians = hessians_of(model)
    with pytest.raises(tg.UserError, match="does not fit into 500 bytes"):
        tg.export(tg.Run(CFG, tg.Ranks(), Log(), tg.Ops()), model, hessians, 1000, tmp_path / "x.ptz")
    assert not list(tmp_path.iterdir())


def test_a_committed_artifact_still_decodes():
    """The format is a promise: this file was packed once and must read the same for ever."""
    blob = (Path(__file__).parent / "golden" / "artifact.ptz").read_bytes()
    settings_, tensors = tg.unpack_artifact(blob, PATH)
    digest = hashlib.sha256(json.dumps(settings_, sort_keys=True).encode())
    for name, t in tensors.items():
        digest.update(name.encode() + t.numpy().tobytes())
    assert digest.hexdigest() == (Path(__file__).parent / "golden" / "artifact.sha256").read_text().strip()


def test_embedding_and_matrices_get_their_own_settings():
    plan = tg.quantization_plan(tg.Config())
    assert plan["embed"] == ("embed", 7, 14.0) and plan["3.up"] == ("3.up", 6, 11.5)
    assert all(plan[f"3.{n}"] == ("3.qkv", 6, 13.0) for n in "qkv") and plan["3.o"] == ("3.o", 6, 13.0)
    same = tg.quantization_plan(tg.Config(matrix_clip_sigmas=12.85, matrix_bits=5))
    assert {(bits, clip) for hessian, bits, clip in same.values() if hessian != "embed"} == {(5, 12.85)}
    assert len(plan) == 11 * 6 + 1


# ----------------------------------------------------------------------------------------------------------------------
# Ranks


def calibrate_and_quantize(folder):
    torch.set_num_threads(1)
    ranks, model = tg.Ranks.join(), tiny_model(CFG)
    run = tg.Run(CFG, ranks, lambda *a, **k: None, tg.Ops())
    loader = tg.PackedLoader(sorted(Path(folder, "datasets/fineweb10B_sp1024").glob("*train*")), 1, CFG, 128)
    hessians = tg.calibrate(run, model, loader, 48)
    return hessians, tg.quantize(run, model, hessians, 1.0)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_quantize_as_one(world, tiny_data, tmp_path):
    """Three calibration buffers over two ranks, and over four, one of which has none."""
    assert CFG.gptq_calibration_batches == 3
    one_hessians, one = calibrate_and_quantize(str(tiny_data))
    for hessians, tensors in launch(world, calibrate_and_quantize, str(tiny_data), folder=tmp_path):
        assert list(hessians) == list(one_hessians) and list(tensors) == list(one)
        for name, H in hessians.items():
            torch.testing.assert_close(H, one_hessians[name], rtol=1e-4, atol=1e-4 * H.diagonal().max().item())
        codes = [(tensors[n], one[n]) for n in one if n.endswith(".codes")]
        same = sum((a == b).sum().item() for a, b in codes) / sum(a.numel() for a, _ in codes)
        assert same >= 0.999
