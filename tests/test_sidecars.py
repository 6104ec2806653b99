"""Side-cars: the bytes of tokens in the raw text, where the tokenizer does not give that back."""
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import train_gpt as tg
from conftest import ROOT, SMOKE, make_data, shards_of, tiny_config, write_shard

sys.path.insert(0, str(ROOT / "data"))
from case_ops import MARKERS, encode

DOCUMENTS = [json.loads(line)["text"] for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")]


@pytest.fixture(scope="module")
def normalising():
    """A tokenizer for case operations that collapses spaces, as the published one does."""
    model = io.BytesIO()
    tg.lazy_import("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=(encode(text, "v1") for text in DOCUMENTS[:200]), model_writer=model,
        vocab_size=1024, model_type="bpe", byte_fallback=True, normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False, user_defined_symbols=list(MARKERS), pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        minloglevel=2)
    return model.getvalue()


@pytest.fixture
def with_sidecars(tmp_path, normalising):
    """A DATA_DIR whose validation shards have side-cars, and the raw documents of validation."""
    data = make_data(tmp_path / "data", [], [])
    path = data / "tokenizers/fineweb_1024_bpe.model"
    path.write_bytes(normalising)
    tokenizer = tg.load_tokenizer(path, 1024)
    texts = [f"{text[:900]}  two  spaces" for text in DOCUMENTS[:6]]
    folder = shards_folder(data)
    for number, part in enumerate((texts[:4], texts[4:])):
        documents = [np.array([1, *tokenizer.processor.encode(encode(text, "v1"))]) for text in part]
        write_shard(folder / f"fineweb_val_{number:06}.bin", np.concatenate(documents))
        sizes = [np.append(0, tokenizer.target_bytes(document)) for document in documents]
        for text, size in zip(part, sizes):
            size[-1] += len(text.encode()) - size.sum()  # what the tokenizer has lost
        write_shard(folder / f"fineweb_val_bytes_{number:06}.bin", np.concatenate(sizes))
    train = [[1, *tokenizer.processor.encode(encode(text, "v1"))] for text in DOCUMENTS[40:60]]
    write_shard(folder / "fineweb_train_000000.bin", np.concatenate(train))
    return data, texts


def shards_folder(data: Path) -> Path:
    return data / "datasets/fineweb10B_sp1024"


def read_validation(data: Path, **settings) -> tg.Validation:
    paths = [path for path in shards_of(data, "val") if "bytes" not in path.name]
    tokenizer = tg.load_tokenizer(data / "tokenizers/fineweb_1024_bpe.model", 1024)
    return tg.load_validation(paths, tokenizer, tiny_config(**settings))


def test_side_cars_are_the_bytes_of_the_raw_text(with_sidecars):
    """Which the table of pieces has not; of part of the documents as well."""
    data, texts = with_sidecars
    expected = [len(text.encode()) for text in texts]
    val = read_validation(data)
    assert np.add.reduceat(val.token_bytes, val.starts).tolist() == expected
    tokenizer = tg.load_tokenizer(data / "tokenizers/fineweb_1024_bpe.model", 1024)
    assert tokenizer.target_bytes(val.tokens).sum() < sum(expected)
    assert read_validation(data, val_doc_fraction=0.5).token_bytes.sum() == sum(expected[:3])


def test_a_run_scores_by_the_bytes_of_side_cars(with_sidecars, run):
    data, texts = with_sidecars
    outcome = run(DATA_DIR=data, ITERATIONS=2)
    assert outcome.result["bytes"] == sum(len(text.encode()) for text in texts)
    assert "case operations: unnamed sidecars:2\n" in outcome.out and outcome.result["case_ops"] == "unnamed"


def test_without_side_cars_nothing_begins(with_sidecars, run):
    data, _ = with_sidecars
    (shards_folder(data) / "fineweb_val_bytes_000001.bin").unlink()
    outcome = run(DATA_DIR=data)
    assert "needs a side-car, fineweb_val_bytes_NNNNNN.bin" in outcome.error and "step:" not in outcome.out


@pytest.mark.parametrize("change,says", [
    (lambda sizes, tokens: sizes[:-1], "entries for"),
    (lambda sizes, tokens: sizes + (tokens == 1), "bytes to a BOS or to a marker"),
    (lambda sizes, tokens: sizes + 3 * (tokens == 4), "bytes to a BOS or to a marker"),
    (lambda sizes, tokens: sizes + 2 * (sizes > 3), "bytes, but the table of pieces")])
def test_a_side_car_of_something_else_is_refused(with_sidecars, change, says):
    data, _ = with_sidecars
    folder = shards_folder(data)
    path = folder / "fineweb_val_bytes_000001.bin"
    tokens = np.array(tg.open_shard(folder / "fineweb_val_000001.bin"))
    write_shard(path, change(np.array(tg.open_shard(path)), tokens))
    with pytest.raises(tg.UserError, match=says):
        read_validation(data)


def test_tokens_alone_tell_the_bytes_of_an_exact_tokenizer(tmp_path):
    """Whatever lies beside them."""
    tokens = np.array([1, 5, 6, 7])
    data = make_data(tmp_path / "data", [tokens], [tokens])
    honest = read_validation(data).token_bytes
    write_shard(shards_folder(data) / "fineweb_val_bytes_000000.bin", [0, 50, 50, 50])
    assert np.array_equal(read_validation(data).token_bytes, honest)
