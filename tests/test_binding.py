"""Data, tokenizer, manifest and model belong together: what does not is refused, or is said."""
import hashlib
import io
import json
import subprocess
import threading

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import (
    ARTIFACT,
    CHECKPOINT,
    QUICK,
    ROOT,
    SMOKE,
    make_data,
    shards_of,
    smoke_tokens,
    tiny_config,
    write_shard,
)

TOKENIZER = "tokenizers/fineweb_1024_bpe.model"
BOS = 1


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def with_flipped_bit(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def copy_of(data, folder):
    """A DATA_DIR with the files of another."""
    shards = {split: [np.array(tg.open_shard(path)) for path in shards_of(data, split)]
              for split in ("train", "val")}
    return make_data(folder, **shards)


def other_piece(tokenizer: bytes) -> bytes:
    """The tokenizer with a piece spelt otherwise, which has as many bytes."""
    assert tokenizer.count(b"\xe2\x96\x81with") == 1
    return tokenizer.replace(b"\xe2\x96\x81with", b"\xe2\x96\x81wist")


# ---- Model and tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [ARTIFACT, CHECKPOINT])
def test_a_model_is_scored_with_its_own_tokenizer_only(run, finished, tiny_data, tmp_path, name):
    data = copy_of(tiny_data, tmp_path / "data")
    path = data / TOKENIZER
    saved = tg.read_saved(finished.folder / name)
    assert saved.tokenizer_sha256 == sha256(path.read_bytes()) == finished.result["tokenizer_sha256"]
    path.write_bytes(other_piece(path.read_bytes()))
    error = run(EVAL_ONLY_PATH=finished.folder / name, DATA_DIR=data).error
    assert "is for the tokenizer of sha256" in error and str(path) in error


def without_tokenizer(finished, name: str, folder):
    """The model as an older version of the script would have saved it, which named no tokenizer."""
    if name == CHECKPOINT:
        checkpoint = torch.load(finished.checkpoint, weights_only=True)
        del checkpoint["tokenizer_sha256"]
        torch.save(checkpoint, folder / name)
    else:
        header, tensors = tg.unpack_artifact(finished.artifact.read_bytes(), finished.artifact)
        del header["tokenizer_sha256"]
        (folder / name).write_bytes(tg.pack_artifact(header, tensors))
    return folder / name


@pytest.mark.parametrize("name", [ARTIFACT, CHECKPOINT])
def test_a_model_that_names_no_tokenizer_has_a_caveat(run, finished, tmp_path, name):
    path = without_tokenizer(finished, name, tmp_path)
    result = run(EVAL_ONLY_PATH=path).result
    assert f"EVAL_ONLY_PATH={path} does not say which tokenizer it is for" in result["caveats"]
    assert result["val_bpb"] == finished.result["val_bpb"]


# ---- Shards and tokenizer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strange_tokenizer(tmp_path_factory) -> bytes:
    """A tokenizer of as many pieces, trained on other text: that of the bundled articles, backwards."""
    sentencepiece = tg.lazy_import("sentencepiece")
    texts = [json.loads(line)["text"][::-1] for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:150]), model_writer=model, model_type="bpe", vocab_size=1024,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    return model.getvalue()


def test_shards_of_another_tokenizer_are_refused(run, finished, tiny_data, tmp_path, strange_tokenizer):
    """Before training; and validation's in a re-score of a model that names no tokenizer."""
    data = copy_of(tiny_data, tmp_path / "data")
    (data / TOKENIZER).write_bytes(strange_tokenizer)
    outcome = run(DATA_DIR=data)
    assert "from another tokenizer" in outcome.error and "fineweb_train_000000.bin" in outcome.error
    assert "step:" not in outcome.out
    model = without_tokenizer(finished, ARTIFACT, tmp_path)
    error = run(DATA_DIR=data, EVAL_ONLY_PATH=model).error
    assert "from another tokenizer" in error and "fineweb_val_000000.bin" in error


def test_the_bundled_shards_are_of_their_tokenizer():
    loader = tg.PackedLoader(shards_of(SMOKE, "train"), BOS, tiny_config(), 128)
    loader.check_documents(tg.load_tokenizer(SMOKE / TOKENIZER, 1024))


def test_one_shard_of_another_tokenizer_among_many_is_found(tmp_path, strange_tokenizer):
    """And named. Its documents are the first ones of the text, encoded by the other tokenizer."""
    own = tg.load_tokenizer(SMOKE / TOKENIZER, 1024)
    sentencepiece = tg.lazy_import("sentencepiece").SentencePieceProcessor()
    sentencepiece.LoadFromSerializedProto(strange_tokenizer)
    text = smoke_tokens("train")[:4000]
    shards = [text] * 20
    foreign = [[BOS, *sentencepiece.encode(own.processor.decode(document.tolist()))]
               for document in np.split(text, np.flatnonzero(text == BOS)[1:])]
    shards[4] = np.concatenate(foreign)
    data = make_data(tmp_path / "data", shards, [text])
    loader = tg.PackedLoader(shards_of(data, "train"), BOS, tiny_config(), 128)
    with pytest.raises(tg.UserError, match="fineweb_train_000004.bin: 0 of"):
        loader.check_documents(own)


def test_training_documents_are_counted_before_training(run, monkeypatch):
    def miscount(self, tokens):
        return np.zeros(len(tokens) - 1, dtype=np.int64)

    monkeypatch.setattr(tg.Tokenizer, "target_bytes", miscount)
    outcome = run(**QUICK)
    assert "breaks the rule of bytes" in outcome.error and "step:" not in outcome.out


@pytest.mark.parametrize("damage,says", [
    (lambda tokens: tokens[:0], "is empty"),
    (lambda tokens: np.append(tokens[:-1], 5000), "token 5000, but VOCAB_SIZE=1024")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_damage_beside_a_manifest_is_one_line(run, with_manifest, split, damage, says):
    path = shards_of(with_manifest, split)[0]
    write_shard(path, damage(np.array(tg.open_shard(path))))
    error = run(**QUICK, DATA_DIR=with_manifest).error
    assert path.name in error and (says in error or "is not as manifest.json says" in error)


def test_shards_may_begin_and_go_on_inside_a_document(run, tmp_path):
    """As data/README.md says: one of these shards has no BOS at all."""
    text = smoke_tokens("train")
    first, second = np.flatnonzero(text == BOS)[[10, 11]]
    parts = np.split(text[: first + 2000], [first - 50, first + 60, first + 90])
    assert BOS not in text[first + 60 : first + 90] and second > first + 90
    data = make_data(tmp_path / "data", parts, [smoke_tokens("val")[:600]])
    assert run(**QUICK, DATA_DIR=data).status == 0


def test_a_table_that_miscounts_a_piece_is_refused(tiny_data):
    """Each of the commonest pieces in turn counted a byte too long, as by a tokenizer without U+2581."""
    tokenizer = tg.load_tokenizer(SMOKE / TOKENIZER, 1024)
    val = tg.load_validation(shards_of(SMOKE, "val"), tokenizer, tiny_config())
    tokenizer.check_bytes(val.documents(0, 1), SMOKE)
    for piece in np.argsort(-np.bincount(val.tokens))[1:6]:
        piece_bytes = tokenizer.piece_bytes.copy()
        piece_bytes[piece] += 1
        wrong = tokenizer._replace(piece_bytes=piece_bytes)
        with pytest.raises(tg.UserError, match="breaks the rule of bytes"):
            wrong.check_bytes(val.documents(0, 1), SMOKE)


def test_a_tokenizer_that_marks_no_spaces_is_refused_before_training(run, tmp_path):
    """Another sign stands for a space, so each would be counted as three bytes: 12,641 for 9,661."""
    data = make_data(tmp_path / "data", [smoke_tokens("train")[:6000]], [smoke_tokens("val")[:600]])
    path = data / TOKENIZER
    path.write_bytes(path.read_bytes().replace(b"\xe2\x96\x81", b"\xe2\x96\x80"))
    assert "no piece begins with U+2581" in run(DATA_DIR=data).error


@pytest.mark.parametrize("text", [
    " leading", "   ", "a\u2581b", "\u2581", "plain", "", "\ufffd", "\xe9 \u6f22"])
def test_the_known_exceptions_are_no_fault(text):
    tokenizer = tg.load_tokenizer(SMOKE / TOKENIZER, 1024)
    document = np.array([BOS, *tokenizer.processor.encode(text)])
    tokenizer.check_bytes([document], SMOKE)


def test_broken_utf_8_is_no_fault():
    tokenizer = tg.load_tokenizer(SMOKE / TOKENIZER, 1024)
    byte_pieces = [i for i in range(1024) if tokenizer.processor.is_byte(i)]
    document = np.array([BOS, byte_pieces[0xC3], byte_pieces[0x41]])
    tokenizer.check_bytes([document], SMOKE)


def test_ranks_count_all_documents_together():
    tokenizer = tg.load_tokenizer(SMOKE / TOKENIZER, 1024)
    val = tg.load_validation(shards_of(SMOKE, "val"), tokenizer, tiny_config())
    of_ranks = [document for rank in range(3) for document in val.documents(rank, 3)]
    ends = [*val.starts[1:], len(val.tokens) - 1]
    expected = [val.tokens[start : end + 1].tobytes() for start, end in zip(val.starts, ends)]
    assert sorted(document.tobytes() for document in of_ranks) == sorted(expected)


def test_a_document_that_is_miscounted_ends_the_run(run, tmp_path, monkeypatch):
    """The last one alone; the artifact is there by then."""
    honest_load = tg.load_validation

    def load_miscounted(*args):
        val = honest_load(*args)
        return val._replace(tokens=np.append(val.tokens[:-1], 3))  # unknown: no bytes, but decodes to some

    monkeypatch.setattr(tg, "load_validation", load_miscounted)
    outcome = run(**QUICK)
    assert "rule of bytes" in outcome.error and (tmp_path / "run" / ARTIFACT).exists()


def test_what_a_tokenizer_changes_is_logged(finished):
    log = (finished.folder / "log.txt").read_text()
    assert f"tokenizer: sha256:{finished.result['tokenizer_sha256']} changes in text: nothing\n" in log
    published = ROOT / "tests/golden/tokenizer_8192.model"
    assert tg.load_tokenizer(SMOKE / TOKENIZER, 1024).changes() == []
    assert set(tg.load_tokenizer(published, 8192).changes()) <= {
        "compatibility characters", "repeated spaces", "line breaks", "spaces at the end"}


# ---- Shards and manifest -----------------------------------------------------------------------------------


@pytest.fixture
def with_manifest(tiny_data, tmp_path):
    """A DATA_DIR with a manifest as data/prepare.py writes it."""
    data = copy_of(tiny_data, tmp_path / "data")
    manifest = {"tokenizer": {"file": "fineweb_1024_bpe.model",
                              "sha256": sha256((data / TOKENIZER).read_bytes())}}
    for split in ("train", "val"):
        paths = shards_of(data, split)
        manifest[split] = {"tokens": sum(len(tg.open_shard(path)) for path in paths),
                           "shards": {path.name: sha256(path.read_bytes()) for path in paths}}
    shards_of(data, "val")[0].with_name("manifest.json").write_text(json.dumps(manifest))
    return data


def test_data_that_are_as_made_pass(run, with_manifest):
    outcome = run(**QUICK, DATA_DIR=with_manifest)
    assert outcome.status == 0 and "5 files are compared with it" in outcome.out
    assert outcome.result["caveats"] == ["unknown validation set", "not on 8 GPUs"]


def test_any_flipped_bit_of_validation_is_found(run, with_manifest, finished, tmp_path):
    rng = np.random.default_rng(0)
    path = shards_of(with_manifest, "val")[1]
    whole = path.read_bytes()
    for i in range(10):
        with_flipped_bit(path, 1024 + 2 * int(rng.integers((len(whole) - 1024) // 2)))
        error = run(EVAL_ONLY_PATH=finished.artifact, DATA_DIR=with_manifest,
                    ARTIFACT_DIR=tmp_path / str(i)).error
        assert f"{path.name} is not as manifest.json says" in error
        path.write_bytes(whole)


def test_a_flipped_bit_of_training_is_a_caveat(run, with_manifest):
    path = shards_of(with_manifest, "train")[0]
    with_flipped_bit(path, 5000)
    caveats = run(**QUICK, DATA_DIR=with_manifest).result["caveats"]
    assert f"{path} differs from what manifest.json says" in caveats[0]


def test_other_tokenizers_and_counts_are_found_before_training(run, with_manifest):
    path = shards_of(with_manifest, "train")[0]
    whole = path.read_bytes()
    write_shard(path, np.array(tg.open_shard(path))[:-1])
    outcome = run(**QUICK, DATA_DIR=with_manifest)
    assert "training shards hold 14999 tokens, but 15000 by manifest.json" in outcome.error
    path.write_bytes(whole)
    tokenizer = with_manifest / TOKENIZER
    tokenizer.write_bytes(other_piece(tokenizer.read_bytes()))
    assert "the shards were made with another one" in run(**QUICK, DATA_DIR=with_manifest).error


def test_a_missing_validation_shard_is_found(run, with_manifest):
    shards_of(with_manifest, "val")[1].unlink()
    error = run(**QUICK, DATA_DIR=with_manifest).error
    assert "fineweb_val_000001.bin is not as manifest.json says" in error


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"tokenizer": 3}', b"[" * 100_000, b"\xff"])
def test_an_unknown_manifest_is_named_and_skipped(run, with_manifest, content):
    path = shards_of(with_manifest, "val")[0].with_name("manifest.json")
    path.write_bytes(content)
    outcome = run(**QUICK, DATA_DIR=with_manifest)
    assert outcome.status == 0
    assert f"{path} is not one of data/prepare.py: nothing is compared with it" in outcome.out


# ---- What was trained on -----------------------------------------------------------------------------------


def test_the_hash_of_training_data_is_that_of_the_shards_that_were_read(run, finished, tiny_data):
    """6 steps of 1024 tokens and calibration read one of the two shards, 20 steps both."""
    command = "sha256sum {} | sha256sum"
    paths = shards_of(tiny_data, "train")

    def by_shell(names):
        said = subprocess.check_output(["bash", "-c", command.format(names)], cwd=paths[0].parent, text=True)
        return said.split()[0]

    first = np.random.default_rng((1337, 0)).permutation(2)[0]
    assert finished.result["train_data_sha256"] == by_shell(paths[first].name)
    both = run(**QUICK, ITERATIONS=20).result
    assert both["train_data_sha256"] == by_shell("fineweb_train_*.bin")
    assert both["train_sha256"] == finished.result["train_sha256"], "which is of samples of all shards"


def test_a_byte_that_no_sample_sees_changes_the_hash(run, tiny_data, tmp_path):
    data = copy_of(tiny_data, tmp_path / "data")
    with_flipped_bit(shards_of(data, "train")[0], 1024 + 2 * 4300)
    honest, changed = (run(**QUICK, ITERATIONS=20, DATA_DIR=folder, ARTIFACT_DIR=tmp_path / name).result
                       for name, folder in (("honest", tiny_data), ("changed", data)))
    assert honest["train_sha256"] == changed["train_sha256"]
    assert honest["train_data_sha256"] != changed["train_data_sha256"]


def test_batches_do_not_wait_for_hashes(tiny_data, monkeypatch):
    may_hash = threading.Event()
    monkeypatch.setattr(tg, "sha256_of_file", lambda path: may_hash.wait(60) and "hash")
    paths = shards_of(tiny_data, "train")
    loader = tg.PackedLoader(paths, BOS, tiny_config(), 128, hash_shards=True)
    batches = list(loader.buffers(iter(range(200)), torch.device("cpu")))
    assert len(batches) == 200 and not any(future.done() for future in loader.hashes.values())
    may_hash.set()
    assert {future.result() for future in loader.hashes.values()} == {"hash"} and len(loader.hashes) == 2


def test_targets_left_out_are_counted(run, tmp_path):
    """Shards whose documents become short all at once: what a crowded buffer leaves out is in the result."""
    text = smoke_tokens("train")
    shorts = text[20_000:21_024].copy()
    shorts[::2] = BOS
    data = make_data(tmp_path / "data", [np.concatenate([text[:5120], shorts, text[5120:40_000]])],
                     [smoke_tokens("val")[:600]])
    loader = tg.PackedLoader(shards_of(data, "train"), BOS, tiny_config(), 128)
    loader.begin_stage(1 + 2, loader.shape_at(0.1))  # as a run of eight steps does once so much of it is done
    ignored = sum(int((loader.buffer(index).targets == tg.IGNORE).sum()) for index in range(8 * 8))
    assert ignored > 300
    outcome = run(**QUICK, DATA_DIR=data, ITERATIONS=8)
    assert outcome.result["targets_left_out"] == ignored
    assert f"targets_left_out:{ignored}\n" in outcome.out


def test_usually_none_is_left_out(finished):
    assert finished.result["targets_left_out"] == 0
