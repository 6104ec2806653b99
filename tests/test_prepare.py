"""data/prepare.py: documents to shards and back, held-out validation, mistakes. It made the bundled data."""
import gzip
import hashlib
import json
import lzma
import subprocess
import sys

import numpy as np
import pytest

import train_gpt as tg
from conftest import ROOT, SMOKE, TINY, as_environment

sys.path.insert(0, str(ROOT / "data"))
import prepare

DOCUMENTS = [json.loads(line)["text"] for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")][:120]
MODEL = SMOKE / "tokenizers/fineweb_1024_bpe.model"


def write_jsonl(path, documents, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    return path


def call(*arguments):
    command = [sys.executable, ROOT / "data/prepare.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def shards_in(folder, split):
    """The tokens of every shard of a split."""
    return [tg.open_shard(path) for path in sorted(folder.glob(f"datasets/*/fineweb_{split}_*.bin"))]


def texts_in(folder, split):
    """The documents of a split, decoded."""
    (model,) = folder.glob("tokenizers/*.model")
    sp = tg.lazy_import("sentencepiece").SentencePieceProcessor(model_file=str(model))
    stream = np.concatenate(shards_in(folder, split))
    bounds = np.append(np.flatnonzero(stream == sp.bos_id()), len(stream))
    return [sp.decode(stream[start + 1 : end].tolist()) for start, end in zip(bounds, bounds[1:])]


def manifest_in(folder):
    (path,) = folder.rglob("manifest.json")
    return json.loads(path.read_text())


def test_documents_come_back_in_order_from_whole_shards(tmp_path):
    inputs = [write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:50]),
              write_jsonl(tmp_path / "b.jsonl.xz", DOCUMENTS[50:90], lzma.open),
              write_jsonl(tmp_path / "c.jsonl.gz", DOCUMENTS[90:], gzip.open)]
    out = tmp_path / "out"
    done = call(*inputs, "--out", out, "--val-docs", 7, "--vocab-size", 600, "--shard-tokens", 20_000,
                "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "none of the 7 validation documents is among the 113 training documents" in done.stdout
    assert texts_in(out, "val") == DOCUMENTS[:7] and texts_in(out, "train") == DOCUMENTS[7:]
    shards = shards_in(out, "train")
    assert len(shards) > 2
    for tokens in shards:
        assert len(tokens) <= 20_000 and tokens[0] == 1, "every shard begins with a document"
    manifest = manifest_in(out)
    assert manifest["train"]["tokens"] == sum(map(len, shards))
    assert manifest["val"]["text_bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:7])
    assert not list(tmp_path.rglob("*.part"))
    tg.load_tokenizer(out / "tokenizers/fineweb_600_bpe.model", 600)


def test_the_script_runs_on_what_it_makes(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    out = tmp_path / "out"
    assert call(data, "--out", out, "--val-docs", 2, "--vocab-size", 512).returncode == 0
    places = dict(DATA_DIR=out, ARTIFACT_DIR=tmp_path / "run")
    settings = {**TINY, "VOCAB_SIZE": 512, "ITERATIONS": 2, "TTT_CHUNK_SIZE": 48}
    assert tg.main(as_environment({**settings, **places})) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["documents"] == 2
    assert result["bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:2])


def test_no_validation_document_is_trained_on(tmp_path):
    """Copies of validation documents later in the input are left out, and counted."""
    validation = DOCUMENTS[:5]
    rest = [DOCUMENTS[2], DOCUMENTS[6], DOCUMENTS[0], DOCUMENTS[7]]
    data = write_jsonl(tmp_path / "a.jsonl", validation + rest)
    out = tmp_path / "out"
    assert call(data, "--out", out, "--val-docs", 5, "--tokenizer", MODEL).returncode == 0
    assert texts_in(out, "train") == [DOCUMENTS[6], DOCUMENTS[7]]
    assert manifest_in(out)["train"]["left_out_copies"] == 2


@pytest.mark.parametrize("how,says", [
    ("lose", "documents decode to other text"), ("change", "1 documents decode"),
    ("leak", "1 are validation")])
def test_the_checks_can_fail(tmp_path, monkeypatch, how, says):
    """A shard that lost a document, changed a token or holds a validation document does not pass."""
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    honest_add = prepare.ShardWriter.add
    validation = []  # documents, as tokens

    def spoiling_add(self, ids):
        """Spoils the third training document."""
        if self.split == "val":
            validation.append(ids)
        elif self.documents == 2:
            if how == "lose":
                self.documents += 1
                return
            ids = np.append(ids[:-1], ids[-1] ^ 1).astype(np.uint16) if how == "change" else validation[0]
        honest_add(self, ids)

    monkeypatch.setattr(prepare.ShardWriter, "add", spoiling_add)
    out = tmp_path / "out"
    arguments = [data, "--out", out, "--val-docs", 3, "--tokenizer", MODEL, "--workers", 1]
    with pytest.raises(prepare.PrepareError, match=says):
        prepare.prepare(prepare.parse_arguments(list(map(str, arguments))))
    assert not list(out.rglob("fineweb10B_sp1024"))


def test_inexact_and_empty_documents_are_left_out_and_counted(tmp_path):
    validation, empty, inexact = DOCUMENTS[0], "", "a▁b"
    kept = [" leads", DOCUMENTS[1], "ends"]
    data = write_jsonl(tmp_path / "a.jsonl", [validation, empty, inexact, *kept])
    out = tmp_path / "out"
    assert call(data, "--out", out, "--val-docs", 1, "--tokenizer", MODEL).returncode == 0
    assert texts_in(out, "train") == kept
    train = manifest_in(out)["train"]
    assert (train["left_out_empty"], train["left_out_inexact"], train["begin_with_space"]) == (1, 1, 1)


@pytest.mark.parametrize("arguments,says", [
    (["missing.jsonl"], "cannot read missing.jsonl"),
    (["bad.jsonl"], "bad.jsonl:2: not a JSON object"),
    (["number.jsonl"], 'number.jsonl:1: not a JSON object with a text "text"'),
    (["cut.jsonl.xz"], "cannot read cut.jsonl.xz"),
    (["ok.jsonl", "--text-key", "body"], 'ok.jsonl:1: not a JSON object with a text "body"'),
    (["ok.jsonl", "--val-docs", "20"], "no document is left for training"),
    (["ok.jsonl", "--tokenizer", "bad.jsonl"], "not a SentencePiece model"),
    (["ok.jsonl", "--vocab-size", "60000"], "--vocab-size 60000"),
    (["ok.jsonl", "--vocab-size", "70000"], "--vocab-size wants 300 to 65536"),
    (["ok.jsonl", "--val-docs", "0"], "--val-docs"),
])
def test_mistakes_are_named(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "ok.jsonl", DOCUMENTS[:10])
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b'{"text": "x"}\n' * 1000)[:-20])
    if "--val-docs" not in arguments:
        arguments = [*arguments, "--val-docs", 1]
    done = call(*arguments, "--out", "out")
    assert done.returncode == 2 and says in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.bin"))


def test_existing_data_are_never_overwritten(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:10])
    out = tmp_path / "out"
    assert call(data, "--out", out, "--val-docs", 1, "--tokenizer", MODEL).returncode == 0
    again = call(data, "--out", out, "--val-docs", 2, "--tokenizer", MODEL)
    assert again.returncode == 2 and "exists: remove it or choose another --out" in again.stderr
    assert texts_in(out, "val") == DOCUMENTS[:1]


class Future:
    """A call that is made when its result is asked for."""

    def __init__(self, function, arguments):
        self.function = function
        self.arguments = arguments

    def result(self):
        return self.function(*self.arguments)


class Pool:
    """As much of an executor as bounded_map needs."""

    def submit(self, function, *arguments):
        return Future(function, arguments)


def test_memory_is_bounded():
    """However long the input, only so many batches are under way."""
    taken = []

    def batches():
        for number in range(100):
            taken.append(number)
            yield (number,)

    results = []
    for batch, result in prepare.bounded_map(Pool(), lambda number: number**2, batches(), depth=5):
        results.append((*batch, result))
        assert len(taken) - len(results) < 5
    assert results == [(number, number**2) for number in range(100)]


def test_bundled_shards_are_what_the_manifest_says():
    def sha256_of(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    manifest = manifest_in(SMOKE)
    assert sha256_of(MODEL) == manifest["tokenizer"]["sha256"]
    for split in ("train", "val"):
        for name, digest in manifest[split]["shards"].items():
            assert sha256_of(SMOKE / "datasets/fineweb10B_sp1024" / name) == digest
    rows = [json.loads(line) for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")]
    for row in rows:
        assert row["title"] and row["url"].startswith("https://en.wikipedia.org/")
    assert texts_in(SMOKE, "val") == [row["text"] for row in rows[:40]]
