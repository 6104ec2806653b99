"""Shards, packing and byte counts, against naive loops and the text itself."""
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
    for lo, hi in zip(cu[:-1], cu[1:]):
        assert batch.seqs.positions[lo:hi].tolist() == list(range(hi - lo))


def loader(folder, cfg=None, tokens=128):
    cfg = cfg or tiny_config()
    return tg.PackedLoader(sorted((folder / "datasets/fineweb10B_sp1024").glob("*train*")), BOS, cfg, tokens)


def test_buffers_are_the_stream_in_seeded_order(tiny_data):
    cfg, train = tiny_config(), smoke_tokens("train").astype(np.int64)
    load = loader(tiny_data)
    shards = [train[:9000], train[9000:15000]]
    stream = np.concatenate([shards[i] for epoch in range(3)
                             for i in np.random.default_rng((cfg.seed, epoch)).permutation(2)])
    assert load.epoch_tokens == 15000
    for n in (0, 1, 69, 70, 71, 116, 117, 118, 200, 250):  # around seams of shards and epochs
        batch = load.buffer(n)
        assert np.array_equal(batch.tokens, stream[n * 128 : n * 128 + 128])
        counted = (batch.targets != tg.IGNORE).numpy()
        assert np.array_equal(batch.targets[counted], stream[n * 128 + 1 : n * 128 + 129][counted])
    other = tg.PackedLoader(load.paths, BOS, tiny_config(seed=2), 128)
    orders = lambda l: [l.read(epoch * 15000, 3)[0].tolist() for epoch in range(8)]
    assert orders(load) != orders(other), "another seed, another order of shards"


def test_attention_never_crosses_a_document_or_a_seam(tmp_path):
    """Shards that begin inside a document: their first token follows from nothing that comes before."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(4, 1024, 300) for _ in range(3)]
    for shard in shards:
        shard[[40, 41, 200]] = BOS
    load = loader(make_data(tmp_path / "d", shards, [shards[0]]))
    seen = set()
    for n in range(12):
        stream, seams = load.read(n * 128, 129)
        batch = load.buffer(n)
        cu = set(batch.seqs.cu_seqlens.tolist())
        assert set(np.flatnonzero(stream[:-1] == BOS).tolist()) <= cu
        for seam in seams:
            if 0 < seam:
                seen.add(seam)
                assert batch.targets[seam - 1] == tg.IGNORE and (seam in cu or seam == 128)
        assert (batch.targets == tg.IGNORE).sum() == sum(s > 0 for s in seams)
    assert seen, "the seams were looked at"


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
