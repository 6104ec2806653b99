"""data/prepare.py: documents to shards and back, held-out validation, mistakes; and the bundled data are its product."""
import gzip
import json
import lzma
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMOKE, TINY

import train_gpt as tg

sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402

DOCUMENTS = [json.loads(line)["text"] for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")][:120]
MODEL = SMOKE / "tokenizers/fineweb_1024_bpe.model"


def jsonl(path, documents, opener=open, key="text"):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({key: text}) + "\n" for text in documents)
    return path


def call(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "data/prepare.py"), *map(str, arguments)], capture_output=True, text=True)


def texts_of(folder, split):
    sp = tg.tool("sentencepiece").SentencePieceProcessor(model_file=str(next((folder / "tokenizers").glob("*.model"))))
    shards = [tg.open_shard(path) for path in sorted(folder.glob(f"datasets/*/fineweb_{split}_*.bin"))]
    stream = np.concatenate(shards)
    starts = np.append(np.flatnonzero(stream == sp.bos_id()), len(stream))
    return [sp.decode(stream[a + 1 : b].tolist()) for a, b in zip(starts[:-1], starts[1:])], shards


def test_documents_come_back_in_order_from_whole_shards(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", DOCUMENTS[:50])
    b = jsonl(tmp_path / "b.jsonl.xz", DOCUMENTS[50:90], lzma.open)
    c = jsonl(tmp_path / "c.jsonl.gz", DOCUMENTS[90:], gzip.open)
    done = call(a, b, c, "--out", tmp_path / "o", "--val-docs", 7, "--vocab-size", 600, "--shard-tokens", 20_000, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "none of the 7 validation documents is among the 113 training documents" in done.stdout
    val, _ = texts_of(tmp_path / "o", "val")
    train, shards = texts_of(tmp_path / "o", "train")
    assert val == DOCUMENTS[:7] and train == DOCUMENTS[7:]
    assert len(shards) > 2 and all(len(s) <= 20_000 and s[0] == 1 for s in shards), "every shard begins with a document"
    manifest = json.loads(next((tmp_path / "o").rglob("manifest.json")).read_text())
    assert manifest["train"]["tokens"] == sum(map(len, shards)) and manifest["val"]["text_bytes"] == sum(len(t.encode()) for t in val)
    assert not list(tmp_path.rglob("*.part"))
    tg.load_tokenizer(tmp_path / "o/tokenizers/fineweb_600_bpe.model", 600)


def test_the_script_runs_on_what_it_makes(tmp_path, capfd):
    data = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert call(data, "--out", tmp_path / "o", "--val-docs", 2, "--vocab-size", 512).returncode == 0
    env = {**TINY, "DATA_DIR": tmp_path / "o", "VOCAB_SIZE": 512, "ARTIFACT_DIR": tmp_path / "r", "ITERATIONS": 2, "TTT_CHUNK_SIZE": 48}
    assert tg.main({k: str(v) for k, v in env.items()}) == 0
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["documents"] == 2 and result["bytes"] == sum(len(t.encode()) for t in DOCUMENTS[:2])


def test_no_validation_document_is_trained_on(tmp_path):
    """Copies of validation documents later in the input are left out, and counted."""
    data = jsonl(tmp_path / "a.jsonl", DOCUMENTS[:5] + [DOCUMENTS[2], DOCUMENTS[6], DOCUMENTS[0], DOCUMENTS[7]])
    assert call(data, "--out", tmp_path / "o", "--val-docs", 5, "--tokenizer", MODEL).returncode == 0
    assert texts_of(tmp_path / "o", "train")[0] == [DOCUMENTS[6], DOCUMENTS[7]]
    assert json.loads(next((tmp_path / "o").rglob("manifest.json")).read_text())["train"]["left_out_copies"] == 2


def test_the_checks_can_fail(tmp_path, monkeypatch):
    """A shard that lost a document, changed a token or holds a validation document does not pass."""
    data = jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    original = prepare.ShardWriter.add

    def spoil(how):
        def add(self, ids):
            if self.split == "train" and self.documents == 2:
                if how == "lose":
                    self.documents += 1
                    return
                ids = np.append(ids[:-1], ids[-1] ^ 1).astype(np.uint16) if how == "change" else VAL[0]
            elif self.split == "val":
                VAL.append(ids)
            original(self, ids)
        return add

    for how, says in (("lose", "documents decode to other text"), ("change", "1 documents decode"), ("leak", "1 are validation")):
        VAL: list = []
        monkeypatch.setattr(prepare.ShardWriter, "add", spoil(how))
        args = prepare.parse_arguments([str(data), "--out", str(tmp_path / how), "--val-docs", "3", "--tokenizer", str(MODEL), "--workers", "1"])
        with pytest.raises(prepare.PrepareError, match=says):
            prepare.prepare(args)
        assert not list((tmp_path / how).rglob("fineweb10B_sp1024"))


def test_inexact_and_empty_documents_are_left_out_and_counted(tmp_path):
    data = jsonl(tmp_path / "a.jsonl", [DOCUMENTS[0], "", "a▁b", " leads", DOCUMENTS[1], "ends"])
    done = call(data, "--out", tmp_path / "o", "--val-docs", 1, "--tokenizer", MODEL)
    assert done.returncode == 0 and texts_of(tmp_path / "o", "train")[0] == [" leads", DOCUMENTS[1], "ends"]
    train = json.loads(next((tmp_path / "o").rglob("manifest.json")).read_text())["train"]
    assert (train["left_out_empty"], train["left_out_inexact"], train["begin_with_space"]) == (1, 1, 1)


@pytest.mark.parametrize("arguments,says", [
    (["missing.jsonl"], "cannot read missing.jsonl"), (["bad.jsonl"], "bad.jsonl:2: not a JSON object"),
    (["number.jsonl"], 'number.jsonl:1: not a JSON object with a text "text"'), (["cut.jsonl.xz"], "cannot read cut.jsonl.xz"),
    (["ok.jsonl", "--text-key", "body"], 'ok.jsonl:1: not a JSON object with a text "body"'), (["ok.jsonl", "--val-docs", "20"], "no document is left for training"),
    (["ok.jsonl", "--tokenizer", "bad.jsonl"], "not a SentencePiece model"), (["ok.jsonl", "--vocab-size", "60000"], "--vocab-size 60000"),
    (["ok.jsonl", "--vocab-size", "70000"], "--vocab-size wants 300 to 65536"), (["ok.jsonl", "--val-docs", "0"], "--val-docs"),
])
def test_mistakes_are_named(tmp_path, arguments, says):
    jsonl(tmp_path / "ok.jsonl", DOCUMENTS[:10])
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b'{"text": "x"}\n' * 1000)[:-20])
    named = [tmp_path / a if a.endswith((".jsonl", ".xz")) and "missing" not in a else a for a in arguments]
    done = call(*named, "--out", tmp_path / "o", *(["--val-docs", 1] if "--val-docs" not in arguments else []))
    assert done.returncode == 2 and says in done.stderr.replace(f"{tmp_path}/", "")
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.bin"))


def test_existing_data_are_never_overwritten(tmp_path):
    data = jsonl(tmp_path / "a.jsonl", DOCUMENTS[:10])
    assert call(data, "--out", tmp_path / "o", "--val-docs", 1, "--tokenizer", MODEL).returncode == 0
    again = call(data, "--out", tmp_path / "o", "--val-docs", 2, "--tokenizer", MODEL)
    assert again.returncode == 2 and "exists: remove it or choose another --out" in again.stderr
    assert texts_of(tmp_path / "o", "val")[0] == DOCUMENTS[:1]


def test_memory_is_bounded():
    """However long the input, only so many batches are under way."""
    taken, done = [], []

    class Pool:
        def submit(self, function, *batch):
            return type("Future", (), {"result": lambda self: function(*batch)})()

    def source():
        for i in range(100):
            taken.append(i)
            yield (i,)

    for (i,), result in prepare.bounded_map(Pool(), lambda x: x * x, source(), depth=5):
        done.append(result)
        assert len(taken) - len(done) < 5
    assert done == [i * i for i in range(100)]


def test_bundled_shards_are_what_the_manifest_says():
    import hashlib
    manifest = json.loads((SMOKE / "datasets/fineweb10B_sp1024/manifest.json").read_text())
    assert hashlib.sha256(MODEL.read_bytes()).hexdigest() == manifest["tokenizer"]["sha256"]
    for split in ("train", "val"):
        for name, digest in manifest[split]["shards"].items():
            assert hashlib.sha256((SMOKE / "datasets/fineweb10B_sp1024" / name).read_bytes()).hexdigest() == digest
    lines = [json.loads(line) for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")]
    assert all(line["title"] and line["url"].startswith("https://en.wikipedia.org/") for line in lines)
    assert texts_of(SMOKE, "val")[0] == [line["text"] for line in lines[:40]]
