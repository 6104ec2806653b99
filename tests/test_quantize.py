"""GPTQ, the artifact and its limits."""
import hashlib
import itertools
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


STATES = CFG.quant_states


def made(parts):
    """The matrix that codes stand for."""
    scale = tg.Quantizer.scale
    return parts["w.codes"] / 2 * scale(parts["w.rows"])[:, None] * scale(parts["w.columns"])


def entropy(codes, contexts=0):
    _, codes = np.unique(codes, return_inverse=True)
    counts = np.bincount(contexts * np.int64(1000) + codes, minlength=1).astype(float)
    counts = np.pad(counts, (0, -len(counts) % 1000)).reshape(-1, 1000)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    return -(counts[counts > 0] * np.log2(share[counts > 0])).sum()


def bits(parts):
    """Ideal length of the codes in their contexts: whether they are odd, then the rest."""
    widths, codes = tg.widths_of(parts).astype(np.int64), parts["w.codes"].numpy().ravel().astype(np.int64)
    return entropy(codes >> 1 & 1, widths) + entropy(codes >> 2, 4 * widths + (codes & 3))


def test_gptq_beats_rounding_on_what_the_inputs_see():
    for seed in range(3):
        W, x = problem(seed=seed)
        q = quantizer(W, x.T @ x)
        for step in (3.0, 10.0):
            parts = q.codes(step, 1)
            scale = tg.Quantizer.scale(parts["w.rows"])[:, None] * tg.Quantizer.scale(parts["w.columns"])
            assert parts["w.codes"].dtype == torch.int16 and parts["w.codes"].abs().max() <= 2 * tg.TOP
            error = lambda Q: ((Q - W) @ x.T).square().sum()
            assert error(made(parts)) < 0.8 * error((W / scale).round() * scale)


def walk(codes, states):
    """The shifts that codes should have, one after another by the definition of the code: parity checks over the past."""
    shift_bits, code_bits = tg.TRELLIS[states]
    taps = lambda bits: [i for i in range(1, 8) if bits >> i & 1]
    shifts = []
    for t in range(len(codes)):
        past = [shifts[t - i] for i in taps(shift_bits) if t >= i] + [int(codes[t - i]) & 1 for i in taps(code_bits) if t >= i]
        shifts.append(sum(past) % 2)
    return shifts


@pytest.mark.parametrize("states", tg.TRELLIS)
def test_shifts_follow_from_codes(states):
    """Those found by the decoder, by the quantizer and by the definition are the same, also past a block's end."""
    W, x = problem(out=5, inner=300)
    values = tg.gptq(W, tg.column_energies(x.T @ x)[0], states, 0.05)
    codes, shifts = (2 * values).int() >> 1, (2 * values).int() & 1
    assert torch.equal(codes + shifts / 2, values) and (shifts.any() or states == 1)
    found = tg.shifts((codes & 1).numpy().astype(np.uint8), states)
    assert np.array_equal(found, shifts) and found.tolist() == [walk(row, states) for row in codes]


@pytest.mark.parametrize("states,share", [(4, 0.86), (8, 0.84), (64, 0.81)])
def test_trellis_beats_rounding_at_equal_bits(states, share):
    """By about the 1 dB that is known of it; with Hessians, and as error falls by a quarter with each half bit."""
    ratios = []
    for seed in range(3):
        W, x = problem(out=64, inner=256, samples=2000, seed=seed)
        loss = lambda parts: ((made(parts) - W) @ x.T).square().sum().item() * 4 ** (bits(parts) / W.numel())
        q = quantizer(W, x.T @ x)
        ratios.append(loss(q.codes(2.0, states)) / loss(q.codes(2.0, 1)))
    assert max(ratios) < share, ratios


def test_paying_for_length_pays():
    """At few bits a weight: less loss at equal bits than the nearest sequence."""
    ratios = []
    for seed in range(3):
        W, x = problem(out=64, inner=256, samples=2000, seed=seed)
        U = tg.column_energies(x.T @ x)[0]
        results = []
        for toll in (0.0, tg.TOLL):
            column = U.diagonal() / U.diagonal().log().mean().exp()
            step = 1.2 * column
            values = tg.gptq(W / step, U / step, 8, toll)
            codes = (2 * values).long().numpy()
            length = sum(entropy(c >> 1 & 1) + entropy(c >> 2, c & 3) for c in codes.T) / W.numel()
            results.append(((values * step - W) @ x.T).square().sum().item() * 4**length)
        ratios.append(results[1] / results[0])
    assert max(ratios) < 0.985, ratios


def test_trellis_finds_the_best_way():
    """With independent inputs and all sequences tried."""
    for seed in range(3):
        W = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
        found = tg.gptq(W, torch.eye(5), 8)
        ways = []
        for codes in itertools.product(range(-3, 4), repeat=5):
            values = torch.tensor(codes) + torch.tensor(walk(codes, 8)) / 2
            ways.append(((values - W) ** 2).sum().item())
        assert abs(((found - W) ** 2).sum().item() - min(ways)) < 1e-6


@pytest.mark.parametrize("states", [1, STATES])
def test_gptq_on_edges(states):
    W, x = problem(out=3, inner=200, samples=5)
    parts = quantizer(W, x.T @ x).codes(1e-9, states)  # more inputs than samples; no finer than the largest code allows
    assert 2 * tg.TOP - 6 <= parts["w.codes"].abs().max() <= 2 * tg.TOP + 1 and (made(parts) - W).abs().max() < 0.1
    assert (made(quantizer(torch.zeros(4, 8), torch.zeros(8, 8)).codes(1.0, states)) == 0).all()  # nothing ever came in
    parts = quantizer(torch.cat([W, torch.zeros(1, 200)]), x.T @ x).codes(1.0, states)
    assert (parts["w.codes"][-1] == 0).all() and made(parts).isfinite().all()
    dead = x.clone()
    dead[:, 7] = 0
    values = made(quantizer(W, dead.T @ dead).codes(1.0, states))[:, 7]
    assert (values == 0).all() or states > 1 and values.isfinite().all(), "of an input that is always zero"


def test_statistics_of_any_size_give_the_same_codes():
    W, x = problem()
    a, b = quantizer(W, x.T @ x).codes(8.0, STATES), quantizer(W, (x.T @ x) / 512).codes(8.0 / 512**0.5, STATES)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_steps_by_sensitivity_beat_equal_ones():
    """Less loss at no more bits, where rows and columns matter differently; loss is sum of F (error x)^2."""
    for seed in range(3):
        W, x = problem(out=64, seed=seed)
        F = torch.logspace(-1.5, 1.5, 64)
        loss = lambda parts: (F[:, None] * ((made(parts) - W) @ x.T).square()).sum()
        ours, plain = quantizer(W, x.T @ x, F), quantizer(W, x.T @ x)
        scale = plain.scale(plain.columns)[:, None]
        plain.W, plain.U, plain.columns = plain.W * scale, plain.U * scale, torch.zeros_like(plain.columns)
        plain.cost = torch.ones_like(plain.cost)
        equal = plain.codes(0.4, 1)
        step = next(s for s in torch.logspace(-2, 3, 200).tolist() if bits(ours.codes(s, 1)) <= bits(equal))
        assert loss(ours.codes(step, 1)) < 0.6 * loss(equal)


@given(st.integers(0, 3000), st.integers(0, 63), st.integers(0, 127), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_coder_round_trip(count, contexts, top, seed):
    """Any codes in any contexts: none, one, all alike, the extremes; never much longer than their entropy."""
    rng = np.random.default_rng(seed)
    where = rng.integers(0, contexts + 1, count).astype(np.uint8)
    codes = rng.integers(-top, top + 1, count).astype(np.int8)
    queue = tg.tool("constriction").stream.queue
    coder = queue.RangeEncoder()
    counts = [tg.encode(coder, part, where, 64) for part in (codes, codes[::-1])]  # one after the other
    words = coder.get_compressed()
    coder = queue.RangeDecoder(words)
    for part, of_part in zip((codes, codes[::-1]), counts):
        assert np.array_equal(tg.decode(coder, of_part, where), part)
    counts = np.stack(counts).reshape(-1, counts[0].shape[1])
    share = counts / counts.sum(1, keepdims=True).clip(1)
    ideal = -(counts[counts > 0] * np.log2(share[counts > 0])).sum()
    assert 32 * len(words) <= 1.001 * ideal + 100


def test_contexts_beat_one_histogram():
    W, x = problem(out=256, inner=256)
    parts = quantizer(W * torch.logspace(-1, 1, 256)[:, None], x.T @ x).codes(20.0, STATES)
    codes = parts["w.codes"].numpy().ravel().astype(np.int64)
    assert bits(parts) < 0.97 * (entropy(codes >> 1 & 1) + entropy(codes >> 2, codes & 3))


DTYPES = st.sampled_from([torch.int8, torch.float16, torch.float32, torch.uint8, torch.int64])


@given(st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 9), max_size=3)), max_size=6))
@settings(max_examples=50, deadline=None)
def test_container_round_trip(kinds):
    tensors = {f"t{i}.x": torch.from_numpy(np.random.default_rng(i).integers(0, 100, shape)).to(dtype).reshape(shape)
               for i, (dtype, shape) in enumerate(kinds)}
    settings_, back = tg.unpack_artifact(tg.pack_artifact({"a": [1, "ü"]}, tensors), PATH)  # no matrix, as quantized
    assert settings_ == {"a": [1, "ü"]} and list(back) == list(tensors)
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and back[name].shape == t.shape and torch.equal(back[name], t)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=4), st.sampled_from([*tg.TRELLIS]),
       st.sampled_from([0, 1, 31, 32, 63, 64, 126]), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_codes_come_back_whatever_they_are(shapes, states, top, seed):
    """Of any size up to the largest, in any widths, by any trellis."""
    rng, tensors = np.random.default_rng(seed), {}
    for i, (rows, columns) in enumerate(shapes):
        codes = rng.integers(-top, top + 1, (rows, columns))
        shifts = tg.shifts((codes & 1).astype(np.uint8), states)
        tensors[f"m{i}.codes"] = torch.from_numpy((2 * codes + shifts).astype(np.int16))
        for kind, size in (("rows", rows), ("columns", columns), ("row_width", rows), ("column_width", columns)):
            tensors[f"m{i}.{kind}"] = torch.from_numpy(rng.integers(-20, 20, size).astype(np.int8))
    settings_ = {"settings": {"quant_states": states}}
    _, back = tg.unpack_artifact(tg.pack_artifact(settings_, tensors), PATH)
    assert set(back) == set(tensors) and all(torch.equal(back[name], t) for name, t in tensors.items())


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


def forged(change_tensors=None, change_words=None):
    """An artifact with a right checksum and wrong content."""
    body = blob_of(tiny_model(CFG))[24:]
    brotli, data, offset = tg.tool("brotli"), b"", 0
    while size := int.from_bytes(body[offset : offset + 4], "little"):
        data += brotli.decompress(body[offset + 4 : offset + 4 + size])
        offset += 4 + size
    words, start = body[offset + 4 :], 4 + int.from_bytes(data[:4], "little")
    settings_, end = json.loads(data[4:start]), start
    listed = {}
    for name, dtype, shape in settings_["tensors"]:
        count = int(np.prod(shape)) * getattr(torch, dtype).itemsize
        listed[name], end = [dtype, shape, data[end : end + count]], end + count
    if change_tensors:
        change_tensors(settings_, listed)
    settings_["tensors"] = [[name, dtype, shape] for name, (dtype, shape, _) in listed.items()]
    text = json.dumps(settings_).encode()
    packed = brotli.compress(len(text).to_bytes(4, "little") + text + b"".join(raw for *_, raw in listed.values()))
    body = len(packed).to_bytes(4, "little") + packed + bytes(4) + (change_words(words) if change_words else words)
    return tg.ARTIFACT_MAGIC + hashlib.blake2b(body, digest_size=16).digest() + body


def change_counts(settings_, listed):
    listed["counts"][2] = bytes(len(listed["counts"][2]))


def other_states(settings_, listed):
    settings_["settings"]["quant_states"] = 4


FORGERIES = {
    "no states": (lambda s, t: s["settings"].pop("quant_states"), None),
    "counts of nothing": (change_counts, None),
    "another trellis": (other_states, None),
    "no words": (None, lambda words: b""),
    "odd words": (None, lambda words: words[:-1]),
    "more words": (None, lambda words: words + 400 * b"x"),
    "a scale fewer": (lambda s, t: t.pop("attn_scale"), None),
    "another shape": (lambda s, t: t["attn_scale"].__setitem__(1, [np.prod(t["attn_scale"][1]).item()]), None),
    "a row fewer": (lambda s, t: t.pop("embed.rows"), None),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_content_that_cannot_be_is_refused_in_one_line(name):
    good = forged()
    tg.restore(tg.GPT(CFG), tg.unpack_artifact(good, PATH)[1])
    with pytest.raises(tg.UserError) as refusal:
        tg.restore(tg.GPT(CFG), tg.unpack_artifact(forged(*FORGERIES[name]), PATH)[1])
    assert "\n" not in str(refusal.value) and "was not made by this script, or is damaged" in str(refusal.value)


def test_a_model_that_lacks_a_setting_is_refused():
    settings_ = CFG.to_save()
    del settings_["ttt_chunk_growth"]
    with pytest.raises(tg.UserError, match="another version of this script made it: no ttt_chunk_growth"):
        tg.open_saved(run_of(), tiny_model(CFG), {"settings": settings_, "artifact": b""})


def test_restored_model_is_close_and_complete():
    model, back = tiny_model(CFG), tg.GPT(CFG)
    _, tensors = tg.unpack_artifact(blob_of(model), PATH)
    tg.restore(back, tensors)
    for (name, a), b in zip(model.named_parameters(), back.parameters()):
        assert (a - b).norm() <= 0.14 * a.norm(), name
        assert name in tg.Optimizers.MUON + tg.Optimizers.EMBED or (a - b).abs().max() <= 2**-7 * a.abs().max()
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
    assert tg.pack_artifact(settings_, tensors) == blob, "and be written the same, by any Python"
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
