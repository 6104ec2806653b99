#!/usr/bin/env python3
"""Turn JSONL documents into a SentencePiece tokenizer and token shards in the challenge's layout.

    python data/prepare.py my.jsonl more.jsonl.xz --out data/mine --vocab-size 8192 --val-docs 1000
    DATA_DIR=data/mine python train_gpt.py
    python data/prepare.py my.jsonl --out data/mine-v3 --val-docs 1000 --case-ops v3

One document a line, {"text": "..."}; plain, .xz or .gz. The first --val-docs documents become the validation
shards and nothing else; the rest, less every copy of a validation document, become the training shards. It
writes

    OUT/tokenizers/fineweb_VOCAB_bpe.model    trained on training documents, or a copy of --tokenizer
    OUT/datasets/fineweb10B_spVOCAB/
        fineweb_{train,val}_NNNNNN.bin        256 int32 header, then uint16 tokens, BOS before a document
        manifest.json                         counts, bytes and sha256 of all of it

With --case-ops documents are transformed before they are tokenized, so that capitals are markers in front of
small letters (see case_ops.py); the tokenizer has a piece for each of the four markers, and manifest.json
names the transform. Whatever is said here of documents and of bytes is said of the text before it.

Afterwards every shard is read back: its documents must decode to the input, byte for byte and in order, and
no training document may equal a validation document. Tokenizer and dataset folder get their names only when
all of that has passed, and never those of files that are there already. Documents that the tokenizer cannot
give back exactly, as its normalisation changes them, and empty ones are left out and counted; U+2581, which
SentencePiece takes for a space, is written as three bytes. Memory stays constant: documents stream through,
whatever the input's size. So the input is read several times and has to be files.
"""
import argparse
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import zlib
from typing import Any, Callable, Iterable, Iterator, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
import command  # noqa: E402

import case_ops  # noqa: E402

with command.imports():
    import numpy as np
    import sentencepiece
    from tqdm import tqdm

MAGIC, VERSION = 20240520, 1  # what a shard begins with
HEADER_INTS = 256
DEFAULT_PIECES = 8192
MOST_PIECES = 65536  # that fit into uint16
MOST_LINE = 1 << 28  # bytes; a longer line is no document
BATCH_BYTES = 1 << 22  # text that is tokenized at a time
SPACE = "\u2581"  # what SentencePiece writes for one
PROBES = "a  b", " a", "a\tb", "a\nb", "\ufb01", "A\u030a"  # what normalisations change


class PrepareError(Exception):
    """A mistake of the user's; its text is the whole message."""


# ---- Reading documents -------------------------------------------------------------------------------------


def read_documents(paths: list[pathlib.Path], key: str) -> Iterator[str]:
    """The text of every line of all files. PrepareError names one that is neither {key: text} nor blank."""
    for path in paths:
        opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
        try:
            with opener(path, "rb") as lines:
                for number in itertools.count(1):
                    line = lines.readline(MOST_LINE)
                    if not line:
                        break
                    if line.strip():
                        yield parse_line(line, key, f"{path}:{number}")
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise PrepareError(f"cannot read {path}: {error}") from error


def parse_line(line: bytes, key: str, place: str) -> str:
    """The text that a line holds."""
    if len(line) == MOST_LINE:
        raise PrepareError(f"{place}: a line of more than {MOST_LINE >> 20} MB is no document")
    try:
        text = json.loads(line.decode())[key]
        text.encode()  # fails for what is no text, and for text that has no UTF-8
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PrepareError(f'{place}: not a JSON object with a text "{key}" ({reason:.200})') from None


def in_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in groups of about BATCH_BYTES; one is read ahead while the one before is worked on."""
    groups = group(documents)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, groups, None)
        while batch := ahead.result():
            ahead = thread.submit(next, groups, None)
            yield batch


def group(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents until about BATCH_BYTES of text are together."""
    batch = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


# ---- Tokenizer ---------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[str], vocab_size: int, max_bytes: int, markers: str = "") -> bytes:
    """Train the challenge's kind of SentencePiece model.

    That is BPE with byte fallback, identity normalisation and no dummy prefix. Each of the markers is a piece
    (user-defined) that no other piece holds.
    """
    taken = 0  # bytes
    mistakes = []
    model = io.BytesIO()

    def first_documents():
        """Documents until max_bytes are taken."""
        nonlocal taken
        try:
            for text in documents:
                if taken >= max_bytes:
                    return
                taken += len(text.encode())
                yield text
        except PrepareError as error:  # SentencePiece would wrap it in lines of its own
            mistakes.append(error)
            raise

    def train():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=first_documents(), model_writer=model, vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, character_coverage=0.9995,
            max_sentence_length=1 << 24, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            user_defined_symbols=list(markers), num_threads=os.cpu_count() or 1, minloglevel=2)

    try:
        call_in_thread(train)
    except RuntimeError as error:
        if mistakes:
            raise mistakes[0] from None
        if not taken:
            raise PrepareError("no document is left for training: the input has no more than "
                               "--val-docs") from None
        bound = re.search(r"required_chars\. \d+ vs (\d+)|to a value <= (\d+)", str(error))
        if bound:
            least, most = bound.groups()
            allowed = f"at least {least}" if least else f"at most {most}"
            raise PrepareError(f"--vocab-size {vocab_size}: these documents need {allowed}") from error
        raise PrepareError(f"--vocab-size {vocab_size}: SentencePiece cannot train on these documents: "
                           f"{error}") from error
    return model.getvalue()


def call_in_thread(function: Callable[[], Any]) -> None:
    """Call a function that is long in C++, while this thread hears Ctrl-C."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    future.result()


def open_tokenizer(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer that train_gpt.py accepts and counts bytes by rightly; PrepareError if it is not."""
    # 1) Read it.
    try:
        if not model:
            raise ValueError("it is empty")
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
    except (RuntimeError, ValueError, IndexError) as error:
        raise PrepareError(f"{name}: not a SentencePiece model, or damaged ({error})") from error
    # 2) Check that it has what shards need.
    if len(pieces) > MOST_PIECES:
        raise PrepareError(f"{name}: has {len(pieces)} pieces; tokens are stored as uint16, which hold "
                           f"{MOST_PIECES}")
    if tokenizer.bos_id() < 0:  # or it is a piece that texts can hold
        raise PrepareError(f"{name}: has no BOS piece, and every document starts with one")
    # 3) Check the rule by which bytes are counted: a space is counted where a piece begins with SPACE.
    special = {i for i in range(len(pieces))
               if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)}
    texts = [piece for i, piece in enumerate(pieces) if i not in special]
    inside = [piece for piece in texts if SPACE in piece[1:]]
    if inside:
        raise PrepareError(f"{name}: its piece {inside[0]} has a space inside, so its bytes cannot be "
                           "counted")
    if SPACE not in texts:
        raise PrepareError(f"{name}: has no piece {SPACE}, so a space would be counted as the 3 bytes of "
                           f"{SPACE}")
    return tokenizer


def check_markers(tokenizer: sentencepiece.SentencePieceProcessor, name: str, transform: str) -> None:
    """PrepareError unless a tokenizer has the markers of case operations as pieces just if it needs them."""
    ids = map(tokenizer.piece_to_id, case_ops.MARKERS)
    # The score of a user-defined piece is 0; that of a piece that was learned, and of one letter, is less.
    has_markers = all(tokenizer.id_to_piece(i) == marker and tokenizer.get_score(i) == 0
                      for i, marker in zip(ids, case_ops.MARKERS))
    if transform and not has_markers:
        raise PrepareError(f"--case-ops {transform}: {name} does not have U+E001 to U+E004 as user-defined "
                           "pieces")
    if has_markers and not transform:
        raise PrepareError(f"{name} is for case operations: say which by --case-ops")


def describe(tokenizer: sentencepiece.SentencePieceProcessor) -> str:
    """Whether a tokenizer gives texts back as they were."""
    changed = [text for text in PROBES if tokenizer.decode(tokenizer.encode(text)) != text]
    if not changed:
        return "gives back spaces, line breaks and composed letters as they were"
    return (f"changes texts, such as {', '.join(map(ascii, changed))}: documents that it changes are left "
            "out")


# ---- Tokenizing --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_processes(count: int) -> Iterator[Callable]:
    """A map over so many processes, which ignore Ctrl-C: this process ends them."""
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, context, command.end_with_parent) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes that start now
        try:
            list(pool.map(int, range(count)))  # each of the first calls starts one
        finally:
            signal.signal(signal.SIGINT, handler)
        yield functools.partial(pool.map, chunksize=50)


def undo_transform(written: str, transform: str) -> str | None:
    """The text that a transform made this of; None if it makes it of none."""
    try:
        return case_ops.decode(written, transform)
    except case_ops.CaseError:
        return None


class Job(NamedTuple):
    """What both splits need."""
    tokenizer: sentencepiece.SentencePieceProcessor
    threads: int
    input: list[pathlib.Path]
    key: str  # of the text in each JSON object
    val_docs: int
    folder: pathlib.Path  # where shards are written
    transform: str = ""  # of case_ops.VERSIONS, or none
    map: Callable = map  # over processes, for transforms: they are pure Python, which threads do not speed up

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split: the first ones of the input, or the rest."""
        documents = read_documents(self.input, self.key)
        bounds = (0, self.val_docs) if split == "val" else (self.val_docs, None)
        return itertools.islice(documents, *bounds)

    def tokenized(self, split: str) -> Iterator[tuple[str, np.ndarray | None]]:
        """The documents of a split with their tokens, BOS first; None for one that is left out."""
        for texts in in_batches(self.texts(split)):
            yield from zip(texts, self.encode(texts))

    def encode(self, texts: list[str]) -> list[np.ndarray | None]:
        """Tokens of documents; None for empty ones, and for those that would not decode to themselves."""
        bos = self.tokenizer.bos_id()
        written = texts
        if self.transform:
            written = [*self.map(case_ops.encode, texts, itertools.repeat(self.transform))]
        encoded = self.tokenizer.encode(written, num_threads=self.threads, return_type="numpy")
        encoded = [self.encode_with_bytes(text) if SPACE in text else ids
                   for text, ids in zip(written, encoded)]
        return [np.append(bos, ids).astype("<u2") if text and decoded == text else None
                for text, ids, decoded in zip(texts, encoded, self.decode(encoded))]

    def encode_with_bytes(self, text: str) -> np.ndarray:
        """Tokens of a text with SPACE in it, which has the pieces of its three bytes."""
        in_bytes = [self.tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        first, *others = self.tokenizer.encode(text.split(SPACE))
        ids = first + [token for part in others for token in in_bytes + part]
        return np.array(ids, dtype=np.int32)

    def decode(self, documents: list[np.ndarray]) -> list[str | None]:
        """The texts of documents without BOS; None for one that no transform writes."""
        written = self.tokenizer.decode(documents, num_threads=self.threads)
        if self.transform:
            written = [*self.map(undo_transform, written, itertools.repeat(self.transform))]
        return written


# ---- Shards ------------------------------------------------------------------------------------------------


class ShardWriter:
    """Appends documents to numbered shards of at most `limit` tokens; none is split over two shards."""

    def __init__(self, folder: pathlib.Path, split: str, limit: int):
        self.folder = folder
        self.split = split
        self.limit = limit
        self.paths: list[pathlib.Path] = []
        self.documents = 0
        self.tokens = 0
        self.in_shard = 0  # tokens of the shard at hand
        self.file = None

    def add(self, ids: np.ndarray) -> None:
        """Append a document; begin another shard where it would not fit into this one."""
        is_full = self.in_shard and self.in_shard + len(ids) > self.limit
        if self.file is None or is_full:
            self.close()
            path = self.folder / f"fineweb_{self.split}_{len(self.paths):06d}.bin"
            self.file = open(path, "wb")
            self.file.write(bytes(4 * HEADER_INTS))
            self.paths.append(path)
        self.file.write(ids.tobytes())
        self.in_shard += len(ids)
        self.tokens += len(ids)
        self.documents += 1

    def close(self) -> None:
        """Write the header of the shard at hand, now that its token count is known."""
        if self.file is not None:
            header = np.zeros(HEADER_INTS, dtype="<i4")
            header[:3] = MAGIC, VERSION, self.in_shard
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        self.file = None
        self.in_shard = 0


def read_shard_documents(paths: list[pathlib.Path], bos: int) -> Iterator[np.ndarray]:
    """Documents of written shards, BOS first, one memory map at a time."""
    for path in paths:
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS)
        starts = np.append(np.flatnonzero(tokens == bos), len(tokens))
        for lo, hi in zip(starts[:-1], starts[1:]):
            yield np.array(tokens[lo:hi])


def fingerprint(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def write_split(job: Job, split: str, limit: int, enough: float,
                held_out: set[bytes]) -> tuple[dict, list[pathlib.Path], bytearray]:
    """Tokenize one split into shards, until it has `enough` tokens.

    Fills held_out from validation, drops its members from training. Returns the counts for the manifest, the
    shards, and a flag per document that was read: 1 if it was written.
    """
    writer = ShardWriter(job.folder, split, limit)
    kept = bytearray()
    counts = dict(documents=0, tokens=0, text_bytes=0, left_out_empty=0, left_out_inexact=0,
                  left_out_copies=0, begin_with_space=0)
    documents = itertools.takewhile(lambda _: writer.tokens < enough, job.tokenized(split))
    for text, ids in tqdm(documents, desc=f"tokenize {split}", unit=" docs", unit_scale=True, disable=None):
        digest = None if ids is None else fingerprint(ids)
        is_copy = split == "train" and digest in held_out
        keep = ids is not None and not is_copy
        kept.append(keep)
        counts["left_out_copies"] += is_copy
        counts["left_out_empty"] += not text
        counts["left_out_inexact"] += bool(text) and ids is None
        if keep:
            writer.add(ids)
            counts["text_bytes"] += len(text.encode())
            counts["begin_with_space"] += text.startswith(" ")
            if split == "val":
                held_out.add(digest)
    writer.close()
    if not writer.documents:
        raise PrepareError(
            f"no document is left for the {split} shards, of {len(kept)} in the input: "
            f"{counts['left_out_empty']} are empty, {counts['left_out_inexact']} would not come back from "
            f"the tokenizer, {counts['left_out_copies']} are copies of validation documents")
    counts.update(documents=writer.documents, tokens=writer.tokens)
    return counts, writer.paths, kept


def verify_split(job: Job, split: str, paths: list[pathlib.Path], kept: bytearray,
                 held_out: set[bytes]) -> None:
    """Read the shards back: they must decode to the input, and training must hold nothing of validation."""
    texts = itertools.compress(job.texts(split), kept)
    documents = read_shard_documents(paths, job.tokenizer.bos_id())
    wrong = copies = 0
    bar = tqdm(desc=f"verify {split}", total=sum(kept), unit=" docs", unit_scale=True, disable=None)
    for batch in in_batches(texts):
        at_same_place = list(itertools.islice(documents, len(batch)))
        decoded = job.decode([ids[1:].astype(np.int32) for ids in at_same_place])
        wrong += sum(text != other for text, other in itertools.zip_longest(batch, decoded))
        if split == "train":
            copies += sum(fingerprint(ids) in held_out for ids in at_same_place)
        bar.update(len(batch))
    bar.close()
    left = sum(1 for _ in documents)
    if wrong or left or copies:
        raise PrepareError(f"{split} shards failed their check: {wrong} documents decode to other text, "
                           f"{left} have no input, {copies} are validation documents")


# ---- Command line ------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="+", type=pathlib.Path,
                        help=".jsonl, .jsonl.xz or .jsonl.gz files, in order")
    parser.add_argument("--out", required=True, type=pathlib.Path,
                        help="the DATA_DIR to fill; made if missing")
    parser.add_argument("--val-docs", required=True, type=int,
                        help="this many first documents are for validation only")
    parser.add_argument("--vocab-size", type=int,
                        help=f"pieces of the tokenizer (default {DEFAULT_PIECES}, or what --tokenizer has)")
    parser.add_argument("--tokenizer", type=pathlib.Path,
                        help="use this SentencePiece model instead of training one")
    parser.add_argument("--case-ops", choices=case_ops.VERSIONS, default="",
                        help="write capitals as markers before small letters, by this transform")
    parser.add_argument("--tokenizer-bytes", type=int, default=200_000_000,
                        help="train the tokenizer on this much text at most (default 200 MB; it is held in "
                             "memory)")
    parser.add_argument("--train-tokens", type=float, default=math.inf,
                        help="stop at the training document with which there are so many tokens, such as 6e9 "
                             "(default: take all)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000,
                        help="most tokens a shard (default 100 M)")
    parser.add_argument("--text-key", default="text",
                        help='name of the text in each JSON object (default "text")')
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="threads, or processes for case operations (default: one a core)")
    args = parser.parse_args(argv)
    if not all(number >= 1 for number in (args.val_docs, args.workers, args.tokenizer_bytes,
                                          args.train_tokens)):
        parser.error("--val-docs, --workers, --tokenizer-bytes and --train-tokens want at least 1")
    if not 2 <= args.shard_tokens < 1 << 31:
        parser.error("--shard-tokens wants 2 to 2147483647: a shard's header has its count as int32")
    if args.vocab_size is not None and not 300 <= args.vocab_size <= MOST_PIECES:
        parser.error("--vocab-size wants 300 to 65536: tokens are stored as uint16, bytes and controls take "
                     "260 pieces")
    return args


def read_tokenizer(path: pathlib.Path, vocab_size: int | None, transform: str) -> bytes:
    """The tokenizer of --tokenizer; PrepareError if it cannot be used."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise PrepareError(f"--tokenizer {path}: {error.strerror}") from error
    tokenizer = open_tokenizer(model, f"--tokenizer {path}")
    pieces = tokenizer.get_piece_size()
    if vocab_size not in (None, pieces):
        raise PrepareError(f"--vocab-size {vocab_size}: --tokenizer {path} has {pieces} pieces")
    check_markers(tokenizer, f"--tokenizer {path}", transform)
    command.say(f"{path}: {pieces} pieces; it {describe(tokenizer)}")
    return model


def check_input(paths: list[pathlib.Path]) -> None:
    """PrepareError names what cannot be read, or not more than once."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise PrepareError(f"cannot read {path}: it is no file, and the input is read several times; "
                               "write it into one first")
        try:
            open(path, "rb").close()
        except OSError as error:
            raise PrepareError(f"cannot read {path}: {error.strerror}") from error


class Places(NamedTuple):
    """Where what is made belongs."""
    tokenizer: pathlib.Path
    folder: pathlib.Path  # of the shards

    @property
    def part(self) -> pathlib.Path:
        """The folder until it is whole."""
        return self.folder.with_name(self.folder.name + ".part")

    def check(self, model: bytes | None) -> None:
        """PrepareError if anything there would have to change."""
        if self.folder.exists():
            raise PrepareError(f"{self.folder} exists: remove it or choose another --out")
        if self.tokenizer.exists() and self.tokenizer.read_bytes() != model:
            remedy = "choose another --out" if model else "name it with --tokenizer to use it"
            raise PrepareError(f"{self.tokenizer} exists: {remedy}, or remove it to have another")


def prepare(args: argparse.Namespace) -> dict:
    """Refuse what cannot be done before anything is touched, then do it; returns the manifest."""
    # 1) Input and tokenizer.
    check_input(args.input)
    model = None
    if args.tokenizer:
        model = read_tokenizer(args.tokenizer, args.vocab_size, args.case_ops)
    pieces = args.vocab_size or DEFAULT_PIECES
    if model:
        pieces = open_tokenizer(model, "--tokenizer").get_piece_size()
    # 2) The folder, which no other process may fill meanwhile.
    args.out.mkdir(parents=True, exist_ok=True)
    with command.claim(args.out):
        places = Places(args.out / "tokenizers" / f"fineweb_{pieces}_bpe.model",
                        args.out / "datasets" / f"fineweb10B_sp{pieces}")
        places.check(model)
        shutil.rmtree(places.part, ignore_errors=True)  # of a process that was killed
        try:
            return fill(args, places, model)
        finally:
            shutil.rmtree(places.part, ignore_errors=True)


def fill(args: argparse.Namespace, places: Places, model: bytes | None) -> dict:
    """Make everything aside and give it its name; returns the manifest."""
    # 1) The tokenizer.
    places.part.mkdir(parents=True)
    places.tokenizer.parent.mkdir(exist_ok=True)
    if not model:
        pieces = args.vocab_size or DEFAULT_PIECES
        command.say(f"training a tokenizer of {pieces} pieces ...")
        training = itertools.islice(read_documents(args.input, args.text_key), args.val_docs, None)
        markers = ""
        if args.case_ops:
            training = (case_ops.encode(text, args.case_ops) for text in training)
            markers = case_ops.MARKERS
        model = train_tokenizer(training, pieces, args.tokenizer_bytes, markers)
    tokenizer = open_tokenizer(model, "the tokenizer that was trained")
    # 2) Write and check the shards. Validation comes first, so that training can leave its copies out.
    sha256 = hashlib.sha256(model).hexdigest()
    manifest = {"case_ops": args.case_ops} if args.case_ops else {}
    manifest["tokenizer"] = {"file": places.tokenizer.name, "sha256": sha256}
    held_out: set[bytes] = set()
    job = Job(tokenizer, args.workers, args.input, args.text_key, args.val_docs, places.part,
              args.case_ops)
    with in_processes(args.workers if args.case_ops else 1) as mapped:
        job = job._replace(map=mapped)
        for split in ("val", "train"):
            enough = args.train_tokens if split == "train" else math.inf
            counts, paths, kept = write_split(job, split, args.shard_tokens, enough, held_out)
            verify_split(job, split, paths, kept, held_out)
            manifest[split] = {**counts, "shards": {path.name: command.sha256_of(path) for path in paths}}
            listed = [f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items()]
            command.say(f"{split}: " + ", ".join(listed))
    # 3) Everything has passed: give tokenizer and folder their names.
    (places.part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    is_new = not places.tokenizer.exists()
    try:
        if is_new:
            command.write_whole(places.tokenizer, model)
        places.part.rename(places.folder)
    except BaseException:
        if is_new:
            places.tokenizer.unlink(missing_ok=True)
        raise
    val_documents, train_documents = manifest["val"]["documents"], manifest["train"]["documents"]
    command.say(f"checked: all shards decode to their documents; none of the {val_documents:,} validation "
                f"documents is among the {train_documents:,} training documents\n{places.folder}")
    return manifest


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        prepare(args)
    except PrepareError as error:
        return command.report(error)
    except OSError as error:
        return command.report(f"{error.strerror or error}: {error.filename or args.out}")
    except MemoryError:
        return command.report("out of memory: lower --tokenizer-bytes")
    return 0


if __name__ == "__main__":
    command.run(main)
