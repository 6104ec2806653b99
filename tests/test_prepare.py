"""data/prepare.py: documents to shards and back, held-out validation, mistakes. It made the bundled data."""
import errno
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece

import train_gpt as tg
from conftest import ROOT, SMOKE, TINY, as_environment, tiny_config

sys.path.insert(0, str(ROOT / "data"))
import case_ops
import prepare

DOCUMENTS = [json.loads(line)["text"] for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")][:120]
MODEL = SMOKE / "tokenizers/fineweb_1024_bpe.model"


def write_jsonl(path, documents, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    return path


def command(*arguments):
    return list(map(str, [sys.executable, ROOT / "data/prepare.py", *arguments]))


def call(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, **options)


def files_in(folder):
    """Name, bytes and time of every file in a folder."""
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


def error_of(done):
    """The one line that a mistake ends with."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def refused(capfd):
    """refused(*arguments): that line, of a call in this process."""
    def run(*arguments):
        line = [os.fsdecode(argument) if isinstance(argument, bytes) else str(argument)
                for argument in arguments]
        return error_of(subprocess.CompletedProcess(line, prepare.main(line), *capfd.readouterr()))
    return run


def shards_in(folder, split):
    """The tokens of every shard of a split."""
    return [tg.open_shard(path) for path in sorted(folder.glob(f"datasets/*/fineweb_{split}_*.bin"))]


def documents_in(folder, split):
    """The documents of a split, lists of tokens without BOS, which is 1."""
    stream = np.concatenate(shards_in(folder, split))
    bounds = np.append(np.flatnonzero(stream == 1), len(stream))
    return [stream[start + 1 : end].tolist() for start, end in zip(bounds, bounds[1:])]


def texts_in(folder, split):
    """The documents of a split, decoded."""
    (model,) = folder.glob("tokenizers/*.model")
    sp = tg.lazy_import("sentencepiece").SentencePieceProcessor(model_file=str(model))
    return sp.decode(documents_in(folder, split))


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


@pytest.mark.parametrize("transform", ["", *case_ops.VERSIONS])
def test_the_script_runs_on_what_it_makes(tmp_path, transform):
    """And says which transform the text has, and counts the bytes of the text before it."""
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    out = tmp_path / "out"
    options = ["--case-ops", transform] if transform else []
    assert call(data, "--out", out, "--val-docs", 2, "--vocab-size", 512, *options).returncode == 0
    places = dict(DATA_DIR=out, ARTIFACT_DIR=tmp_path / "run")
    settings = {**TINY, "VOCAB_SIZE": 512, "ITERATIONS": 2, "TTT_CHUNK_SIZE": 48}
    assert tg.main(as_environment({**settings, **places})) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["documents"] == 2
    assert result["bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:2])
    log = (tmp_path / "run/log.txt").read_text()
    assert result.get("case_ops", "") == transform
    assert (f"\ncase operations: {transform} sidecars:0\n" in log) == bool(transform)


def test_no_validation_document_is_trained_on(tmp_path):
    """Copies of validation documents later in the input are left out, and counted; their bytes are not."""
    validation = DOCUMENTS[:5]
    rest = [DOCUMENTS[2], DOCUMENTS[6], DOCUMENTS[0], DOCUMENTS[7]]
    data = write_jsonl(tmp_path / "a.jsonl", validation + rest)
    out = tmp_path / "out"
    assert call(data, "--out", out, "--val-docs", 5, "--tokenizer", MODEL).returncode == 0
    assert texts_in(out, "train") == [DOCUMENTS[6], DOCUMENTS[7]]
    train = manifest_in(out)["train"]
    assert train["left_out_copies"] == 2
    assert train["text_bytes"] == sum(len(text.encode()) for text in (DOCUMENTS[6], DOCUMENTS[7]))


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


def test_empty_documents_are_left_out_and_counted(tmp_path):
    validation, empty = DOCUMENTS[0], ""
    kept = [" leads", DOCUMENTS[1], "ends"]
    data = write_jsonl(tmp_path / "a.jsonl", [validation, empty, *kept])
    out = tmp_path / "out"
    assert call(data, "--out", out, "--val-docs", 1, "--tokenizer", MODEL).returncode == 0
    assert texts_in(out, "train") == kept
    train = manifest_in(out)["train"]
    assert (train["left_out_empty"], train["left_out_inexact"], train["begin_with_space"]) == (1, 0, 1)


def test_what_sentencepiece_takes_for_a_space_comes_back_and_counts_its_bytes(tmp_path):
    """So that no document of the challenge's validation has to be left out."""
    odd = ["a\u2581b", "\u2581\u2581", " \u2581 The end\u2581"]
    validation, training = [*DOCUMENTS[:60], *odd], [f"{text}!" for text in odd]
    data = write_jsonl(tmp_path / "a.jsonl", validation + training)
    out = tmp_path / "out"
    assert call(data, "--out", out, "--val-docs", len(validation), "--tokenizer", MODEL).returncode == 0
    assert texts_in(out, "val") == validation and texts_in(out, "train") == training
    tokenizer = tg.load_tokenizer(MODEL, 1024)
    val = tg.load_validation([*out.glob("datasets/*/fineweb_val_*.bin")], tokenizer, tiny_config())
    documents = [*val.documents(0, 1)]
    tokenizer.check_bytes(documents, out)
    sizes = [int(tokenizer.target_bytes(ids).sum()) for ids in documents[60:]]
    assert sizes == [5, 6, len(odd[2].encode()) - 1]  # a space that begins a document does not count


@pytest.mark.parametrize("case_ops_of", ["", "v3"])
def test_training_stops_at_the_document_with_which_there_are_enough_tokens(tmp_path, case_ops_of):
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    options = ["--val-docs", 5, "--vocab-size", 600, "--workers", 1, "--shard-tokens", 3000]
    options += ["--case-ops", case_ops_of] if case_ops_of else []
    whole, part = tmp_path / "whole", tmp_path / "part"
    made = [prepare.prepare(prepare.parse_arguments(list(map(str, [data, "--out", out, *options, *more]))))
            for out, more in ((whole, []), (part, ["--train-tokens", "1e4"]))]
    assert made[0]["val"] == made[1]["val"] and made[0]["tokenizer"] == made[1]["tokenizer"]
    documents = documents_in(whole, "train")
    tokens = np.cumsum([1 + len(ids) for ids in documents])  # BOS as well
    enough = int(np.searchsorted(tokens, 10_000)) + 1
    assert made[1]["train"]["documents"] == enough < len(documents)
    assert documents_in(part, "train") == documents[:enough]


# Case operations

MARKERS = case_ops.MARKERS
ODD = [
    *MARKERS, 3 * MARKERS, f"{MARKERS[0]} The", f"The end{MARKERS[3]}", f" {MARKERS[3]} {MARKERS[1]}NASA",
    f"{MARKERS[3]}{MARKERS[0]}a", "A", " The", "  THE\n\nthe iPhone. McX", "\xc9COLE", "\U0001f600Ok\0B"]


@pytest.mark.parametrize("transform", case_ops.VERSIONS)
def test_transformed_documents_come_back(tmp_path, transform):
    """Those, too, that hold markers, are nothing else, or end in one; copies of validation are left out."""
    validation = [*ODD, *DOCUMENTS[:5]]
    rest = [*DOCUMENTS[5:], "\u2581The", "", *ODD, *(f"{text} {text}" for text in ODD)]
    data = write_jsonl(tmp_path / "a.jsonl", validation + rest)
    out = tmp_path / "out"
    done = call(data, "--out", out, "--val-docs", len(validation), "--vocab-size", 600,
                "--case-ops", transform)
    assert done.returncode == 0, done.stderr
    kept = {"val": validation, "train": [*DOCUMENTS[5:], "\u2581The", *rest[-len(ODD) :]]}
    manifest = manifest_in(out)
    assert manifest["case_ops"] == transform
    for split, texts in kept.items():
        written = texts_in(out, split)
        assert written == [case_ops.encode(text, transform) for text in texts] != texts
        assert [case_ops.decode(text, transform) for text in written] == texts
        assert manifest[split]["text_bytes"] == sum(len(text.encode()) for text in texts)
    left_out = {name: count for name, count in manifest["train"].items() if name.startswith("left_out")}
    assert left_out == dict(left_out_empty=1, left_out_inexact=0, left_out_copies=len(ODD))
    tokenizer = tg.load_tokenizer(out / "tokenizers/fineweb_600_bpe.model", 600)
    assert [tokenizer.processor.id_to_piece(i) for i in tokenizer.markers] == list(MARKERS)
    assert not any(set(MARKERS) & set(tokenizer.processor.id_to_piece(i)) for i in range(8, 600))


@pytest.mark.parametrize("spoil,says", [
    (lambda ids: np.append(ids, 4), "1 documents decode to other text"),  # TITLE, and no letter
    (lambda ids: ids[ids != 4], "1 documents decode to other text")])
def test_a_transform_that_is_not_exact_fails_the_check(tmp_path, monkeypatch, spoil, says):
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:40])
    honest_add = prepare.ShardWriter.add

    def spoiling_add(self, ids):
        is_spoilt = self.split == "train" and self.documents == 2
        honest_add(self, spoil(ids).astype("<u2") if is_spoilt else ids)

    monkeypatch.setattr(prepare.ShardWriter, "add", spoiling_add)
    arguments = [data, "--out", tmp_path / "out", "--val-docs", 3, "--vocab-size", 400, "--case-ops", "v2"]
    with pytest.raises(prepare.PrepareError, match=says):
        prepare.prepare(prepare.parse_arguments(list(map(str, arguments))))
    assert not list(tmp_path.rglob("fineweb10B_sp400"))


def test_what_a_wrong_transform_changes_is_left_out(tmp_path, monkeypatch):
    """Documents are compared with what comes back, whatever the transform does."""
    monkeypatch.setattr(case_ops, "encode", lambda text, transform: text.lower())
    data = write_jsonl(tmp_path / "a.jsonl", ["small letters only", "also this", "A capital", "the last"])
    model = tmp_path / "a.model"
    model.write_bytes(trained(user_defined_symbols=list(MARKERS)))
    arguments = [data, "--out", tmp_path / "out", "--val-docs", 1, "--tokenizer", model, "--case-ops", "v1",
                 "--workers", 1]
    manifest = prepare.prepare(prepare.parse_arguments(list(map(str, arguments))))
    assert (manifest["train"]["documents"], manifest["train"]["left_out_inexact"]) == (2, 1)


@pytest.mark.parametrize("options,symbols,says", [
    (["--case-ops", "v2"], [], "--case-ops v2: --tokenizer a.model does not have U+E001 to U+E004"),
    (["--case-ops", "v2"], MARKERS[:3], "--case-ops v2: --tokenizer a.model does not have U+E001 to U+E004"),
    ([], MARKERS, "a.model is for case operations: say which by --case-ops")])
def test_a_tokenizer_for_other_text_is_refused(tmp_path, monkeypatch, refused, options, symbols, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.model").write_bytes(trained(user_defined_symbols=list(symbols)))
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    said = refused(data, "--out", tmp_path / "out", "--val-docs", 2, "--tokenizer", "a.model", *options)
    assert says in said and not (tmp_path / "out").exists()


# Mistakes


@pytest.mark.parametrize("arguments,says", [
    (["missing.jsonl"], "cannot read missing.jsonl"),
    (["ok.jsonl", "."], "cannot read .: it is no file"),
    (["bad.jsonl"], "bad.jsonl:2: not a JSON object"),
    (["number.jsonl"], 'number.jsonl:1: not a JSON object with a text "text"'),
    (["deep.jsonl"], 'deep.jsonl:1: not a JSON object with a text "text" (RecursionError'),
    (["digits.jsonl"], 'digits.jsonl:1: not a JSON object with a text "text" (ValueError'),
    (["latin.jsonl"], "latin.jsonl:2: not a JSON object with a text \"text\" (UnicodeDecodeError: 'utf-8'"),
    (["surrogate.jsonl"], "position 9000: surrogates not allowed"),
    (["cut.jsonl.xz"], "cannot read cut.jsonl.xz"),
    (["flipped.jsonl.xz"], "cannot read flipped.jsonl.xz"),
    (["cut.jsonl.gz"], "cannot read cut.jsonl.gz"),
    (["flipped.jsonl.gz"], "cannot read flipped.jsonl.gz"),
    (["crc.jsonl.gz"], "cannot read crc.jsonl.gz"),
    (["ok.jsonl.gz"], "cannot read ok.jsonl.gz"),
    (["ok.jsonl", "--text-key", "body"], 'ok.jsonl:1: not a JSON object with a text "body"'),
    (["ok.jsonl", "--val-docs", "20"], "the input has no more than --val-docs"),
    (["ok.jsonl", "--vocab-size", "60000"], "--vocab-size 60000: these documents need at most"),
    (["ok.jsonl", "--vocab-size", "300"], "--vocab-size 300: these documents need at least"),
    (["ok.jsonl", "--vocab-size", "512", "--tokenizer", str(MODEL)], "has 1024 pieces"),
    (["ok.jsonl", "--out", "ok.jsonl"], "File exists: ok.jsonl"),
    ([b"no\xff\n.jsonl"], r"cannot read no\udcff\n.jsonl: No such file"),
])
def test_mistakes_are_named(tmp_path, monkeypatch, refused, arguments, says):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "ok.jsonl", DOCUMENTS[:10])
    (tmp_path / "ok.jsonl.gz").write_bytes((tmp_path / "ok.jsonl").read_bytes())
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "deep.jsonl").write_text('{"text": ' + 200_000 * "[" + "\n")
    (tmp_path / "digits.jsonl").write_text('{"text": ' + 5000 * "9" + "}\n")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "fine"}\n{"text": "caf\xe9"}\n'.encode("latin-1"))
    (tmp_path / "surrogate.jsonl").write_text('{"text": "' + 9000 * "x" + r'\ud800"}' + "\n")
    for suffix, compress in ((".xz", lzma.compress), (".gz", gzip.compress)):
        whole = compress(json.dumps({"text": DOCUMENTS[0]}).encode() + b"\n")
        flipped = whole[:200] + bytes(8) + whole[208:]
        (tmp_path / f"cut.jsonl{suffix}").write_bytes(whole[:-20])
        (tmp_path / f"flipped.jsonl{suffix}").write_bytes(flipped)
    (tmp_path / "crc.jsonl.gz").write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    before = files_in(tmp_path)
    if "--val-docs" not in arguments:
        arguments = [*arguments, "--val-docs", 1]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "out"]
    said = refused(*arguments)
    assert says in said and len(said) < 400
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("arguments,says", [
    (["--vocab-size", "70000"], "--vocab-size wants 300 to 65536"),
    (["--val-docs", "0"], "--val-docs"),
    (["--tokenizer-bytes", "0"], "--tokenizer-bytes"),
    (["--train-tokens", "nan"], "--train-tokens"),
    (["--shard-tokens", "3000000000"], "--shard-tokens wants 2 to 2147483647"),
    (["--workers", "0"], "--workers"),
])
def test_impossible_options_are_refused(capsys, arguments, says):
    with pytest.raises(SystemExit) as ended:
        prepare.main(["a.jsonl", "--out", "out", "--val-docs", "1", *arguments])
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_a_pipe_is_refused_and_a_file_behind_stdin_is_not(tmp_path):
    """The input is read several times. A pipe that nobody writes into would be waited for, too."""
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    os.mkfifo(tmp_path / "pipe.jsonl")
    arguments = ["--out", tmp_path / "out", "--val-docs", 2, "--tokenizer", MODEL]
    for name, text in (("/dev/stdin", data.read_text()), (tmp_path / "pipe.jsonl", "")):
        said = error_of(call(name, *arguments, input=text))
        assert f"cannot read {name}: it is no file" in said and not (tmp_path / "out").exists()
    with open(data) as file:
        done = call("/dev/stdin", *arguments, stdin=file)
    assert done.returncode == 0 and texts_in(tmp_path / "out", "train") == DOCUMENTS[2:9]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch, refused):
    """Not read into memory: however long it is, or becomes when it is decompressed."""
    monkeypatch.setattr(prepare, "MOST_LINE", 1000)
    data = tmp_path / "a.jsonl.gz"
    data.write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": "' + 2000 * b"x"))
    said = refused(data, "--out", tmp_path / "out", "--val-docs", 1, "--tokenizer", MODEL)
    assert "a.jsonl.gz:2: a line of more than" in said


# Tokenizers


def trained(**changes) -> bytes:
    """A tokenizer, trained otherwise than prepare.py does."""
    model = io.BytesIO()
    options = dict(
        sentence_iterator=iter(DOCUMENTS[:40]), vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(model_writer=model, **{**options, **changes})
    return model.getvalue()


def without_spaces() -> bytes:
    return trained(sentence_iterator=(text.replace(" ", "") for text in DOCUMENTS[:40]))


REFUSED = {
    "no BOS piece": lambda: trained(bos_id=-1),
    "no BOS piece, and": lambda: trained(user_defined_symbols=["<s>"]),  # which texts can hold
    "has a space inside": lambda: trained(split_by_whitespace=False, vocab_size=900),
    "has no piece \u2581": without_spaces,
    "not a SentencePiece model": lambda: b"text",
    "it is empty": lambda: b"",
    "or damaged": lambda: MODEL.read_bytes()[:-3],
}


@pytest.mark.parametrize("says", REFUSED)
def test_tokenizers_that_train_gpt_cannot_count_with_are_refused(tmp_path, refused, says):
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    model = tmp_path / "a.model"
    model.write_bytes(REFUSED[says]())
    assert says in refused(data, "--out", tmp_path / "out", "--val-docs", 2, "--tokenizer", model)
    assert not (tmp_path / "out").exists()


def test_more_pieces_than_a_token_can_name_are_refused(monkeypatch):
    monkeypatch.setattr(prepare, "MOST_PIECES", 1023)
    with pytest.raises(prepare.PrepareError, match="has 1024 pieces"):
        prepare.open_tokenizer(MODEL.read_bytes(), "it")


@pytest.mark.parametrize("changes", [
    {}, {"add_dummy_prefix": True}, {"normalization_rule_name": "nmt_nfkc"}, {"model_type": "unigram"},
    {"remove_extra_whitespaces": True}, {"user_defined_symbols": ["<br>"]}])
def test_train_gpt_counts_the_bytes_of_what_is_written(tmp_path, changes):
    """With every tokenizer that is accepted; and it is said which of them change text."""
    texts = [*DOCUMENTS[:6], "plain words only", "a  b", "\ufb01ne", "<s> is no BOS<br>"]
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    model = tmp_path / "a.model"
    model.write_bytes(trained(**changes))
    out = tmp_path / "out"
    done = call(data, "--out", out, "--val-docs", 9, "--tokenizer", model)
    tokenizer = tg.load_tokenizer(model, 400)
    changes_text = bool({"normalization_rule_name", "remove_extra_whitespaces"} & set(changes))
    assert ("it changes texts, such as" in done.stdout) == changes_text
    assert ("it gives back spaces" in done.stdout) != changes_text
    assert done.returncode == 0, done.stderr
    kept = texts_in(out, "val")
    assert manifest_in(out)["val"]["left_out_inexact"] == 9 - len(kept)
    assert (len(kept) < 9) == changes_text
    (shard,) = shards_in(out, "val")
    counted = tokenizer.target_bytes(np.append(shard, tokenizer.bos).astype(np.int64)).sum()
    assert counted == sum(len(text.encode()) for text in kept)


# What is there already, who else is at work, and ends before the end


def test_existing_data_are_never_overwritten(tmp_path, refused):
    """Neither shards nor their tokenizer, by a call that is refused."""
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:40])
    out = tmp_path / "out"
    other = tmp_path / "other.model"
    other.write_bytes(trained(vocab_size=1024, sentence_iterator=iter(DOCUMENTS)))
    assert call(data, "--out", out, "--val-docs", 1, "--tokenizer", MODEL).returncode == 0
    before = files_in(out)
    for options in (["--tokenizer", MODEL], ["--tokenizer", other], ["--vocab-size", 1024]):
        said = refused(data, "--out", out, "--val-docs", 2, *options)
        assert "exists: remove it or choose another --out" in said and files_in(out) == before


def test_an_existing_tokenizer_is_used_or_stays(tmp_path, refused):
    """One without shards, as after their removal."""
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:40])
    out = tmp_path / "out"
    there = out / "tokenizers/fineweb_400_bpe.model"
    there.parent.mkdir(parents=True)
    there.write_bytes(trained())
    other = tmp_path / "other.model"
    other.write_bytes(trained(sentence_iterator=iter(DOCUMENTS[40:])))
    before = files_in(out)
    for options, remedy in ((["--tokenizer", other], "choose another --out"),
                            (["--vocab-size", 400], "name it with --tokenizer")):
        assert remedy in refused(data, "--out", out, "--val-docs", 2, *options)
        assert files_in(out) == before
    assert call(data, "--out", out, "--val-docs", 2, "--tokenizer", there).returncode == 0
    assert before.items() <= files_in(out).items() and texts_in(out, "val") == DOCUMENTS[:2]


def test_two_at_work_in_one_folder(tmp_path):
    """The second is told so at once, and touches nothing."""
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    out = tmp_path / "out"
    part = out / "datasets/fineweb10B_sp1024.part"
    part.mkdir(parents=True)
    (part / "fineweb_val_000000.bin").write_bytes(b"what the first has written")
    arguments = [data, "--out", out, "--val-docs", 2, "--tokenizer", MODEL]
    with prepare.command.claim(out):
        before = files_in(out)
        said = error_of(call(*arguments))
        assert "another prepare.py or download.py is at work there" in said and f": {out}\n" in said
        assert files_in(out) == before
    assert call(*arguments).returncode == 0
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "fineweb_1024_bpe.model", "fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json"]


@pytest.fixture(scope="module")
def long_input(tmp_path_factory):
    """Documents that take long enough to be interrupted."""
    return write_jsonl(tmp_path_factory.mktemp("long") / "a.jsonl", DOCUMENTS * 100)


def start(wait_for, *arguments):
    """A process that has come so far as to make a file or folder."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while not wait_for.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("options,val_docs,begun", [
    (["--vocab-size", 8192], 3, ""), (["--tokenizer", MODEL], 9000, "fineweb_val_000000.bin"),
    (["--tokenizer", MODEL], 3, "fineweb_train_000000.bin"),
    (["--vocab-size", 1024, "--case-ops", "v2", "--tokenizer-bytes", 10**6], 3, "fineweb_train_000000.bin")],
    ids=["tokenizer", "validation", "training", "case operations"])
def test_ctrl_c_ends_in_one_line_and_leaves_nothing(tmp_path, long_input, options, val_docs, begun):
    """While the tokenizer is trained, and while shards are written."""
    pieces = options[1] if options[0] == "--vocab-size" else 1024
    part = tmp_path / f"out/datasets/fineweb10B_sp{pieces}.part"
    process = start(part / begun, long_input, "--out", tmp_path / "out", "--val-docs", val_docs, *options)
    os.killpg(process.pid, signal.SIGINT)  # as a console does, which tells all processes of the group
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "error: interrupted\n"
    assert not files_in(tmp_path) and not part.exists()


def test_what_a_killed_process_left_does_not_matter(tmp_path, long_input):
    out = tmp_path / "out"
    part = out / "datasets/fineweb10B_sp1024.part"
    arguments = "--out", out, "--val-docs", 3, "--tokenizer", MODEL
    process = start(part / "fineweb_train_000000.bin", long_input, *arguments)
    process.kill()
    process.communicate()
    (part / "fineweb_train_000007.bin").write_bytes(b"of the killed process")
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    assert call(data, *arguments).returncode == 0
    assert texts_in(out, "train") == DOCUMENTS[3:9]
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "fineweb_1024_bpe.model", "fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json"]


def test_a_full_disk_ends_in_one_line(tmp_path):
    """The system's own refusal: here files may have no more than so many bytes."""
    resource = pytest.importorskip("resource")
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    out = tmp_path / "out"
    limit = 100_000  # the shards of validation fit, those of training do not
    done = call(data, "--out", out, "--val-docs", 9, "--tokenizer", MODEL,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert f"File too large: {out}" in error_of(done) and not files_in(out)


@pytest.mark.parametrize("moment", ["write", "flush", "name the tokenizer", "name the folder"])
def test_nothing_half_there_whenever_the_disk_fails(tmp_path, monkeypatch, refused, moment):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    places = {"write": (prepare.ShardWriter, "add"), "flush": (os, "fsync"),
              "name the tokenizer": (os, "replace"), "name the folder": (prepare.pathlib.Path, "rename")}
    monkeypatch.setattr(*places[moment], fail)
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    out = tmp_path / "out"
    said = refused(data, "--out", out, "--val-docs", 2, "--tokenizer", MODEL)
    assert said == f"error: No space left on device: {out}\n"
    assert not files_in(out) and not list(out.rglob("fineweb10B*"))


def test_too_little_memory_ends_in_one_line(tmp_path, monkeypatch, refused):
    """As SentencePiece reports it, from its thread."""
    def fail(**_):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", fail)
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    said = refused(data, "--out", tmp_path / "out", "--val-docs", 2)
    assert said == "error: out of memory: lower --tokenizer-bytes\n" and not files_in(tmp_path / "out")


@pytest.mark.parametrize("console,status", [("closed", 0), ("gone", 0), ("full", 2)])
def test_a_console_that_is_gone_costs_no_data(tmp_path, console, status):
    """Whoever listened is gone: the work is done. A full disk behind it is said."""
    if console == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:9])
    line = command(data, "--out", tmp_path / "out", "--val-docs", 2, "--tokenizer", MODEL)
    how = {"closed": ">&- 2>&-", "gone": "| true; exit ${PIPESTATUS[0]}", "full": "> /dev/full"}[console]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", f'"$@" {how}', "-", *line], capture_output=True, text=True, env=env)
    assert done.returncode == status
    assert bool(list((tmp_path / "out").rglob("manifest.json"))) == (status == 0)
    assert done.stderr == ("" if status == 0 else f"error: No space left on device: {tmp_path / 'out'}\n")


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sentencepiece'] = None\n")
    done = call("a.jsonl", "--out", tmp_path / "out", "--val-docs", 2,
                env={**os.environ, "PYTHONPATH": str(tmp_path)})
    said = error_of(done)
    assert "sentencepiece" in said and "pip install -r requirements.txt" in said


def test_memory_is_bounded(tmp_path, monkeypatch):
    """However long the input, only so much of it is held before it is tokenized, or read back."""
    monkeypatch.setattr(prepare, "BATCH_BYTES", 100)
    held = []
    most = 0

    def documents(*_):
        for number in range(1000):
            held.append(number)
            yield f"text {number}"

    def take(function):
        def taking(job, batch):
            nonlocal most
            most = max(most, len(held))
            held.clear()
            return function(job, batch)
        return taking

    monkeypatch.setattr(prepare, "read_documents", documents)
    monkeypatch.setattr(prepare.Job, "encode", take(prepare.Job.encode))
    job = prepare.Job(prepare.open_tokenizer(MODEL.read_bytes(), "it"), 1, [], "text", 1, tmp_path)
    _, paths, kept = prepare.write_split(job, "train", 1000, math.inf, set())
    assert len(kept) == 999 and most <= 2 * (100 // len("text 0") + 1)
    most = 0
    held.clear()
    monkeypatch.setattr(prepare.Job, "decode", take(prepare.Job.decode))
    prepare.verify_split(job, "train", paths, kept, set())
    assert most <= 2 * (100 // len("text 0") + 1) + 1, "the document that is left for validation is read, too"


BUNDLED = {SMOKE: "", SMOKE.with_name("smoke-v3"): "v3"}  # and the transform of its text


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda folder: folder.name)
def test_bundled_data_are_made_by_the_command_in_their_readme(tmp_path, folder):
    readme = (SMOKE / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(f"^    python (data/prepare.py .+ --out data/{folder.name} .+)$", readme, flags=re.M)
    arguments = line.replace(f"--out data/{folder.name}", f"--out {tmp_path}").split()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {name: (folder / name).read_bytes() for name in made} and len(made) == 6


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda folder: folder.name)
def test_bundled_shards_are_what_the_manifest_says(folder):
    def sha256_of(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    manifest = manifest_in(folder)
    transform = BUNDLED[folder]
    assert manifest.get("case_ops", "") == transform
    assert sha256_of(folder / "tokenizers/fineweb_1024_bpe.model") == manifest["tokenizer"]["sha256"]
    for split in ("train", "val"):
        for name, digest in manifest[split]["shards"].items():
            assert sha256_of(folder / "datasets/fineweb10B_sp1024" / name) == digest
    rows = [json.loads(line) for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")]
    for row in rows:
        assert row["title"] and row["url"].startswith("https://en.wikipedia.org/")
    texts = texts_in(folder, "val")
    if transform:
        texts = [case_ops.decode(text, transform) for text in texts]
    assert texts == [row["text"] for row in rows[:40]]
