"""GPTQ, the artifact and its limits."""
import hashlib
import itertools
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg
from conftest import launch, shards_of, silent, tiny_config, tiny_model

CFG = tiny_config()
STATES = CFG.quant_states
PATH = Path("x.ptz")  # what errors call an artifact
GOLDEN = Path(__file__).parent / "golden"
CODE_BYTES = 1000  # what export is told that the script takes


# ---- GPTQ and the trellis ----------------------------------------------------------------------------------


def draw_problem(outputs=24, inputs=48, samples=500, seed=0):
    """A weight (outputs, inputs) and inputs (samples, inputs), correlated as after a few layers."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)
    x = torch.randn(samples, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), x


def make_quantizer(W, H, fisher=None):
    """A quantizer of one matrix, "w"; without a fisher (outputs, outputs) all rows matter alike."""
    return tg.Quantizer(["w"], [W], [H], [torch.eye(len(W)) if fisher is None else fisher])


def bin_widths_of(tensors):
    return tg.power(tensors["w.rows"], 8)[:, None] * tg.power(tensors["w.columns"], 8)


def decoded(tensors):
    """The matrix that codes stand for."""
    return tensors["w.codes"] / 2 * bin_widths_of(tensors)


def output_error(values, W, x):
    """What a matrix in place of W changes: the sum over samples and outputs of the squared difference."""
    return ((values - W) @ x.T).square().sum()


def ideal_bits(counts):
    """Length of symbols that are coded by their frequencies, a row of counts for each context."""
    frequencies = counts / counts.sum(1, keepdims=True).clip(1)
    return -(counts[counts > 0] * np.log2(frequencies[counts > 0])).sum()


def entropy(symbols, contexts=0):
    """Ideal length of symbols in their contexts, in bits."""
    most_symbols = 1000
    _, symbols = np.unique(symbols, return_inverse=True)
    counts = np.bincount(contexts * np.int64(most_symbols) + symbols, minlength=1).astype(float)
    filling = -len(counts) % most_symbols
    return ideal_bits(np.pad(counts, (0, filling)).reshape(-1, most_symbols))


def code_entropy(codes, spreads=0):
    """Ideal length of codes in their contexts: whether each is odd, then, by shift and parity, the rest."""
    return entropy(codes >> 1 & 1, spreads) + entropy(codes >> 2, 4 * spreads + (codes & 3))


def bits_of(tensors):
    """Ideal length of the codes of a matrix."""
    spreads = tg.spread_classes(tensors).astype(np.int64)
    return code_entropy(tensors["w.codes"].numpy().ravel().astype(np.int64), spreads)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("coarseness", [3.0, 10.0])
def test_gptq_beats_rounding_on_what_the_inputs_see(seed, coarseness):
    W, x = draw_problem(seed=seed)
    tensors = make_quantizer(W, x.T @ x).quantize(coarseness, 1)
    codes = tensors["w.codes"]
    assert codes.dtype == torch.int16 and codes.abs().max() <= 2 * tg.MAX_INT8
    widths = bin_widths_of(tensors)
    rounded = (W / widths).round() * widths
    assert output_error(decoded(tensors), W, x) < 0.8 * output_error(rounded, W, x)


def shifts_by_definition(codes, states):
    """The shifts that codes should have, one after another: parity checks over what came before."""
    shift_check, code_check = tg.TRELLIS[states]

    def lags(check):
        return [i for i in range(1, 8) if check >> i & 1]

    shifts = []
    for t in range(len(codes)):
        parity = sum(shifts[t - lag] for lag in lags(shift_check) if t >= lag)
        parity += sum(int(codes[t - lag]) & 1 for lag in lags(code_check) if t >= lag)
        shifts.append(parity % 2)
    return shifts


@pytest.mark.parametrize("states", tg.TRELLIS)
def test_shifts_follow_from_codes(states):
    """Decoder, quantizer and definition agree on them, also past the end of a block."""
    W, x = draw_problem(outputs=5, inputs=300)
    U, _ = tg.gptq_factors(x.T @ x)
    values = tg.gptq(W, U, states, 0.05)
    codes = (2 * values).int() >> 1
    shifts = (2 * values).int() & 1
    assert torch.equal(codes + shifts / 2, values) and (shifts.any() or states == 1)
    of_decoder = tg.shifts_of((codes & 1).numpy().astype(np.uint8), states)
    assert np.array_equal(of_decoder, shifts)
    assert of_decoder.tolist() == [shifts_by_definition(row, states) for row in codes]


@pytest.mark.parametrize("states,ratio", [(4, 0.86), (8, 0.84), (64, 0.81)])
def test_trellis_beats_rounding_at_equal_bits(states, ratio):
    """By about the 1 dB that is known of it, with Hessians. A bit a weight quarters the error."""
    ratios = []
    for seed in range(3):
        W, x = draw_problem(outputs=64, inputs=256, samples=2000, seed=seed)
        quantizer = make_quantizer(W, x.T @ x)
        errors_at_equal_bits = []
        for tried in (states, 1):
            tensors = quantizer.quantize(2.0, tried)
            bits_a_weight = bits_of(tensors) / W.numel()
            errors_at_equal_bits.append(output_error(decoded(tensors), W, x).item() * 4**bits_a_weight)
        ratios.append(errors_at_equal_bits[0] / errors_at_equal_bits[1])
    assert max(ratios) < ratio, ratios


def test_paying_for_length_pays():
    """At few bits a weight: less loss at equal bits than the nearest sequence has."""
    ratios = []
    for seed in range(3):
        W, x = draw_problem(outputs=64, inputs=256, samples=2000, seed=seed)
        U, _ = tg.gptq_factors(x.T @ x)
        column_widths = 1.2 * U.diagonal() / U.diagonal().log().mean().exp()
        errors_at_equal_bits = []
        for rate_weight in (0.0, tg.RATE_WEIGHT):
            values = tg.gptq(W / column_widths, U / column_widths, 8, rate_weight)
            codes = (2 * values).long().numpy()
            bits_a_weight = sum(map(code_entropy, codes.T)) / W.numel()
            error = output_error(values * column_widths, W, x).item()
            errors_at_equal_bits.append(error * 4**bits_a_weight)
        ratios.append(errors_at_equal_bits[1] / errors_at_equal_bits[0])
    assert max(ratios) < 0.985, ratios


@pytest.mark.parametrize("seed", range(3))
def test_trellis_finds_the_best_path(seed):
    """With independent inputs, against all sequences of five codes."""
    W = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
    errors = []
    for codes in itertools.product(range(-3, 4), repeat=5):
        values = torch.tensor(codes) + torch.tensor(shifts_by_definition(codes, 8)) / 2
        errors.append((values - W).square().sum().item())
    ours = (tg.gptq(W, torch.eye(5), 8) - W).square().sum().item()
    assert abs(ours - min(errors)) < 1e-6


@pytest.mark.parametrize("states", [1, STATES])
def test_gptq_on_edges(states):
    W, x = draw_problem(outputs=3, inputs=200, samples=5)  # more inputs than samples
    finest = make_quantizer(W, x.T @ x).quantize(1e-9, states)
    largest = finest["w.codes"].abs().max()
    assert 2 * tg.MAX_INT8 - 6 <= largest <= 2 * tg.MAX_INT8 + 1, "no finer than the largest code allows"
    assert (decoded(finest) - W).abs().max() < 0.1
    nothing = make_quantizer(torch.zeros(4, 8), torch.zeros(8, 8)).quantize(1.0, states)
    assert (decoded(nothing) == 0).all(), "no input was ever used"
    W_with_empty_row = torch.cat([W, torch.zeros(1, 200)])
    with_empty_row = make_quantizer(W_with_empty_row, x.T @ x).quantize(1.0, states)
    assert (with_empty_row["w.codes"][-1] == 0).all() and decoded(with_empty_row).isfinite().all()
    x[:, 7] = 0  # an input that is always zero
    dead_column = decoded(make_quantizer(W, x.T @ x).quantize(1.0, states))[:, 7]
    assert (dead_column == 0).all() or states > 1 and dead_column.isfinite().all()


def test_statistics_of_any_size_give_the_same_codes():
    W, x = draw_problem()
    tensors = make_quantizer(W, x.T @ x).quantize(8.0, STATES)
    of_fewer = make_quantizer(W, (x.T @ x) / 512).quantize(8.0 / 512**0.5, STATES)
    assert all(torch.equal(tensors[name], of_fewer[name]) for name in tensors)


@pytest.mark.parametrize("seed", range(3))
def test_bin_widths_by_sensitivity_beat_equal_ones(seed):
    """Less loss at no more bits, where rows and columns matter differently; loss is sum of F (error x)^2."""
    W, x = draw_problem(outputs=64, seed=seed)
    F = torch.logspace(-1.5, 1.5, 64)

    def loss(tensors):
        return (F[:, None] * ((decoded(tensors) - W) @ x.T).square()).sum()

    by_sensitivity = make_quantizer(W, x.T @ x, F.diag())
    equal = make_quantizer(W, x.T @ x)
    by_column = tg.power(equal.column_exponents, 8)[:, None]
    equal.W = equal.W * by_column
    equal.U = equal.U * by_column
    equal.column_exponents = torch.zeros_like(equal.column_exponents)
    equal.root_cost = torch.ones_like(equal.root_cost)
    theirs = equal.quantize(0.4, 1)
    for coarseness in torch.logspace(-2, 3, 200).tolist():
        ours = by_sensitivity.quantize(coarseness, 1)
        if bits_of(ours) <= bits_of(theirs):
            break
    assert bits_of(ours) <= bits_of(theirs) and loss(ours) < 0.6 * loss(theirs)


@pytest.mark.parametrize("seed", range(3))
def test_errors_that_move_on_to_later_rows_cost_less(seed):
    """At no more bits, where gradients of outputs go together; loss is the sum of (error x)^T F (error x)."""
    W, x = draw_problem(outputs=64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, 64, generator=generator) * torch.logspace(0.5, -1, 64)[:, None]
    F = directions.T @ directions

    def loss(tensors):
        error = (decoded(tensors) - W) @ x.T
        return (error * (F @ error)).sum()

    by_diagonal = make_quantizer(W, x.T @ x, F.diagonal().diag()).quantize(0.4, 8)
    moving = make_quantizer(W, x.T @ x, F)
    for coarseness in torch.logspace(-2, 3, 200).tolist():
        ours = moving.quantize(coarseness, 8)
        if bits_of(ours) <= bits_of(by_diagonal):
            break
    assert bits_of(ours) <= bits_of(by_diagonal) and loss(ours) < 0.8 * loss(by_diagonal)


@pytest.mark.parametrize("outputs", [3, 19])
def test_row_parts_are_all_rows_once(outputs):
    """And an error costs what remains of it once later rows, which are free, have made it good."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 500, outputs, generator=generator) + 1
    F = x.mT @ x
    parts, cost = tg.split_rows(F)
    rows = torch.arange(outputs)
    assert torch.cat([rows[part.rows] for part in parts]).sort().values.equal(rows)
    damped = F + tg.ROW_DAMPING * F.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(outputs)
    done = torch.empty(0, dtype=torch.long)
    for part in parts:
        done = torch.cat([done, rows[part.rows]])
        assert torch.cat([done, part.later]).sort().values.equal(rows)
        for row in rows[part.rows]:
            free = torch.cat([row[None], part.later])
            remaining = 1 / damped[:, free[:, None], free].double().inverse()[:, 0, 0]
            torch.testing.assert_close(cost[:, row].double(), remaining, rtol=1e-4, atol=0)


def test_each_part_is_moved_by_all_errors_before_it(monkeypatch):
    """What is rounded of two matrices is, given the errors so far, where the loss is least."""
    honest_gptq = tg.gptq
    rounded = []

    def noting_gptq(W, *args):
        rounded.append(W)
        return honest_gptq(W, *args)

    monkeypatch.setattr(tg, "gptq", noting_gptq)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 19, generator=generator) + 1
    W = torch.randn(2, 19, 12, generator=generator)
    quantizer = tg.Quantizer(["a", "b"], list(W), [torch.eye(12)] * 2, list(x.mT @ x))
    tensors = quantizer.quantize(0.5, 8)
    by_row = torch.stack([tg.power(tensors[f"{name}.rows"], 8) for name in "ab"])[:, :, None]
    codes = torch.stack([tensors[f"{name}.codes"] for name in "ab"])
    errors = (codes / 2 * by_row - quantizer.W).double()
    F = (x.mT @ x).double()
    F += tg.ROW_DAMPING * F.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(19)
    free = torch.arange(19)
    for part, W in zip(quantizer.parts, rounded):
        done = torch.tensor([row for row in range(19) if row not in free], dtype=torch.long)
        least = -torch.linalg.solve(F[:, free[:, None], free], F[:, free[:, None], done] @ errors[:, done])
        own = torch.isin(free, torch.arange(19)[part.rows])
        moved = (W * by_row[:, part.rows] - quantizer.W[:, part.rows]).double()
        torch.testing.assert_close(moved, least[:, own], rtol=0, atol=1e-5)
        free = part.later


@pytest.mark.parametrize("outputs", [3, 16])
def test_rows_without_gradients(outputs):
    """Where no error costs anything, bins are as wide as they can be."""
    W, x = draw_problem(outputs=outputs)
    tensors = make_quantizer(W, x.T @ x, torch.zeros(outputs, outputs)).quantize(0.5, STATES)
    assert (tensors["w.rows"] == tg.MAX_INT8).all() and decoded(tensors).isfinite().all()


def test_statistics_of_a_matrix_are_its_own():
    """Those of q, k and v are cut from their site; of o and down, calibration saw scaled outputs."""
    cfg, model = CFG, tiny_model(CFG)
    generator = torch.Generator().manual_seed(0)
    sums = even_statistics()
    for name, fisher in sums.fishers.items():
        x = torch.randn(fisher.shape, generator=generator)
        sums.fishers[name] = x.T @ x if x.ndim == 2 else x.square()
    assert tg.matrix_statistics(cfg, model, sums, "embed")[1].equal(sums.fishers["embed"])
    visits = tg.depth_plan(cfg, True).visits
    D, KE = cfg.model_dim, cfg.kv_dim
    for layer in range(cfg.num_layers):
        q, k, v = sums.fishers[f"{layer}.qkv"].split([D, KE, KE])
        up = sums.fishers[f"{layer}.up"]
        expected = {"q": q[:, :D], "k": k[:, D : D + KE], "v": v[:, D + KE :], "up": up}
        for kind, scale in (("o", model.attn_scale), ("down", model.mlp_scale)):
            scale = scale[layer].detach().diag()
            expected[kind] = scale @ sums.fishers[f"{layer}.{kind}"] @ scale
        for kind, fisher in expected.items():
            _, own = tg.matrix_statistics(cfg, model, sums, f"{layer}.{kind}")
            torch.testing.assert_close(own, fisher / visits.count(layer))


# ---- Coder and container -----------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(0, 63), st.integers(0, 127), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_coder_round_trip(count, last_context, top, seed):
    """Any codes in any contexts: none, one, all alike, the extremes; never much longer than their entropy."""
    rng = np.random.default_rng(seed)
    contexts = rng.integers(0, last_context + 1, count).astype(np.uint8)
    codes = rng.integers(-top, top + 1, count).astype(np.int8)
    parts = codes, codes[::-1]  # one after the other
    queue = tg.lazy_import("constriction").stream.queue
    encoder = queue.RangeEncoder()
    counts = [tg.encode(encoder, part, contexts, 64) for part in parts]
    words = encoder.get_compressed()
    decoder = queue.RangeDecoder(words)
    for part, counts_of_part in zip(parts, counts):
        assert np.array_equal(tg.decode(decoder, counts_of_part, contexts), part)
    assert 32 * len(words) <= 1.001 * ideal_bits(np.concatenate(counts)) + 100


def test_contexts_beat_one_histogram():
    W, x = draw_problem(outputs=256, inputs=256)
    W *= torch.logspace(-1, 1, 256)[:, None]
    tensors = make_quantizer(W, x.T @ x).quantize(20.0, STATES)
    codes = tensors["w.codes"].numpy().ravel().astype(np.int64)
    assert bits_of(tensors) < 0.97 * code_entropy(codes)


DTYPES = st.sampled_from([torch.int8, torch.float16, torch.float32, torch.uint8, torch.int64])


@given(st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 9), max_size=3)), max_size=6))
@settings(max_examples=50, deadline=None)
def test_container_round_trip(kinds):
    """Of tensors of any dtypes and shapes, none of them codes."""
    tensors = {}
    for i, (dtype, shape) in enumerate(kinds):
        values = np.array(np.random.default_rng(i).integers(0, 100, shape))
        tensors[f"t{i}.x"] = torch.from_numpy(values).to(dtype)
    saved = {"a": [1, "ü"], "settings": {"quant_states": 8}}
    saved_back, tensors_back = tg.unpack_artifact(tg.pack_artifact(saved, tensors), PATH)
    assert saved_back == saved and list(tensors_back) == list(tensors)
    for name, tensor in tensors.items():
        back = tensors_back[name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape and torch.equal(back, tensor)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=4),
       st.sampled_from([*tg.TRELLIS]), st.sampled_from([0, 1, 31, 32, 63, 64, 126]), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_codes_come_back_whatever_they_are(shapes, states, top, seed):
    """Of any size up to the largest, in any widths, by any trellis."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for i, (rows, columns) in enumerate(shapes):
        codes = rng.integers(-top, top + 1, (rows, columns))
        shifts = tg.shifts_of((codes & 1).astype(np.uint8), states)
        tensors[f"m{i}.codes"] = torch.from_numpy((2 * codes + shifts).astype(np.int16))
        sizes = {"rows": rows, "columns": columns, "row_width": rows, "column_width": columns}
        for kind, size in sizes.items():
            tensors[f"m{i}.{kind}"] = torch.from_numpy(rng.integers(-20, 20, size).astype(np.int8))
    artifact = tg.pack_artifact({"settings": {"quant_states": states}}, tensors)
    _, back = tg.unpack_artifact(artifact, PATH)
    assert set(back) == set(tensors) and all(torch.equal(back[name], tensors[name]) for name in tensors)


# ---- Artifacts of a model ----------------------------------------------------------------------------------


def make_run(log=silent) -> tg.Run:
    return tg.Run(CFG, tg.Ranks(), log, tg.Backend())


def even_statistics() -> tg.Calibration:
    """As if all inputs and gradients were independent and of one size."""
    D, M, KE = CFG.model_dim, CFG.mlp_dim, CFG.kv_dim
    of_layer = {"qkv": (D, D + 2 * KE), "o": (D, D), "up": (D, M), "down": (M, D)}  # inputs, outputs
    shapes = {"embed": (D, CFG.vocab_size)}
    for layer in range(CFG.num_layers):
        shapes.update((f"{layer}.{site}", shape) for site, shape in of_layer.items())
    hessians = {name: torch.eye(inputs) for name, (inputs, _) in shapes.items()}
    fishers = {name: torch.eye(outputs) for name, (_, outputs) in shapes.items()}
    of_embedding = {"embed": torch.ones(CFG.vocab_size), "start": torch.zeros(CFG.vocab_size)}
    return tg.Calibration(hessians, {**fishers, **of_embedding})


def make_artifact(model, coarseness=0.015) -> bytes:
    quantizers = tg.make_quantizers(make_run(), model, even_statistics())
    tensors = tg.quantize(make_run(), model, quantizers, coarseness)
    return tg.pack_artifact({"settings": CFG.to_save()}, tensors)


@pytest.fixture(scope="module")
def artifact() -> bytes:
    return make_artifact(tiny_model(CFG))


def test_restored_model_is_close_and_complete(artifact):
    model = tiny_model(CFG)
    fresh = tg.GPT(CFG)
    _, tensors = tg.unpack_artifact(artifact, PATH)
    restored = tg.restore(fresh, tensors)
    assert torch.equal(fresh.embed, tg.GPT(CFG).embed), "the scored model is one of its own"
    for (name, weight), back in zip(model.named_parameters(), restored.parameters()):
        assert (weight - back).norm() <= 0.14 * weight.norm(), name
        if name in tg.Optimizers.SCALARS:
            assert (weight - back).abs().max() <= 2**-7 * weight.abs().max()
    batch = tg.make_batch(np.arange(1, 65), np.arange(2, 66), np.array([0, 64]), 1, 64)
    plan = tg.depth_plan(CFG, True)
    assert (model(batch, plan) - restored(batch, plan)).abs().mean() < 0.2
    matrices = ["embed", *dict(model.named_matrices())]
    of_matrices = {f"{name}.{kind}" for name in matrices
                   for kind in ("codes", "rows", "columns", "row_width", "column_width")}
    assert set(tensors) == {*tg.Optimizers.SCALARS} | of_matrices


def test_pickle_plays_no_part(monkeypatch):
    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    _, tensors = tg.unpack_artifact(make_artifact(tiny_model(CFG)), PATH)
    tg.restore(tg.GPT(CFG), tensors)


def test_a_committed_artifact_still_decodes():
    """The format is a promise: this file was packed once and must read the same for ever."""
    blob = (GOLDEN / "artifact.ptz").read_bytes()
    saved, tensors = tg.unpack_artifact(blob, PATH)
    assert tg.pack_artifact(saved, tensors) == blob, "and be written the same, by any Python"
    digest = hashlib.sha256(json.dumps(saved, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == (GOLDEN / "artifact.sha256").read_text().strip()


# ---- Damaged and foreign artifacts -------------------------------------------------------------------------


def test_any_damage_is_refused(artifact):
    start = len(tg.ARTIFACT_MAGIC) + tg.DIGEST_BYTES
    for length in (0, 5, start - 1, start, start + 1, len(artifact) // 2, len(artifact) - 1):
        with pytest.raises(tg.UserError, match="x.ptz is not an artifact of this script, or damaged"):
            tg.unpack_artifact(artifact[:length], PATH)
    rng = np.random.default_rng(0)
    for position in [0, 8, start, start + 4, *rng.integers(0, len(artifact), 40)]:
        damaged = bytearray(artifact)
        damaged[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(tg.UserError, match="damaged"):
            tg.unpack_artifact(bytes(damaged), PATH)
    with pytest.raises(tg.UserError, match="damaged"):
        tg.unpack_artifact(artifact + b"\0", PATH)


def forge(artifact, change_content=None, change_words=None):
    """The artifact with a right checksum and, after the changes, wrong content.

    change_content(header, raw) may alter the header, and dtype, shape and bytes of tensors by their name.
    """
    # 1) Take it apart.
    brotli = tg.lazy_import("brotli")
    body = artifact[len(tg.ARTIFACT_MAGIC) + tg.DIGEST_BYTES :]
    data = b""
    offset = 4
    while size := int.from_bytes(body[offset - 4 : offset], "little"):
        data += brotli.decompress(body[offset : offset + size])
        offset += size + 4
    words = body[offset:]
    start = 4 + int.from_bytes(data[:4], "little")
    header = json.loads(data[4:start])
    raw = {}
    for name, dtype, shape in header["tensors"]:
        end = start + int(np.prod(shape)) * getattr(torch, dtype).itemsize
        raw[name] = [dtype, shape, data[start:end]]
        start = end
    # 2) Change it.
    if change_content:
        change_content(header, raw)
    if change_words:
        words = change_words(words)
    # 3) Put it together, as a single stream.
    header["tensors"] = [[name, dtype, shape] for name, (dtype, shape, _) in raw.items()]
    text = json.dumps(header).encode()
    stream = len(text).to_bytes(4, "little") + text + b"".join(content for *_, content in raw.values())
    packed = brotli.compress(stream)
    body = len(packed).to_bytes(4, "little") + packed + bytes(4) + words
    return tg.ARTIFACT_MAGIC + hashlib.blake2b(body, digest_size=tg.DIGEST_BYTES).digest() + body


def forget_states(header, raw):
    del header["settings"]["quant_states"]


def name_other_states(header, raw):
    header["settings"]["quant_states"] = 4


def count_nothing(header, raw):
    dtype, shape, content = raw["counts"]
    raw["counts"] = dtype, shape, bytes(len(content))


def drop_a_scale(header, raw):
    del raw["attn_scale"]


def flatten_a_scale(header, raw):
    dtype, shape, content = raw["attn_scale"]
    raw["attn_scale"] = dtype, [int(np.prod(shape))], content


def drop_rows(header, raw):
    del raw["embed.rows"]


FORGERIES = {
    "no states": (forget_states, None),
    "counts of nothing": (count_nothing, None),
    "another trellis": (name_other_states, None),
    "no words": (None, lambda words: b""),
    "odd words": (None, lambda words: words[:-1]),
    "more words": (None, lambda words: words + 400 * b"x"),
    "a scale fewer": (drop_a_scale, None),
    "another shape": (flatten_a_scale, None),
    "a row fewer": (drop_rows, None),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_content_that_cannot_be_is_refused_in_one_line(artifact, name):
    def restore(blob):
        _, tensors = tg.unpack_artifact(blob, PATH)
        return tg.restore(tg.GPT(CFG), tensors)

    restore(forge(artifact))  # without a change it passes
    with pytest.raises(tg.UserError) as refusal:
        restore(forge(artifact, *FORGERIES[name]))
    message = str(refusal.value)
    assert "\n" not in message and "was not made by this script, or is damaged" in message


def test_a_model_that_lacks_a_setting_is_refused():
    saved = CFG.to_save()
    del saved["ttt_chunk_growth"]
    with pytest.raises(tg.UserError, match="another version .* differ: ttt_chunk_growth"):
        tg.Config.from_env({}, saved)


# ---- The cap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cap_is_met(monkeypatch, tmp_path, room, seed):
    """Whatever the weights, the artifact fits and is hardly smaller than it may be.

    Of 84 kB a half per cent is hardly: next to each other, coarsenesses can give sizes 0.46 % apart.
    """
    torch.manual_seed(seed)
    model = tiny_model(CFG)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand(()) * 3).add_(0.02 * torch.randn_like(p))
    statistics = even_statistics()
    unlimited = tg.export(make_run(), model, statistics, CODE_BYTES, tmp_path / "unlimited.ptz")
    cap = int(CODE_BYTES + len(unlimited) * room)
    monkeypatch.setattr(tg, "CAP_BYTES", cap)
    path = tmp_path / "limited.ptz"
    limited = tg.export(make_run(), model, statistics, CODE_BYTES, path)
    assert 0.995 * cap <= len(limited) + CODE_BYTES <= cap and path.read_bytes() == limited


def test_few_bits_a_weight_are_met_too(monkeypatch, tmp_path):
    """Where a doubled bin width saves far less than a bit, the search narrows and keeps what fits."""
    model = tiny_model(CFG)
    codes_of_nothing = make_artifact(model, coarseness=1e6)
    monkeypatch.setattr(tg, "CAP_BYTES", int(CODE_BYTES + 1.4 * len(codes_of_nothing)))
    lines = []

    def log(line, console=True):
        lines.append(line)

    blob = tg.export(make_run(log), model, even_statistics(), CODE_BYTES, tmp_path / "x.ptz")
    assert 0.99 * tg.CAP_BYTES <= len(blob) + CODE_BYTES <= tg.CAP_BYTES, lines


def export_sizes(monkeypatch, folder, bits, size_of) -> tuple[list[int], int]:
    """The sizes that export tries for 1 M weights and a cap of so many bits for each, and what it keeps.

    size_of(octaves) gives a size by the octaves of coarseness from where the search begins.
    """
    monkeypatch.setattr(tg, "CAP_BYTES", int(bits * 125_000))
    monkeypatch.setattr(tg, "make_quantizers", lambda *_: SimpleNamespace(local=[]))
    monkeypatch.setattr(tg, "quantize", lambda run, model, quantizers, coarseness: coarseness)
    sizes = []

    def pack(header, coarseness):
        sizes.append(int(size_of(np.log2(coarseness) - (2.05 - bits))))
        return bytes(sizes[-1])

    monkeypatch.setattr(tg, "pack_artifact", pack)
    blob = tg.export(make_run(), torch.nn.Linear(1000, 1000, bias=False), None, 0, folder / "x.ptz")
    return sizes, len(blob)


@pytest.mark.parametrize("worth", [0.3, 0.7, 0.9, 1.0, 1.3])
@pytest.mark.parametrize("offset", [-0.3, -0.02, 0.01, 0.5])
def test_a_few_tries_meet_the_cap(monkeypatch, tmp_path, worth, offset):
    """Each costs seconds. An octave is worth so many bits a weight, and more where bins are finer."""
    def size_of(octaves):
        octaves += offset
        return 125_000 * (3.5 - worth * octaves + 0.05 * octaves**2)

    sizes, kept = export_sizes(monkeypatch, tmp_path, 3.5, size_of)
    assert 0.9995 * tg.CAP_BYTES <= kept <= tg.CAP_BYTES and len(sizes) <= 5, sizes


@pytest.mark.parametrize("seed", range(8))
def test_sizes_that_jump_are_searched_to_the_end(monkeypatch, tmp_path, seed):
    """Sizes jump by up to 0.4 %: the largest of all tries that fits is kept, and it is near the cap."""
    def size_of(octaves):
        noise = np.random.default_rng([seed, int(abs(octaves) * 1e9)]).uniform(-0.004, 0.004)
        return 125_000 * (3.5 - 0.9 * (octaves + 0.3 - 0.1 * seed)) * (1 + noise)

    sizes, kept = export_sizes(monkeypatch, tmp_path, 3.5, size_of)
    assert kept == max(size for size in sizes if size <= tg.CAP_BYTES) >= 0.998 * tg.CAP_BYTES, sizes


def test_the_first_try_is_near_the_cap(monkeypatch, tmp_path):
    """The entropy of Gaussian weights is known, and little else is in the artifact of so large a model."""
    monkeypatch.setitem(globals(), "CFG", tiny_config(MODEL_DIM=128, NUM_LAYERS=4, MLP_MULT=4))
    model = tiny_model(CFG)
    with torch.no_grad():
        for _, matrix in model.named_matrices():
            matrix.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(tg, "CAP_BYTES", weights // 2)
    lines = []
    tg.export(make_run(lambda line: lines.append(line)), model, even_statistics(), 0, tmp_path / "x.ptz")
    first = int(re.search(r"makes code \+ model (\d+) bytes", lines[0])[1])
    assert 0.93 * tg.CAP_BYTES < first < 1.07 * tg.CAP_BYTES, lines


def test_what_cannot_fit_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(tg, "CAP_BYTES", 500)
    with pytest.raises(tg.UserError, match="does not fit into 500 bytes"):
        tg.export(make_run(), tiny_model(CFG), even_statistics(), CODE_BYTES, tmp_path / "x.ptz")
    assert not list(tmp_path.iterdir())


# ---- Ranks -------------------------------------------------------------------------------------------------


def calibrate_and_quantize(folder):
    """(statistics, tensors) of the tiny model, by this rank and the others."""
    torch.set_num_threads(1)
    run = tg.Run(CFG, tg.Ranks.join(), silent, tg.Backend())
    model = tiny_model(CFG)
    loader = tg.PackedLoader(shards_of(Path(folder), "train"), 1, CFG, 128)
    sums = tg.calibrate(run, model, loader, 48)
    quantizers = tg.make_quantizers(run, model, sums)
    return sums, tg.quantize(run, model, quantizers, 0.5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_quantize_as_one(world_size, tiny_data, tmp_path):
    """Three calibration buffers over two ranks, and over four, one of which has none."""
    assert CFG.gptq_calibration_batches == 3
    sums_alone, tensors_alone = calibrate_and_quantize(str(tiny_data))
    for sums, tensors in launch(world_size, calibrate_and_quantize, str(tiny_data), folder=tmp_path):
        for statistics, alone in zip(sums, sums_alone):
            assert list(statistics) == list(alone)
            for name, value in statistics.items():
                atol = 1e-4 * alone[name].max().item()
                torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=atol)
        assert list(tensors) == list(tensors_alone)
        names = [name for name in tensors if name.endswith(".codes")]
        same = sum((tensors[name] == tensors_alone[name]).sum().item() for name in names)
        assert same >= 0.98 * sum(tensors[name].numel() for name in names)
