"""Shards, packing and byte counts, against naive loops and the text itself."""
import collections
import json

import numpy as np
import pytest
import torch
from conftest import SMOKE, make_data, smoke_tokens, tiny_config, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

TOKENIZER = SMOKE / "tokenizers/fineweb_1024_bpe.model"
BOS = 1


def naive_bounds(starts, total, max_len):
    bounds, position = [0], 0
    while position < total:
        following = min([s for s in starts if s > position], default=total)
        position = min(following, position + max_len, total)
        bounds.append(position)
    return bounds


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_boundaries_match_a_naive_loop(data):
    total, max_len = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 20))
    starts = data.draw(st.lists(st.integers(0, total - 1), unique=True))
    bounds = tg.span_bounds(np.array(sorted(starts), dtype=np.int64), total, max_len)
    # cuts count from each document's first token, so the naive loop may stop at a start exactly
    assert bounds.tolist() == naive_bounds(starts, total, max_len)
    assert np.diff(bounds).max() <= max_len and set(starts) <= set(bounds.tolist())


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_shapes_do_not_depend_on_content(data):
    total, max_len, max_spans = 64, 16, data.draw(st.integers(5, 40))
    starts = np.array(sorted(data.draw(st.sets(st.integers(0, 63)))), dtype=np.int64)
    bounds = tg.span_bounds(starts, total, max_len)
    batch = tg.make_batch(np.arange(64), np.arange(1, 65), bounds, max_spans, max_len)
    cu = batch.seqs.cu_seqlens
    assert cu.shape == (max_spans + 1,) and batch.tokens.shape == batch.targets.shape == batch.seqs.positions.shape == (64,)
    spans = cu.diff()
    assert cu[0] == 0 and cu[-1] == total and (spans >= 0).all() and spans.max() <= max_len
    kept = batch.targets != tg.IGNORE
    if len(bounds) - 1 <= max_spans:
        assert kept.all() and cu.unique().tolist() == bounds.tolist()
    else:  # too many documents: the first ones whole, the rest ignored, at least one of them kept out of harm
        end = int(kept.sum())
        assert kept[:end].all() and not kept[end:].any() and end in bounds
        assert cu[cu <= end].tolist() == bounds[bounds <= end].tolist()
        first_left = bounds[bounds.tolist().index(end) + 1]
        assert bounds.tolist().index(end) + 1 - (first_left - total) // max_len > max_spans, "and no more than must be"
    for lo, hi in zip(cu[:-1], cu[1:]):
        assert batch.seqs.positions[lo:hi].tolist() == list(range(hi - lo))


def loader(folder, cfg=None, tokens=128):
    cfg = cfg or tiny_config()
    return tg.PackedLoader(sorted((folder / "datasets/fineweb10B_sp1024").glob("*train*")), BOS, cfg, tokens)


def spans_of(load, step):
    """(tokens, targets) of every span of a step's buffers."""
    for n in range(load.per_step * step, load.per_step * (step + 1)):
        batch = load.buffer(n)
        cu = batch.seqs.cu_seqlens.unique().tolist()
        yield from ((batch.tokens[lo:hi].numpy(), batch.targets[lo:hi].numpy()) for lo, hi in zip(cu, cu[1:]))


def pieces_in(stream, tokens):
    """Where in a stream these tokens stand one after another."""
    windows = np.lib.stride_tricks.sliding_window_view(stream[:-1], len(tokens))
    return np.flatnonzero((windows == tokens).all(1))


def test_a_step_is_its_part_of_the_stream(tiny_data):
    cfg, train = tiny_config(), smoke_tokens("train").astype(np.int64)
    load = loader(tiny_data)
    shards = [train[:9000], train[9000:15000]]
    whole = np.concatenate([shards[i] for epoch in range(3)
                            for i in np.random.default_rng((cfg.seed, epoch)).permutation(2)])
    assert load.epoch_tokens == 15000 and load.per_step == 8
    for step in (0, 1, 8, 14, 15, 29):  # around seams of shards and epochs
        stream, pairs = whole[step * 1024 : step * 1024 + 1025], []
        for tokens, targets in spans_of(load, step):
            at = pieces_in(stream, tokens)
            counted = targets != tg.IGNORE
            assert any((stream[i + 1 : i + 1 + len(tokens)] == targets)[counted].all() for i in at)
            pairs += [(token, target) for token, target in zip(tokens, targets) if target != tg.IGNORE]
        pairs, expected = collections.Counter(pairs), collections.Counter(zip(stream, stream[1:]))
        assert not pairs - expected and (expected - pairs).total() == 1024 - pairs.total() <= 1
    other = tg.PackedLoader(load.paths, BOS, tiny_config(seed=2), 128)
    orders = lambda l: [l.read(epoch * 15000, 3)[0].tolist() for epoch in range(8)]
    assert orders(load) != orders(other), "another seed, another order of shards"


def test_buffers_of_a_step_are_equal_work(tmp_path):
    """Sum of squared spans: dealt, the fullest is within .5 % of the mean; end to end as they come, it is not within 2 %."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(3, rng.lognormal(4, 1, 3000)).astype(int)
    tokens = rng.integers(4, 1024, lengths.sum())
    starts = np.cumsum(lengths) - lengths
    tokens[starts] = BOS
    cfg = tiny_config(train_batch_tokens=65_536, train_seq_len=256)
    load = loader(make_data(tmp_path / "d", [tokens], [tokens[:500]]), cfg, 8192)
    work = lambda bounds: float((np.diff(bounds).astype(float) ** 2).sum())
    uneven = lambda works: max(works) / np.mean(works) - 1
    for step in range(3):
        dealt = [load.layout(8 * step + i)[2] for i in range(8)]
        ends = [starts[(starts >= lo) & (starts < lo + 8192)] - lo for lo in range(65_536 * step, 65_536 * (step + 1), 8192)]
        assert all(bounds[0] == 0 and bounds[-1] == 8192 and np.diff(bounds).max() <= 256 for bounds in dealt)
        assert uneven([work(bounds) for bounds in dealt]) < 0.005
        assert uneven([work(tg.span_bounds(e, 8192, 256)) for e in ends]) > 0.02
        assert max(map(len, dealt)) < max(len(tg.span_bounds(e, 8192, 256)) for e in ends), "and fewer spans to make room for"


def test_spans_of_a_buffer_stay_in_order(tmp_path):
    """What is in the first part of a buffer, where calibration takes gradients, is no other than what is in the last."""
    rng = np.random.default_rng(1)
    lengths = np.maximum(3, rng.lognormal(4, 1, 3000)).astype(int)
    starts = np.cumsum(lengths) - lengths
    tokens = np.full(lengths.sum(), 5)
    tokens[starts], tokens[starts + 1], tokens[starts + 2] = BOS, 4 + starts // 1000, 4 + starts % 1000  # where it stands
    load = loader(make_data(tmp_path / "d", [tokens], [tokens[:500]]), tiny_config(train_batch_tokens=65_536, train_seq_len=256), 8192)
    halves = []
    for n in range(16):
        held, _, bounds = load.layout(n)
        spans, begins = np.diff(bounds), [lo for lo in bounds[:-1] if held[lo] == BOS and lo + 2 < len(held)]
        at = np.array([1000 * (held[lo + 1] - 4) + held[lo + 2] - 4 for lo in begins])
        assert len(at) > 50 and (np.diff(at) < 0).sum() <= 2, "in order, but where what was dealt to a neighbour begins"
        halves.append((spans[: len(spans) // 2].mean(), spans[len(spans) // 2 :].mean()))
    first, last = np.mean(halves, axis=0)
    assert abs(first / last - 1) < 0.2


@pytest.mark.parametrize("world", [3, 6, 16])
def test_steps_of_other_than_eight_buffers(tmp_path, world):
    """Shards that begin with BOS, as they should; one that does not, at the very end of a step."""
    cfg = tiny_config(train_batch_tokens=3072, train_seq_len=32)
    shards = [np.random.default_rng(i).integers(4, 1024, 1536) for i in range(4)]
    for i, shard in enumerate(shards):
        shard[[40, 41, 200, 900]] = BOS
        shard[0] = BOS if i % 2 else 7
    local, size = tg.split_step(cfg, world)
    load = loader(make_data(tmp_path / "d", shards, [shards[1]]), cfg, size)
    assert load.per_step == local * world != 8
    for step in range(4):
        stream, seams = load.read(step * 3072, 3073)
        ignored = [seam for seam in seams if seam and stream[seam] != BOS]
        pairs = collections.Counter(pair for tokens, targets in spans_of(load, step) for pair in zip(tokens.tolist(), targets.tolist()))
        expected = collections.Counter((int(a), tg.IGNORE if i + 1 in ignored else int(b))
                                       for i, (a, b) in enumerate(zip(stream, stream[1:])))
        assert pairs == expected
    assert any(3072 in load.read(step * 3072, 3073)[1] for step in range(4)), "a shard began where a step ended"


def test_attention_never_crosses_a_document_or_a_seam(tmp_path):
    """Shards that begin inside a document: their first token follows from nothing that comes before."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(4, 1024, 300) for _ in range(3)]
    for shard in shards:
        shard[[40, 41, 200]] = BOS
    load = loader(make_data(tmp_path / "d", shards, [shards[0]]))
    for step in range(3):
        stream, seams = load.read(step * 1024, 1025)
        inner, ignored = [seam for seam in seams if seam], 0
        assert len(inner) >= 3
        for tokens, targets in spans_of(load, step):
            at = pieces_in(stream, tokens)
            assert not (tokens[1:] == BOS).any()
            assert any(not any(i < seam < i + len(tokens) for seam in inner) for i in at), "a span within one shard"
            ignored += (targets == tg.IGNORE).sum()
        assert ignored == len(inner)


def test_ranks_share_a_step_and_cover_it(tiny_data):
    """What two ranks compute in a step is what one computes, and nothing twice."""
    cfg = tiny_config()
    for world in (1, 2, 4):
        local, _ = tg.split_step(cfg, world)
        own = []
        for rank in range(world):
            trainer = tg.Trainer.__new__(tg.Trainer)
            trainer.ranks = tg.Ranks(rank, world)
            numbers = trainer.own_buffers()
            own.append([next(numbers) for _ in range(3 * local)])
        for step in range(3):
            together = sorted(n for numbers in own for n in numbers[step * local : (step + 1) * local])
            assert together == list(range(step * 8, step * 8 + 8))


def test_prefetching_changes_nothing(tiny_data):
    load, device = loader(tiny_data), torch.device("cpu")
    ahead = list(load.buffers(iter(range(5)), device))
    assert len(ahead) == 5
    for n, batch in enumerate(ahead):
        assert torch.equal(batch.tokens, load.buffer(n).tokens)


def test_the_digest_tells_training_data_apart(tiny_data, tmp_path):
    load = loader(tiny_data)
    assert load.digest() == loader(tiny_data, tiny_config(seed=5), 256).digest(), "of the data alone"
    fewer = tg.PackedLoader(load.paths[:1], BOS, tiny_config(), 128)
    tokens = np.array(load.shards[0])
    write_shard(tmp_path / load.paths[0].name, np.append(tokens[:-1], tokens[-1] ^ 1))
    other = tg.PackedLoader([tmp_path / load.paths[0].name, *load.paths[1:]], BOS, tiny_config(), 128)
    assert len({load.digest(), fewer.digest(), other.digest()}) == 3


def test_scoring_never_loses_a_span(tiny_data):
    files = sorted((tiny_data / "datasets/fineweb10B_sp1024").glob("*val*"))
    val = tg.load_validation(files, tg.load_tokenizer(TOKENIZER, 1024), tiny_config())
    spans = [(lo, lo + 2) for lo in range(0, 300, 2)]
    batch, which = tg.pack_spans(val, spans, 64, len(spans))
    assert int((batch.targets != tg.IGNORE).sum()) == int((which >= 0).sum()) == 300
    with pytest.raises(ValueError, match="some would not be scored"):
        tg.pack_spans(val, spans, 64, 40)


def test_crowded_buffers_lose_targets_not_the_run(tmp_path):
    """Documents of one token, in buffers that the loader's sample misses: more than it makes room for."""
    long, short = np.full(64 * 303, 5), np.full(200, BOS)
    long[::40] = BOS
    load = loader(make_data(tmp_path / "d", [np.concatenate([long, short, long])], [long]))
    shapes = {load.buffer(n).seqs.cu_seqlens.shape for n in range(load.epoch_tokens // 128)}
    assert len(shapes) == 1
    ignored = [int((load.buffer(n).targets == tg.IGNORE).sum()) for n in range(load.epoch_tokens // 128)]
    assert max(ignored) > 0 and np.count_nonzero(ignored) <= 3


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


def encode(text):
    sp = tg.tool("sentencepiece").SentencePieceProcessor(model_file=str(TOKENIZER))
    return np.array([sp.bos_id()] + sp.encode(text), dtype=np.int64)


def test_bytes_of_every_bundled_document():
    tokenizer = tg.load_tokenizer(TOKENIZER, 1024)
    documents = [json.loads(line)["text"] for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")]
    assert len(documents) == 747
    for text in documents:
        assert tokenizer.target_bytes(encode(text)).sum() == len(text.encode())


@pytest.mark.parametrize("text", ["", "a", "two words", "emoji \U0001f600\U0001f468‍\U0001f469", "tab\tnul\0bell\a", "line\n\n\nlines\n",
                                  "trailing  ", "many     spaces", "é ü 漢字 العربية", "￾", " ", "\r\n", "x" * 5000])
def test_bytes_of_odd_documents(text):
    tokenizer = tg.load_tokenizer(TOKENIZER, 1024)
    assert tokenizer.target_bytes(encode(text)).sum() == len(text.encode()) - text.startswith(" ")


@pytest.mark.parametrize("text,counted", [(" leading", 7), ("   ", 2), ("a▁b", 3), ("▁", 0)])
def test_the_two_exceptions(text, counted):
    """A first space is one byte short, and U+2581 comes out as the space that SentencePiece takes it for."""
    assert tg.load_tokenizer(TOKENIZER, 1024).target_bytes(encode(text)).sum() == counted


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_bytes_of_any_text(text):
    tokenizer = tg.load_tokenizer(TOKENIZER, 1024)
    text = text.replace("\u2581", "").lstrip(" ")
    assert tokenizer.target_bytes(encode(text)).sum() == len(text.encode())


# ----------------------------------------------------------------------------------------------------------------------
# Validation


def test_validation_is_one_stream_of_whole_documents(tiny_data):
    paths = sorted((tiny_data / "datasets/fineweb10B_sp1024").glob("*val*"))
    assert len(paths) == 2
    tokenizer = tg.load_tokenizer(TOKENIZER, 1024)
    val = tg.load_validation(paths, tokenizer, tiny_config())
    stream = np.concatenate([np.array(tg.open_shard(path)) for path in paths])
    assert np.array_equal(val.tokens, stream) and len(val.token_bytes) == len(stream) - 1
    assert (val.tokens[val.starts] == BOS).all() and len(val.starts) == 5
    assert val.lengths.sum() == len(stream) - 1 and (val.lengths > 0).all()
    sp = tg.tool("sentencepiece").SentencePieceProcessor(model_file=str(TOKENIZER))
    texts = [sp.decode(stream[a + 1 : a + n].tolist()) for a, n in zip(val.starts, val.lengths + (np.arange(5) == 4))]
    assert val.token_bytes.sum() == sum(len(text.encode()) for text in texts) > 1500


def test_a_fraction_is_the_first_documents(tiny_data):
    paths = sorted((tiny_data / "datasets/fineweb10B_sp1024").glob("*val*"))
    tokenizer = tg.load_tokenizer(TOKENIZER, 1024)
    whole = tg.load_validation(paths, tokenizer, tiny_config())
    part = tg.load_validation(paths, tokenizer, tiny_config(val_doc_fraction=0.4))
    assert len(part.starts) == 2 and np.array_equal(part.tokens, whole.tokens[: whole.starts[2]])
    assert part.lengths.sum() == len(part.token_bytes) == len(part.tokens) - 1


def test_documents_that_begin_with_a_space_are_counted(tmp_path):
    tokens = np.concatenate([encode(" one"), encode("two"), encode(" three"), encode("")])
    write_shard(tmp_path / "v.bin", tokens)
    val = tg.load_validation([tmp_path / "v.bin"], tg.load_tokenizer(TOKENIZER, 1024), tiny_config())
    assert val.begin_with_space == 2 and val.token_bytes.sum() == len(" onetwo three") - 2
    assert val.lengths.tolist()[-1] == 0, "a last document that is only a BOS has nothing to score"
