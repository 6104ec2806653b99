#!/usr/bin/env python3
"""Turn JSONL documents into a SentencePiece tokenizer and token shards in the challenge's layout.

    python data/prepare.py my.jsonl more.jsonl.xz --out data/mine --vocab-size 8192 --val-docs 1000
    DATA_DIR=data/mine python train_gpt.py

One document a line, {"text": "..."}; plain, .xz or .gz. The first --val-docs documents become the validation
shards and nothing else; the rest, less every copy of a validation document, become the training shards. It
writes

    OUT/tokenizers/fineweb_VOCAB_bpe.model    trained on training documents, or a copy of --tokenizer
    OUT/datasets/fineweb10B_spVOCAB/
        fineweb_{train,val}_NNNNNN.bin        256 int32 header, then uint16 tokens, BOS before a document
        manifest.json                         counts, bytes and sha256 of all of it

Afterwards every shard is read back: its documents must decode to the input, byte for byte and in order, and
no training document may equal a validation document. The dataset folder appears under its name only when all
of that has passed. Documents that the tokenizer cannot give back exactly (a literal U+2581, which
SentencePiece takes for a space) and empty ones are left out and counted. Memory stays constant: documents
stream through, whatever the input's size.
"""
import argparse
import collections
import concurrent.futures
import gzip
import hashlib
import itertools
import json
import lzma
import os
import pathlib
import shutil
import sys
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import sentencepiece
from tqdm import tqdm

MAGIC, VERSION = 20240520, 1  # what a shard begins with
HEADER_INTS = 256
BATCH_BYTES = 1 << 20  # text handed to a worker at a time


class PrepareError(Exception):
    """A mistake of the user's; its text is the whole message."""


# ---- Reading documents -------------------------------------------------------------------------------------


def open_text(path: pathlib.Path):
    """Open a .jsonl, .jsonl.xz or .jsonl.gz file as UTF-8 text."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8", newline="\n")


def read_documents(paths: list[pathlib.Path], key: str) -> Iterator[str]:
    """The text of every line of all files. PrepareError names one that is neither {key: text} nor blank."""
    for path in paths:
        try:
            with open_text(path) as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield parse_line(line, key, f"{path}:{number}")
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise PrepareError(f"cannot read {path}: {error}") from error


def parse_line(line: str, key: str, place: str) -> str:
    try:
        text = json.loads(line)[key]
        text.encode()  # fails for what is no text, and for text that has no UTF-8
        return text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepareError(f'{place}: not a JSON object with a text "{key}" ({error!r})') from None


def in_batches(documents: Iterable[str]) -> Iterator[list[str]]:
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


def train_tokenizer(documents: Iterable[str], vocab_size: int, max_bytes: int, path: pathlib.Path) -> None:
    """Train the challenge's kind of SentencePiece model.

    That is BPE with byte fallback, identity normalisation and no dummy prefix.
    """
    taken = 0  # bytes
    mistakes = []

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

    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as out:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=first_documents(), model_writer=out, vocab_size=vocab_size,
                model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                add_dummy_prefix=False, remove_extra_whitespaces=False, character_coverage=0.9995,
                max_sentence_length=1 << 24, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
                num_threads=os.cpu_count() or 1, minloglevel=2)
    except RuntimeError as error:
        part.unlink(missing_ok=True)
        if mistakes:
            raise mistakes[0] from None
        if not taken:
            raise PrepareError("no document is left for training after the first --val-docs") from None
        raise PrepareError(f"--vocab-size {vocab_size}: SentencePiece cannot train on these documents: "
                           f"{error}") from error
    part.rename(path)


def load_tokenizer(path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """Read a SentencePiece model; PrepareError if it is none, or has no BOS."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise PrepareError(f"--tokenizer {path}: not a SentencePiece model ({error})") from error
    if tokenizer.bos_id() < 0:
        raise PrepareError(f"--tokenizer {path}: has no BOS piece, and every document starts with one")
    return tokenizer


# ---- Workers: pure functions of a batch, run in other processes --------------------------------------------


class Encoded(NamedTuple):
    """A batch of documents, tokenized."""
    tokens: list[np.ndarray | None]  # of each document, BOS first; None: left out
    empty: int  # documents left out, as they are empty
    inexact: int  # documents left out, as they would not decode to themselves
    leading_space: int  # documents that begin with a space
    text_bytes: int  # of those that are not left out


worker_tokenizer: sentencepiece.SentencePieceProcessor  # of a worker process, which begins with start_worker


def start_worker(model: str) -> None:
    global worker_tokenizer
    worker_tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)


def encode_batch(texts: list[str]) -> Encoded:
    """Tokenize documents; leave out empty ones, and those that would not decode to themselves."""
    bos = worker_tokenizer.bos_id()
    tokens = []
    empty = inexact = leading_space = text_bytes = 0
    for text, ids in zip(texts, worker_tokenizer.encode(texts)):
        exact = worker_tokenizer.decode(ids) == text
        empty += not text
        inexact += not exact
        if text and exact:
            leading_space += text.startswith(" ")
            text_bytes += len(text.encode())
            tokens.append(np.array([bos] + ids, dtype=np.uint16))
        else:
            tokens.append(None)
    return Encoded(tokens, empty, inexact, leading_space, text_bytes)


def mismatches(texts: list[str], documents: list[np.ndarray]) -> int:
    """How many token documents do not decode to the text at the same place."""
    decoded = worker_tokenizer.decode([ids[1:].tolist() for ids in documents])
    different = sum(text != other for text, other in zip(texts, decoded))
    return different + abs(len(texts) - len(decoded))


def bounded_map(pool: concurrent.futures.Executor, function: Callable, batches: Iterable[tuple],
                depth: int) -> Iterator[tuple]:
    """(batch, function(*batch)) in order, at most `depth` of them under way, so that memory is bounded."""
    pending = collections.deque()
    for batch in batches:
        pending.append((batch, pool.submit(function, *batch)))
        if len(pending) >= depth:
            batch, future = pending.popleft()
            yield batch, future.result()
    for batch, future in pending:
        yield batch, future.result()


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


class Job(NamedTuple):
    """What both splits need."""
    pool: concurrent.futures.Executor
    depth: int  # batches under way at once
    input: list[pathlib.Path]
    key: str  # of the text in each JSON object
    val_docs: int
    folder: pathlib.Path  # where shards are written
    bos: int

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split: the first ones of the input, or the rest."""
        documents = read_documents(self.input, self.key)
        bounds = (0, self.val_docs) if split == "val" else (self.val_docs, None)
        return itertools.islice(documents, *bounds)


def write_split(job: Job, split: str, limit: int,
                held_out: set[bytes]) -> tuple[dict, list[pathlib.Path], bytearray]:
    """Tokenize one split into shards. Fills held_out from validation, drops its members from training.

    Returns the counts for the manifest, the shards, and a flag per input document: 1 if it was written.
    """
    writer = ShardWriter(job.folder, split, limit)
    kept = bytearray()
    counts = dict(documents=0, tokens=0, text_bytes=0, left_out_empty=0, left_out_inexact=0,
                  left_out_copies=0, begin_with_space=0)
    batches = ((batch,) for batch in in_batches(job.texts(split)))
    bar = tqdm(desc=f"tokenize {split}", unit=" docs", unit_scale=True, disable=None)
    for _, encoded in bounded_map(job.pool, encode_batch, batches, job.depth):
        for ids in encoded.tokens:
            digest = None if ids is None else fingerprint(ids)
            is_copy = split == "train" and digest in held_out
            keep = ids is not None and not is_copy
            kept.append(keep)
            counts["left_out_copies"] += is_copy
            if keep:
                writer.add(ids)
                if split == "val":
                    held_out.add(digest)
        counts["left_out_empty"] += encoded.empty
        counts["left_out_inexact"] += encoded.inexact
        counts["begin_with_space"] += encoded.leading_space
        counts["text_bytes"] += encoded.text_bytes
        bar.update(len(encoded.tokens))
    writer.close()
    bar.close()
    if not writer.documents:
        raise PrepareError(f"no document is left for the {split} shards, of {len(kept)} in the input")
    counts.update(documents=writer.documents, tokens=writer.tokens)
    return counts, writer.paths, kept


def verify_split(job: Job, split: str, paths: list[pathlib.Path], kept: bytearray,
                 held_out: set[bytes]) -> None:
    """Read the shards back: they must decode to the input, and training must hold nothing of validation."""
    texts = itertools.compress(job.texts(split), kept)
    documents = read_shard_documents(paths, job.bos)
    copies = 0

    def pairs():
        """Batches of texts, each with the token documents at the same place."""
        nonlocal copies
        for batch in in_batches(texts):
            at_same_place = list(itertools.islice(documents, len(batch)))
            if split == "train":
                copies += sum(fingerprint(ids) in held_out for ids in at_same_place)
            yield batch, at_same_place

    bar = tqdm(desc=f"verify {split}", total=sum(kept), unit=" docs", unit_scale=True, disable=None)
    wrong = 0
    for (batch, _), different in bounded_map(job.pool, mismatches, pairs(), job.depth):
        wrong += different
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
    parser.add_argument("--vocab-size", type=int, default=8192,
                        help="pieces of the tokenizer to train (default 8192)")
    parser.add_argument("--tokenizer", type=pathlib.Path,
                        help="use this SentencePiece model instead of training one")
    parser.add_argument("--tokenizer-bytes", type=int, default=200_000_000,
                        help="train the tokenizer on this much text at most (default 200 MB; it is held in "
                             "memory)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000,
                        help="most tokens a shard (default 100 M)")
    parser.add_argument("--text-key", default="text",
                        help='name of the text in each JSON object (default "text")')
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="processes (default: one a core)")
    args = parser.parse_args(argv)
    if args.val_docs < 1 or args.shard_tokens < 2 or args.workers < 1:
        parser.error("--val-docs, --workers want at least 1, --shard-tokens at least 2")
    if not 300 <= args.vocab_size <= 65536:
        parser.error("--vocab-size wants 300 to 65536: tokens are stored as uint16, bytes and controls take "
                     "260 pieces")
    return args


def place_tokenizer(args: argparse.Namespace) -> pathlib.Path:
    """Train or copy the tokenizer to its place under --out; returns that path."""
    folder = args.out / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    if args.tokenizer:
        vocab_size = load_tokenizer(args.tokenizer).get_piece_size()
        path = folder / f"fineweb_{vocab_size}_bpe.model"
        if not (path.exists() and path.samefile(args.tokenizer)):
            shutil.copyfile(args.tokenizer, path)
        return path
    path = folder / f"fineweb_{args.vocab_size}_bpe.model"
    if path.exists():
        raise PrepareError(f"{path} exists: name it with --tokenizer to use it, or remove it to train "
                           "another")
    print(f"training a tokenizer of {args.vocab_size} pieces ...")
    training = itertools.islice(read_documents(args.input, args.text_key), args.val_docs, None)
    train_tokenizer(training, args.vocab_size, args.tokenizer_bytes, path)
    return path


def sha256_of(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(args: argparse.Namespace) -> dict:
    """Do all of it; returns the manifest."""
    # 1) A tokenizer, and a folder that is not yet under its name.
    model = place_tokenizer(args)
    tokenizer = load_tokenizer(model)
    folder = args.out / "datasets" / f"fineweb10B_sp{tokenizer.get_piece_size()}"
    if folder.exists():
        raise PrepareError(f"{folder} exists: remove it or choose another --out")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # 2) Write and check the shards. Validation comes first, so that training can leave its copies out.
    manifest = {"tokenizer": {"file": model.name, "sha256": sha256_of(model)}}
    held_out: set[bytes] = set()
    with concurrent.futures.ProcessPoolExecutor(args.workers, initializer=start_worker,
                                                initargs=(str(model),)) as pool:
        job = Job(pool, 2 * args.workers, args.input, args.text_key, args.val_docs, part, tokenizer.bos_id())
        for split in ("val", "train"):
            counts, paths, kept = write_split(job, split, args.shard_tokens, held_out)
            verify_split(job, split, paths, kept, held_out)
            manifest[split] = {**counts, "shards": {path.name: sha256_of(path) for path in paths}}
            listed = [f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items()]
            print(f"{split}: " + ", ".join(listed))
    # 3) Everything has passed: give the folder its name.
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    part.rename(folder)
    val_documents, train_documents = manifest["val"]["documents"], manifest["train"]["documents"]
    print(f"checked: all shards decode to their documents; none of the {val_documents:,} validation "
          f"documents is among the {train_documents:,} training documents\n{folder}")
    return manifest


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        prepare(args)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename or args.out}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
