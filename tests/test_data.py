"""Shards, packing and byte counts, against naive loops and the text itself."""
import collections
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg
from conftest import SMOKE, make_data, shards_of, smoke_tokens, tiny_config, write_shard

pytestmark = pytest.mark.check

TOKENIZER = SMOKE / "tokenizers/fineweb_1024_bpe.model"
BOS = 1
STEP = 1024  # tokens of an optimizer step of the tiny model
WIDE_STEP = dict(train_batch_tokens=65_536, train_seq_len=256)  # settings of a step of eight buffers of 8192


# ---- Spans -------------------------------------------------------------------------------------------------


def naive_bounds(starts, total, max_len):
    bounds = [0]
    position = 0
    while position < total:
        next_start = min([start for start in starts if start > position], default=total)
        position = min(next_start, position + max_len, total)
        bounds.append(position)
    return bounds


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_boundaries_match_a_naive_loop(data):
    total = data.draw(st.integers(1, 60))
    max_len = data.draw(st.integers(1, 20))
    starts = data.draw(st.lists(st.integers(0, total - 1), unique=True))
    bounds = tg.span_bounds(np.array(sorted(starts), dtype=np.int64), total, max_len)
    assert bounds.tolist() == naive_bounds(starts, total, max_len)
    assert np.diff(bounds).max() <= max_len and set(starts) <= set(bounds.tolist())


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_shapes_do_not_depend_on_content(data):
    total, max_len = 64, 16
    max_spans = data.draw(st.integers(5, 40))
    starts = np.array(sorted(data.draw(st.sets(st.integers(0, total - 1)))), dtype=np.int64)
    bounds = tg.span_bounds(starts, total, max_len)
    batch = tg.make_batch(np.arange(total), np.arange(1, total + 1), bounds, max_spans, max_len)
    cu_seqlens = batch.spans.cu_seqlens
    positions = batch.spans.positions
    assert cu_seqlens.shape == (max_spans + 1,)
    assert batch.tokens.shape == batch.targets.shape == positions.shape == (total,)
    lengths = cu_seqlens.diff()
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == total
    assert (lengths >= 0).all() and lengths.max() <= max_len
    counts = batch.targets != tg.IGNORE
    if len(bounds) - 1 <= max_spans:
        assert counts.all() and cu_seqlens.unique().tolist() == bounds.tolist()
    else:  # the first spans are kept whole, the targets of the rest are ignored
        end = int(counts.sum())
        assert counts[:end].all() and not counts[end:].any() and end in bounds
        assert cu_seqlens[cu_seqlens <= end].tolist() == bounds[bounds <= end].tolist()
        kept = bounds.tolist().index(end)
        rest = total - bounds[kept + 1]
        assert kept + 1 + -(-rest // max_len) > max_spans, "one more would leave no room for the rest"
    for lo, hi in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        assert positions[lo:hi].tolist() == list(range(hi - lo))


def test_scoring_never_loses_a_span(tiny_data):
    val = tg.load_validation(shards_of(tiny_data, "val"), tg.load_tokenizer(TOKENIZER, 1024), tiny_config())
    spans = [(lo, lo + 2) for lo in range(0, 300, 2)]
    batch, target_index = tg.pack_spans(val, spans, 64, len(spans))
    assert int((batch.targets != tg.IGNORE).sum()) == int((target_index >= 0).sum()) == 300
    with pytest.raises(ValueError, match="some would not be scored"):
        tg.pack_spans(val, spans, 64, 40)


# ---- Training batches --------------------------------------------------------------------------------------


def make_loader(folder, cfg=None, buffer_tokens=128):
    return tg.PackedLoader(shards_of(folder, "train"), BOS, cfg or tiny_config(), buffer_tokens)


def bounds_of(batch):
    """Span boundaries of a buffer, without the empty spans that fill it up."""
    return batch.spans.cu_seqlens.unique().numpy()


def spans_of(loader, step):
    """(tokens, targets) of every span in the buffers of a step."""
    for place in range(loader.buffers_per_step):
        batch = loader.buffer(loader.buffers_per_step * step + place)
        bounds = bounds_of(batch)
        for lo, hi in zip(bounds, bounds[1:]):
            yield batch.tokens[lo:hi].numpy(), batch.targets[lo:hi].numpy()


def places_in(stream, tokens):
    """Where in a stream these tokens stand one after another."""
    windows = np.lib.stride_tricks.sliding_window_view(stream[:-1], len(tokens))
    return np.flatnonzero((windows == tokens).all(1))


def test_a_step_is_its_part_of_the_stream(tiny_data):
    cfg = tiny_config()
    train = smoke_tokens("train").astype(np.int64)
    shards = train[:9000], train[9000:15000]
    loader = make_loader(tiny_data)
    assert loader.epoch_tokens == 15000 and loader.buffers_per_step == 8
    orders = [np.random.default_rng((cfg.seed, epoch)).permutation(2) for epoch in range(3)]
    whole = np.concatenate([shards[i] for order in orders for i in order])
    for step in (0, 1, 8, 14, 15, 29):  # around seams of shards and epochs
        stream = whole[step * STEP : (step + 1) * STEP + 1]
        seen = collections.Counter()
        for tokens, targets in spans_of(loader, step):
            counts = targets != tg.IGNORE
            nexts = [stream[place + 1 : place + 1 + len(tokens)] for place in places_in(stream, tokens)]
            assert any((following == targets)[counts].all() for following in nexts)
            seen.update(zip(tokens[counts], targets[counts]))
        expected = collections.Counter(zip(stream, stream[1:]))
        assert not seen - expected
        assert (expected - seen).total() == STEP - seen.total() <= 1, "the target behind a seam is ignored"


def test_another_seed_is_another_order_of_shards(tiny_data):
    def shard_order(loader):
        """The first tokens of eight epochs."""
        return [loader.read_stream(epoch * loader.epoch_tokens, 3)[0].tolist() for epoch in range(8)]

    loader = make_loader(tiny_data)
    assert shard_order(loader) == shard_order(make_loader(tiny_data))
    assert shard_order(loader) != shard_order(make_loader(tiny_data, tiny_config(seed=2)))


def lengths_of_documents(seed):
    """Of 3000 documents, as uneven as those of a real corpus."""
    lengths = np.random.default_rng(seed).lognormal(4, 1, 3000)
    return np.maximum(3, lengths).astype(int)


def excess(bounds_of_buffers):
    """How much the work of the fullest buffer, the sum of squared spans, is above the mean."""
    work = [float((np.diff(bounds).astype(float) ** 2).sum()) for bounds in bounds_of_buffers]
    return max(work) / np.mean(work) - 1


def test_buffers_of_a_step_are_equal_work(tmp_path):
    """The fullest is within .5 % of the mean. With spans as they come, end to end, it is not within 2 %."""
    lengths = lengths_of_documents(0)
    starts = np.cumsum(lengths) - lengths
    tokens = np.random.default_rng(0).integers(4, 1024, lengths.sum())
    tokens[starts] = BOS
    size = 8192
    loader = make_loader(make_data(tmp_path / "d", [tokens], [tokens[:500]]), tiny_config(**WIDE_STEP), size)
    loader.begin_stage(0, tg.BufferShape(size, 256))
    for step in range(3):
        balanced = [bounds_of(loader.buffer(8 * step + place)) for place in range(8)]
        for bounds in balanced:
            assert bounds[0] == 0 and bounds[-1] == size and np.diff(bounds).max() <= 256
        assert excess(balanced) < 0.005
        as_they_come = []
        for lo in range(8 * step * size, 8 * (step + 1) * size, size):
            inside = starts[(starts >= lo) & (starts < lo + size)] - lo
            as_they_come.append(tg.span_bounds(inside, size, 256))
        assert excess(as_they_come) > 0.02
        assert max(map(len, balanced)) < max(map(len, as_they_come)), "and fewer spans to make room for"


def test_spans_lengthen_and_steps_grow_from_a_step_on(tmp_path):
    """A third of train_seq_len and half of the tokens at first; all steps together have the stream once."""
    tokens = np.random.default_rng(0).integers(4, 1024, 8 * 65_536)
    tokens[::5000] = BOS
    cfg = tiny_config(**WIDE_STEP, small_batch_frac=0.2)
    loader = make_loader(make_data(tmp_path / "d", [tokens], [tokens[:500]]), cfg, 8192)
    shapes = [loader.shape_at(progress) for progress in (0.0, 0.19, 0.2, 0.7)]
    assert shapes == [(4096, 85), (4096, 170), (8192, 170), (8192, 256)]
    for first_step, shape in zip((2, 5, 4, 6), shapes[1:2] + shapes[3:] + shapes[2:]):
        loader.begin_stage(first_step, shape)  # the one from 5 on will not come: another begins before it
    start = 0
    for step, shape in enumerate(np.repeat([0, 1, 2, 3], 2)):
        size, longest = shapes[shape]
        batches = [loader.buffer(8 * step + place) for place in range(8)]
        assert max(np.diff(bounds_of(batch)).max() for batch in batches) == longest
        read = np.concatenate([batch.tokens for batch in batches])
        assert np.array_equal(np.sort(read), np.sort(tokens[start : start + 8 * size]))
        start += 8 * size
        rooms = {(tg.shape_of(batch), len(batch.spans.cu_seqlens) - 1) for batch in batches}
        room = loader.max_spans[size, longest]
        assert rooms == {(shapes[shape], room)}, "what CUDA graphs were captured with"
    assert loader.max_spans == {shape: loader.sample_spans(shape) + 4 for shape in shapes}
    for (size, longest), spans in loader.max_spans.items():
        assert 0 <= spans - size / longest < 10, "as long ones as there are, some documents, and 4"


def test_room_is_for_the_spans_of_all_steps(tmp_path):
    tokens = np.full(4 * 65_536, 5)
    tokens[: 2 * 65_536 : 4096] = BOS
    tokens[2 * 65_536 :: 64] = BOS
    loader = make_loader(make_data(tmp_path / "d", [tokens], [tokens[:500]]), tiny_config(**WIDE_STEP), 8192)
    assert loader.sample_spans(loader.shape_at(1.0)) == 8192 // 64


def test_a_step_that_is_packed_already_is_packed_again_for_longer_spans(tmp_path):
    """As calibration needs it after a training that ended early, even if a thread has packed it shorter."""
    tokens = np.random.default_rng(0).integers(4, 1024, 65_536)
    loader = make_loader(make_data(tmp_path / "d", [tokens], [tokens[:500]]), tiny_config(**WIDE_STEP), 8192)
    assert np.diff(bounds_of(loader.buffer(0))).max() == 85
    loader.begin_stage(5, loader.shape_at(1.0))
    assert np.diff(bounds_of(loader.buffer(0))).max() == 85
    loader.begin_stage(0, loader.shape_at(1.0))
    again = loader.buffer(0)
    assert np.diff(bounds_of(again)).max() == 256 and (again.targets != tg.IGNORE).all()


def test_spans_grow_by_thirds():
    cfg = tg.Config()
    assert [tg.longest_span(progress, cfg) for progress in (0.0, 0.09, 0.1, 0.69, 0.7, 1.0)] == [
        1024, 1024, 2048, 2048, 3072, 3072]


def test_spans_of_a_buffer_stay_in_order(tmp_path):
    """The first part of a buffer, where calibration takes gradients, is like the last."""
    lengths = lengths_of_documents(1)
    starts = np.cumsum(lengths) - lengths
    tokens = np.full(lengths.sum(), 5)
    tokens[starts] = BOS
    tokens[starts + 1] = 4 + starts // 1000  # these two tell where in the stream the document stands
    tokens[starts + 2] = 4 + starts % 1000
    loader = make_loader(make_data(tmp_path / "d", [tokens], [tokens[:500]]), tiny_config(**WIDE_STEP), 8192)
    mean_lengths = []  # of spans in the first and in the second half
    for buffer_index in range(16):
        batch = loader.buffer(buffer_index)
        held = batch.tokens.numpy()
        bounds = bounds_of(batch)
        begins = np.array([lo for lo in bounds[:-1] if held[lo] == BOS and lo + 2 < len(held)])
        in_stream = 1000 * (held[begins + 1] - 4) + held[begins + 2] - 4
        out_of_order = (np.diff(in_stream) < 0).sum()
        assert len(in_stream) > 50 and out_of_order <= 2, "only where what was assigned last begins"
        span_lengths = np.diff(bounds)
        half = len(span_lengths) // 2
        mean_lengths.append((span_lengths[:half].mean(), span_lengths[half:].mean()))
    first, last = np.mean(mean_lengths, axis=0)
    assert abs(first / last - 1) < 0.2


@pytest.mark.parametrize("world_size", [3, 6, 16])
def test_steps_of_other_than_eight_buffers(tmp_path, world_size):
    """Half of the shards begin with BOS, as they should, half do not; one begins just where a step ends."""
    step_tokens = 3072
    cfg = tiny_config(train_batch_tokens=step_tokens, train_seq_len=32)
    shards = [np.random.default_rng(i).integers(4, 1024, step_tokens // 2) for i in range(4)]
    for i, shard in enumerate(shards):
        shard[[40, 41, 200, 900]] = BOS
        shard[0] = BOS if i % 2 else 7
    local_buffers, size = tg.split_step(cfg, world_size)
    loader = make_loader(make_data(tmp_path / "d", shards, [shards[1]]), cfg, size)
    assert loader.buffers_per_step == local_buffers * world_size != 8
    seams_of_steps = []
    for step in range(4):
        stream, seams = loader.read_stream(step * step_tokens, step_tokens + 1)
        seams_of_steps.append(seams)
        ignored = [seam - 1 for seam in seams if seam and stream[seam] != BOS]
        seen = collections.Counter()
        for tokens, targets in spans_of(loader, step):
            seen.update(zip(tokens.tolist(), targets.tolist()))
        targets = stream[1:].copy()
        targets[ignored] = tg.IGNORE
        assert seen == collections.Counter(zip(stream[:-1].tolist(), targets.tolist()))
    assert any(step_tokens in seams for seams in seams_of_steps), "a shard began where a step ended"


def test_attention_never_crosses_a_document_or_a_seam(tmp_path):
    """Shards that begin inside a document: their first token follows from nothing that comes before."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(4, 1024, 300) for _ in range(3)]
    for shard in shards:
        shard[[40, 41, 200]] = BOS
    loader = make_loader(make_data(tmp_path / "d", shards, [shards[0]]))
    for step in range(3):
        stream, seams = loader.read_stream(step * STEP, STEP + 1)
        inner_seams = [seam for seam in seams if seam]
        assert len(inner_seams) >= 3
        ignored = 0
        for tokens, targets in spans_of(loader, step):
            assert not (tokens[1:] == BOS).any()
            crossings = [sum(place < seam < place + len(tokens) for seam in inner_seams)
                         for place in places_in(stream, tokens)]
            assert 0 in crossings, "a span within one shard"
            ignored += (targets == tg.IGNORE).sum()
        assert ignored == len(inner_seams)


def test_ranks_share_a_step_and_cover_it(tiny_data):
    """What several ranks compute in a step is what one computes, and nothing twice."""
    for world_size in (1, 2, 4):
        local_buffers, _ = tg.split_step(tiny_config(), world_size)
        of_ranks = []
        for rank in range(world_size):
            trainer = tg.Trainer.__new__(tg.Trainer)
            trainer.ranks = tg.Ranks(rank, world_size)
            indices = trainer.own_buffers()
            of_ranks.append([next(indices) for _ in range(3 * local_buffers)])
        for step in range(3):
            in_step = slice(step * local_buffers, (step + 1) * local_buffers)
            together = sorted(index for indices in of_ranks for index in indices[in_step])
            assert together == list(range(step * 8, step * 8 + 8))


def test_no_more_than_two_buffers_are_packed_ahead(tiny_data, monkeypatch):
    """So many that spans which lengthen from the step after the next on are in none of them."""
    loader = make_loader(tiny_data)
    honest_buffer = loader.buffer
    asked_for = []

    def noting_buffer(index):
        asked_for.append(index)
        return honest_buffer(index)

    monkeypatch.setattr(loader, "buffer", noting_buffer)
    for index, _ in enumerate(loader.buffers(itertools.count(), torch.device("cpu"))):
        assert max(asked_for) <= index + 2
        if index == 5:
            break


def test_prefetching_changes_nothing(tiny_data):
    loader = make_loader(tiny_data)
    prefetched = list(loader.buffers(iter(range(5)), torch.device("cpu")))
    assert len(prefetched) == 5
    for buffer_index, batch in enumerate(prefetched):
        assert torch.equal(batch.tokens, loader.buffer(buffer_index).tokens)


def test_the_digest_tells_training_data_apart(tiny_data, tmp_path):
    loader = make_loader(tiny_data)
    assert loader.digest() == make_loader(tiny_data, tiny_config(seed=5), 256).digest(), "of the data alone"
    first, *others = loader.paths
    fewer = tg.PackedLoader([first], BOS, tiny_config(), 128)
    tokens = np.array(loader.shards[0])
    tokens[-1] ^= 1
    write_shard(tmp_path / first.name, tokens)
    changed = tg.PackedLoader([tmp_path / first.name, *others], BOS, tiny_config(), 128)
    assert len({loader.digest(), fewer.digest(), changed.digest()}) == 3


def test_crowded_buffers_lose_targets_not_the_run(tmp_path):
    """Documents of one token, in buffers that the loader's sample misses: more than it makes room for."""
    usual = np.full(64 * 303, 5)
    usual[::40] = BOS
    crowded = np.full(200, BOS)
    loader = make_loader(make_data(tmp_path / "d", [np.concatenate([usual, crowded, usual])], [usual]))
    loader.begin_stage(0, loader.shape_at(1.0))
    batches = [loader.buffer(index) for index in range(loader.epoch_tokens // 128)]
    assert len({batch.spans.cu_seqlens.shape for batch in batches}) == 1
    ignored = [int((batch.targets == tg.IGNORE).sum()) for batch in batches]
    assert max(ignored) > 0 and np.count_nonzero(ignored) <= 3


# ---- Bytes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece():
    return tg.lazy_import("sentencepiece").SentencePieceProcessor(model_file=str(TOKENIZER))


@pytest.fixture(scope="module")
def encode(sentencepiece):
    """encode(text): the tokens of a document."""
    return lambda text: np.array([sentencepiece.bos_id()] + sentencepiece.encode(text), dtype=np.int64)


@pytest.fixture(scope="module")
def bytes_of(encode):
    """bytes_of(text): the bytes that the script counts for a document."""
    tokenizer = tg.load_tokenizer(TOKENIZER, 1024)
    return lambda text: tokenizer.target_bytes(encode(text)).sum()


def test_bytes_of_every_bundled_document(bytes_of):
    documents = [json.loads(line)["text"] for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")]
    assert len(documents) == 747
    for text in documents:
        assert bytes_of(text) == len(text.encode())


@pytest.mark.parametrize("text", [
    "", "a", "two words", "emoji \U0001f600\U0001f468‍\U0001f469", "tab\tnul\0bell\a", "line\n\n\nlines\n",
    "trailing  ", "many     spaces", "é ü 漢字 العربية", "￾", " ", "\r\n", "x" * 5000])
def test_bytes_of_odd_documents(bytes_of, text):
    assert bytes_of(text) == len(text.encode()) - text.startswith(" ")


@pytest.mark.parametrize("text,counted", [(" leading", 7), ("   ", 2), ("a▁b", 3), ("▁", 0)])
def test_the_two_exceptions(bytes_of, text, counted):
    """A first space is one byte short, and U+2581 comes out as the space that SentencePiece takes it for."""
    assert bytes_of(text) == counted


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_bytes_of_any_text(bytes_of, text):
    text = text.replace("\u2581", "").lstrip(" ")
    assert bytes_of(text) == len(text.encode())


# ---- Validation --------------------------------------------------------------------------------------------


def test_validation_is_one_stream_of_whole_documents(tiny_data, sentencepiece):
    paths = shards_of(tiny_data, "val")
    assert len(paths) == 2
    val = tg.load_validation(paths, tg.load_tokenizer(TOKENIZER, 1024), tiny_config())
    stream = np.concatenate([np.array(tg.open_shard(path)) for path in paths])
    assert np.array_equal(val.tokens, stream) and len(val.token_bytes) == len(stream) - 1
    assert (val.tokens[val.starts] == BOS).all() and len(val.starts) == 5
    assert val.lengths.sum() == len(stream) - 1 and (val.lengths > 0).all()
    ends = np.append(val.starts[1:], len(stream))
    texts = [sentencepiece.decode(stream[start + 1 : end].tolist()) for start, end in zip(val.starts, ends)]
    assert val.token_bytes.sum() == sum(len(text.encode()) for text in texts) > 1500


def test_a_fraction_is_the_first_documents(tiny_data):
    paths = shards_of(tiny_data, "val")
    tokenizer = tg.load_tokenizer(TOKENIZER, 1024)
    whole = tg.load_validation(paths, tokenizer, tiny_config())
    part = tg.load_validation(paths, tokenizer, tiny_config(val_doc_fraction=0.4))
    assert len(part.starts) == 2 and np.array_equal(part.tokens, whole.tokens[: whole.starts[2]])
    assert part.lengths.sum() == len(part.token_bytes) == len(part.tokens) - 1


def test_documents_that_begin_with_a_space_are_counted(tmp_path, encode):
    texts = " one", "two", " three", ""
    path = tmp_path / "val.bin"
    write_shard(path, np.concatenate([encode(text) for text in texts]))
    val = tg.load_validation([path], tg.load_tokenizer(TOKENIZER, 1024), tiny_config())
    assert val.begin_with_space == 2 and val.token_bytes.sum() == len("".join(texts)) - 2
    assert val.lengths.tolist()[-1] == 0, "a last document that is only a BOS has nothing to score"
