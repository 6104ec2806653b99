#!/usr/bin/env python3
"""Fetch the challenge's published token shards and tokenizer from the Hugging Face hub.

    python data/download.py                                    # vocabulary 8192, 80 training shards: 16 GB into data/
    python data/download.py --train-shards 2                   # enough to try things out: .5 GB
    python data/download.py --repo willdepueoai/parameter-golf --variant sp1024
    python data/download.py --check                            # look at what is there, fetch nothing

Files arrive under OUT/datasets/fineweb10B_VARIANT and OUT/tokenizers, where train_gpt.py looks for them (DATA_DIR=OUT).
An interrupted download goes on where it stopped. Every file is checked (size, checksum where the hub has one, header, token
count) before it gets its name, and a file that is there already is checked and kept. The default repository is that of the
variable MATCHED_FINEWEB_REPO_ID, else the one that holds the 8192-piece variant.
"""
import argparse
import hashlib
import os
import pathlib
import shutil
import sys
from typing import NamedTuple

import numpy as np

DEFAULT_REPO = os.environ.get("MATCHED_FINEWEB_REPO_ID", "kevclark/parameter-golf")
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
CHALLENGE_DOCUMENTS = 50_000  # of the validation split, whatever the tokenizer


class DownloadError(Exception):
    """What went wrong, in one line that says what to do."""


class Remote(NamedTuple):
    path: str  # in the repository
    size: int
    sha256: str | None  # known for files that the hub keeps in large file storage

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


class Wanted(NamedTuple):
    remote: Remote
    local: pathlib.Path


def list_repository(repo: str, revision: str) -> list[Remote]:
    """All files of a dataset repository."""
    from huggingface_hub import HfApi

    try:
        tree = HfApi().list_repo_tree(repo, repo_type="dataset", revision=revision, recursive=True)
        return [Remote(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None) for entry in tree
                if hasattr(entry, "size")]
    except Exception as error:  # whatever the network or the client raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(f"cannot list {repo} (revision {revision}): {reason}; check --repo and the network") from error


def choose(files: list[Remote], variant: str, train_shards: int, out: pathlib.Path, repo: str) -> list[Wanted]:
    """Tokenizer, all validation shards and the first training shards of a variant, with the places they go to."""
    vocabulary = variant.removeprefix("sp")
    if not (variant.startswith("sp") and vocabulary.isdigit()):
        raise DownloadError(f"--variant {variant}: wanted is sp and the size of the vocabulary, as in sp8192")
    folder = f"datasets/fineweb10B_{variant}"
    tokenizer = f"tokenizers/fineweb_{vocabulary}_bpe.model"
    within = lambda start: sorted((f for f in files if f"/{start}" in f"/{f.path}" and f.name.endswith((".bin", ".model"))))
    val, train = within(f"{folder}/fineweb_val_"), within(f"{folder}/fineweb_train_")
    if not (val and train and within(tokenizer)):
        variants = {f.path.split("fineweb10B_")[1].split("/")[0] for f in files if "fineweb10B_" in f.path}
        raise DownloadError(f"{repo} has no complete --variant {variant}; it has {', '.join(sorted(variants)) or 'none'}")
    if train_shards > len(train):
        raise DownloadError(f"--train-shards {train_shards}: {repo} has {len(train)} of {variant}")
    chosen = [Wanted(f, out / folder / f.name) for f in val + train[:train_shards]]
    return [Wanted(within(tokenizer)[0], out / tokenizer)] + chosen


def count_tokens(path: pathlib.Path) -> int:
    """Tokens of a shard; DownloadError if header, count and size do not agree."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise DownloadError(f"{path} is not a token shard")
    held = (path.stat().st_size - HEADER_BYTES) / 2
    if header[2] <= 0 or held != header[2]:
        raise DownloadError(f"{path} holds {held:g} tokens, its header says {header[2]}")
    return int(header[2])


def problem(path: pathlib.Path, remote: Remote) -> str | None:
    """What is wrong with a local copy, or nothing."""
    if path.stat().st_size != remote.size:
        return f"{path} has {path.stat().st_size} bytes, the hub's has {remote.size}"
    if remote.sha256:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != remote.sha256:
            return f"{path} has another checksum than the hub's"
    if remote.name.endswith(".bin"):
        try:
            count_tokens(path)
        except DownloadError as error:
            return str(error)
    return None


def fetch(wanted: Wanted, repo: str, revision: str, staging: pathlib.Path) -> None:
    """Download one file (or the rest of it) aside, check it, and give it its name."""
    from huggingface_hub import hf_hub_download

    try:
        part = pathlib.Path(hf_hub_download(repo, wanted.remote.path, repo_type="dataset", revision=revision,
                                            local_dir=staging))
    except Exception as error:  # whatever the network or the client raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(f"{wanted.remote.path}: {reason}; run the same command again to go on") from error
    if wrong := problem(part, wanted.remote):
        part.unlink()
        raise DownloadError(f"{wrong}; run the same command again to fetch it anew")
    wanted.local.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, wanted.local)


def summarize(out: pathlib.Path, variant: str) -> str:
    """Shards, tokens and validation documents of what is there; DownloadError if any shard is not whole."""
    folder, lines = out / f"datasets/fineweb10B_{variant}", []
    for split in ("train", "val"):
        shards = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        lines.append(f"{split}: {len(shards)} shards, {sum(map(count_tokens, shards)):,} tokens")
    bos = 1  # of all published variants
    documents = sum(int((np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES) == bos).sum())
                    for path in folder.glob("fineweb_val_*.bin"))
    note = "" if documents == CHALLENGE_DOCUMENTS else f" (the challenge's validation has {CHALLENGE_DOCUMENTS:,})"
    lines.append(f"validation documents: {documents:,}{note}")
    return "\n".join(lines)


def download(args: argparse.Namespace) -> None:
    wanted = choose(list_repository(args.repo, args.revision), args.variant, args.train_shards, args.out, args.repo)
    missing = [w for w in wanted if not w.local.exists() or problem(w.local, w.remote)]
    need, total = sum(w.remote.size for w in missing), sum(w.remote.size for w in wanted)
    print(f"{args.repo}, {args.variant}: {len(wanted)} files, {total / 1e9:.2f} GB; {len(missing)} files, {need / 1e9:.2f} GB to fetch")
    args.out.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(args.out).free) < need + (1 << 28):
        raise DownloadError(f"--out {args.out}: {free / 1e9:.2f} GB are free, {need / 1e9:.2f} GB are to come: make room")
    staging = args.out / ".download"
    for number, w in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {w.local}", flush=True)
        fetch(w, args.repo, args.revision, staging)
    shutil.rmtree(staging, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default=DEFAULT_REPO, help=f"dataset repository on the hub (default {DEFAULT_REPO})")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of it (default main)")
    parser.add_argument("--variant", default="sp8192", help="sp and the vocabulary's size (default sp8192)")
    parser.add_argument("--train-shards", type=int, default=80, help="first N training shards, 200 MB each (default 80)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent,
                        help="the DATA_DIR to fill (default: this script's folder)")
    parser.add_argument("--check", action="store_true", help="only look at the files that are there")
    args = parser.parse_args(argv)
    if args.train_shards < 1:
        parser.error("--train-shards wants at least 1")
    try:
        if not args.check:
            download(args)
        print(summarize(args.out, args.variant))
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
