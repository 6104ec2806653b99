"""data/case_ops.py: exact both ways, equal to the published transform and to naive loops, and causal."""
import hashlib
import itertools
import json
import random
import string
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import train_gpt as tg
from conftest import ROOT, SMOKE

sys.path.insert(0, str(ROOT / "data"))
import prepare
from case_ops import ALLCAPS, CAPNEXT, ESC, MARKERS, TITLE, VERSIONS, CaseError, decode, encode

pytestmark = pytest.mark.check

PUBLISHED = json.loads((ROOT / "tests/golden/case_ops_v1.json").read_text())
DOCUMENTS = [json.loads(line)["text"] for line in open(SMOKE / "smoke.jsonl", encoding="utf-8")]
LETTERS = set(string.ascii_letters)


def short_texts():
    """All texts of up to four characters of every kind that a rule tells apart."""
    alphabet = "aB .5\n\xc9" + TITLE + ALLCAPS + CAPNEXT + ESC
    for length in range(5):
        yield from map("".join, itertools.product(alphabet, repeat=length))


def random_texts(count: int = 3000, longest: int = 40):
    """Texts with many markers, spaces, sentence ends and capitals."""
    rng = random.Random(0)
    others = "\r\t'\"-\u201c\u2026\xa0\xc9\xe9\u0130\u017f\u212a\u6f2207"
    alphabet = "abcXYZ" + 4 * " " + "..!?\n" + others + MARKERS
    for _ in range(count):
        yield "".join(rng.choices(alphabet, k=rng.randrange(longest)))


# ---- The rules, by the character ---------------------------------------------------------------------------


def is_start(text: str, place: int) -> bool:
    """Whether a document, a line or a sentence starts with the letter at this place."""
    begin = place
    while begin and text[begin - 1] in GAP:
        begin -= 1
    gap = text[begin:place]
    sentence = any(c in ".!?" and " " in gap[i:] for i, c in enumerate(gap))
    return begin == 0 or "\n" in gap or sentence


GAP = {c for c in map(chr, range(128)) if c not in LETTERS and not c.isdigit()}
GAP |= set("\xa0\xab\xbb\u2013\u2014\u2018\u2019\u201c\u201d\u2022\u2026")


def marks_of(run: str, predicted: bool) -> list[str]:
    """What stands before every letter of a run. `predicted`: a capital is the default at its start."""
    if len(run) > 1 and run.isupper():
        return [ALLCAPS] + [""] * (len(run) - 1)
    first = TITLE if run[0].isupper() else ""
    if predicted:
        first = "" if run[0].isupper() else CAPNEXT
    return [first] + [CAPNEXT if letter.isupper() else "" for letter in run[1:]]


def naive(text: str, version: str) -> str:
    units = []  # an operation, a character, or ESC with a marker
    for is_run, places in itertools.groupby(range(len(text)), lambda place: text[place] in LETTERS):
        places = list(places)
        run = text[places[0] : places[-1] + 1]
        if is_run:
            marks = marks_of(run, version == "v3" and is_start(text, places[0]))
            units += [unit for pair in zip(marks, run.lower()) for unit in pair if unit]
        else:
            units += [ESC + c if c in MARKERS else c for c in run]
    if version != "v1":
        v1 = list(units)
        for i in range(len(v1) - 1):
            before = v1[i - 1][-1] if i else ""
            if v1[i] == " " and v1[i + 1] in (TITLE, ALLCAPS, CAPNEXT) and before not in (" ", *MARKERS):
                units[i : i + 2] = v1[i + 1], " "
    return "".join(units)


# ---- Properties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,transformed", PUBLISHED["pairs"], ids=range(len(PUBLISHED["pairs"])))
def test_v1_is_the_published_transform(text, transformed):
    assert encode(text, "v1") == transformed and decode(transformed, "v1") == text


def test_v1_of_all_bundled_documents_is_the_published_one():
    """Their digest is by the published tool."""
    transformed = "".join(encode(text, "v1") + "\0" for text in DOCUMENTS)
    assert hashlib.sha256(transformed.encode()).hexdigest() == PUBLISHED["smoke_sha256"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_text_comes_back_and_is_what_the_rules_say(version):
    for text in itertools.chain(short_texts(), random_texts(), DOCUMENTS[:20]):
        encoded = encode(text, version)
        assert encoded == naive(text, version), ascii(text)
        assert decode(encoded, version) == text, ascii(text)


@pytest.mark.parametrize("version", VERSIONS)
def test_bundled_documents_come_back(version):
    for text in DOCUMENTS:
        encoded = encode(text, version)
        assert not set(encoded) & set(string.ascii_uppercase) and decode(encoded, version) == text


@pytest.mark.parametrize("version", VERSIONS)
def test_what_comes_later_changes_nothing(version):
    """A prefix decodes to a prefix, unless it ends before the letter that an operation is for."""
    for text in itertools.chain(random_texts(300), [DOCUMENTS[0][:400]]):
        encoded = encode(text, version)
        for end in range(len(encoded) + 1):
            waits = encoded[:end].rstrip(" ")[-1:] in tuple(MARKERS)
            try:
                assert text.startswith(decode(encoded[:end], version)), (ascii(text), end)
            except CaseError:
                assert waits, (ascii(text), end)


@pytest.mark.parametrize("text,v2,v3", [
    ("The end. The END", f"{TITLE}the end.{TITLE} the{ALLCAPS} end", f"the end. the{ALLCAPS} end"),
    ("so  The", f"so  {TITLE}the", f"{CAPNEXT}so  {TITLE}the"),
    ("So. so", f"{TITLE}so. so", f"so.{CAPNEXT} so"),
    ("1. iPhone\n- McX", f"1. i{CAPNEXT}phone\n- {TITLE}mc{CAPNEXT}x".replace(f" {TITLE}", f"{TITLE} "),
     f"1.{CAPNEXT} i{CAPNEXT}phone\n- mc{CAPNEXT}x"),
    ("U.S. \u201cYes\u201d v1.0", f"{TITLE}u.{TITLE}s. \u201c{TITLE}yes\u201d v1.0",
     f"u.{TITLE}s. \u201cyes\u201d v1.0"),
    (f"A{ESC} The", f"{TITLE}a{ESC}{ESC} {TITLE}the", f"a{ESC}{ESC} {TITLE}the"),
])
def test_examples(text, v2, v3):
    assert encode(text, "v2") == v2 and encode(text, "v3") == v3


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("malformed", [
    TITLE, f"{TITLE}.", f"{TITLE}\xe9", f"a{ALLCAPS}", f"{CAPNEXT}{TITLE}a", f"{ALLCAPS}{ESC}{TITLE}", ESC,
    f"{ESC}a", f"{ESC}{ESC}{ESC}", "A", f"{TITLE}A", f"a {TITLE}", f"{TITLE}  a"])
def test_what_no_transform_writes_is_refused(malformed, version):
    with pytest.raises(CaseError):
        decode(malformed, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_decoding_what_no_transform_writes_is_defined_or_refused(version):
    """Random markers decode to a text that has a transform, or not at all."""
    rng = random.Random(1)
    decoded = 0
    for _ in range(20_000):
        encoded = "".join(rng.choices("ab .\n" + MARKERS, k=rng.randrange(7)))
        try:
            text = decode(encoded, version)
        except CaseError:
            continue
        decoded += 1
        assert decode(encode(text, version), version) == text
    assert 2000 < decoded < 18_000


# ---- Tokens and bytes --------------------------------------------------------------------------------------

NASTY = [
    "", "A", " A", "  A", " ", " \n The", "The", " The THE tHe", "\n\n", "a\xa0B", "\xc9COLE \u212aELVIN",
    *MARKERS, MARKERS, 3 * ESC, 4 * ESC, f" {TITLE}", f"end {TITLE}", f"end{ESC}", f"{TITLE} The",
    f"{ESC} The", "\u0130I",
    f" {ESC} {ALLCAPS}NASA {CAPNEXT}", f"{ESC}{TITLE} {ESC}{ESC}A", f"A.{CAPNEXT} b", "\U0001f600Ok \u6f22B"]


@pytest.fixture(scope="module", params=VERSIONS)
def form(request):
    """A transform, and a tokenizer trained on what it writes, as train_gpt.py reads it."""
    version = request.param
    written = [encode(text, version) for text in DOCUMENTS[:200]]
    model = prepare.train_tokenizer(written, 700, 1 << 30, MARKERS)
    return version, model, load(model)


def load(model: bytes) -> tg.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.model"
        path.write_bytes(model)
        return tg.load_tokenizer(path, 700)


def tokens_of(text: str, form) -> np.ndarray:
    """A document, BOS first."""
    version, _, tokenizer = form
    return np.array([tokenizer.bos, *tokenizer.processor.encode(encode(text, version))])


def test_the_bytes_of_a_document_are_those_of_its_text(form):
    """But for a space that begins it, with and without operations in front."""
    *_, tokenizer = form
    for text in itertools.chain(NASTY, random_texts(1000), DOCUMENTS):
        tokens = tokens_of(text, form)
        assert tokenizer.target_bytes(tokens).sum() == len(text.encode()) - text.startswith(" "), ascii(text)
        tokenizer.check_bytes([tokens], Path("it"))


def test_the_bytes_of_a_stream_are_those_of_its_documents(form):
    """Nothing reaches over a BOS: neither an ESC at a document's end nor the rule of spaces."""
    *_, tokenizer = form
    texts = [text for text in NASTY if text]
    documents = [tokens_of(text, form) for text in texts]
    stream = np.append(np.concatenate(documents), tokenizer.bos)
    sizes = np.split(tokenizer.target_bytes(stream), np.cumsum(list(map(len, documents)))[:-1])
    assert [int(size.sum()) for size in sizes] == [len(t.encode()) - t.startswith(" ") for t in texts]


def test_bytes_follow_from_what_stands_before(form):
    """The bytes of a document's first tokens are those of the text that they decode to."""
    version, _, tokenizer = form
    compared = 0
    for text in [*NASTY, DOCUMENTS[3][:500]]:
        tokens = tokens_of(text, form)
        sizes = tokenizer.target_bytes(tokens)
        for end in range(len(tokens)):
            try:
                decoded = decode(tokenizer.processor.decode(tokens[1 : end + 1].tolist()), version)
            except CaseError:  # an operation waits for its letter
                continue
            if "\ufffd" not in decoded:
                size = len(decoded.encode()) - decoded.startswith(" ")
                assert sizes[:end].sum() == size, (ascii(text), end)
                compared += 1
    assert compared > 300


def test_operations_weigh_nothing_and_escaped_markers_three(form):
    *_, tokenizer = form
    title, _, capnext, escape = tokenizer.markers
    the, a = map(tokenizer.processor.piece_to_id, ("\u2581the", "a"))
    tokens = [title, the, title, the, escape, title, the, escape, escape, capnext, a]
    sizes = tokenizer.target_bytes(np.array([tokenizer.bos, *tokens]))
    assert sizes.tolist() == [0, 3, 0, 4, 0, 3, 4, 0, 3, 0, 1]


def silent_none(self, tokens):
    return np.zeros(len(tokens), dtype=bool)


def silent_all(self, tokens):
    return np.isin(tokens, self.markers)


@pytest.mark.parametrize("rule,text", [
    (silent_none, "in The end"), (silent_all, f"the end{TITLE}"), (silent_all, f"{ESC}{ESC}A")])
def test_a_rule_that_miscounts_markers_is_refused(form, monkeypatch, rule, text):
    """Every operation at three bytes, or every marker at none."""
    *_, tokenizer = form
    tokens = tokens_of(text, form)
    tokenizer.check_bytes([tokens], Path("it"))
    monkeypatch.setattr(tg.Tokenizer, "is_silent", rule)
    with pytest.raises(tg.UserError, match="breaks the rule of bytes"):
        tokenizer.check_bytes([tokens], Path("it"))


def test_markers_are_user_defined_pieces_only():
    """Those characters in a plain tokenizer are text like any other."""
    texts = [text + MARKERS for text in DOCUMENTS[:200]]
    model = prepare.train_tokenizer(texts, 700, 1 << 30)
    tokenizer = load(model)
    pieces = {tokenizer.processor.id_to_piece(i) for i in range(700)}
    assert set(MARKERS) <= pieces and tokenizer.markers == ()
    tokens = np.array([tokenizer.bos, *tokenizer.processor.encode(f"The{MARKERS} end")])
    assert tokenizer.target_bytes(tokens).sum() == len("The end") + 12
    tokenizer.check_bytes([tokens], Path("it"))
