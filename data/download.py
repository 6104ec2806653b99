#!/usr/bin/env python3
"""Fetch the challenge's published token shards and tokenizer from the Hugging Face hub.

    python data/download.py                      # vocabulary 8192, 80 training shards: 16 GB into data/
    python data/download.py --train-shards 2     # enough to try things out: .5 GB
    python data/download.py --repo willdepueoai/parameter-golf --variant sp1024
    python data/download.py --case-ops           # the same documents with case operations, into data/caseops/
    python data/download.py --documents          # the raw documents that these were made from, for prepare.py
    python data/download.py --check              # look at what is there, fetch nothing

Files arrive under OUT/datasets/fineweb10B_VARIANT and OUT/tokenizers, where train_gpt.py looks for them
(DATA_DIR=OUT). Every file is checked (size, checksum where the hub has one, header, token count) before it
gets its name. Whole files are kept: the same command, given again, checks them and fetches what is missing or
damaged. A file that was on its way when the command ended begins anew; only while it runs does the hub's
client go on inside a file, after a broken connection. Data of prepare.py are never changed, nor is another
tokenizer, and no shards of another source stay beside the hub's. The default repository is that of the
variable MATCHED_FINEWEB_REPO_ID, else the one that holds the 8192-piece variant.

Shards with case operations get the names of plain ones, in another folder, so that DATA_DIR alone chooses.
Their validation shards have side-cars, fineweb_val_bytes_NNNNNN.bin: for every token of the shard the bytes
that it has in the raw text, as the published tokenizer does not give that back.
"""
import argparse
import json
import os
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
import command  # noqa: E402

with command.imports():
    import numpy as np

DEFAULT_REPO = os.environ.get("MATCHED_FINEWEB_REPO_ID") or "kevclark/parameter-golf"
CASE_OPS_REPO = "romeerp/parameter-golf-caseops-v1"
CASE_OPS_SUFFIX = "_lossless_caps_caseops_v1_reserved"  # of its names
DOCUMENTS_REPO = "willdepueoai/parameter-golf"
DOCUMENTS = "docs_selected.jsonl", "docs_selected.source_manifest.json"
MAGIC, VERSION = 20240520, 1  # what a shard begins with
HEADER_BYTES = 1024
BOS = 1  # of all published variants
SIDECAR = "fineweb_val_bytes_"  # a file's name begins so if it holds the bytes of a validation shard's tokens
STAGING = ".download"  # a folder beside the files, and so on their disk, until they are whole
CHALLENGE_DOCUMENTS = 50_000  # of the validation split, whatever the tokenizer


class DownloadError(Exception):
    """What went wrong, in one line that says what to do."""


class Remote(NamedTuple):
    """A file of the repository."""
    path: str  # in the repository
    size: int
    sha256: str | None  # known for files that the hub keeps in large file storage

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


class Wanted(NamedTuple):
    """A file to fetch, and the place where it belongs."""
    remote: Remote
    local: pathlib.Path


def first_line(error: Exception) -> str:
    """What an error of the network or of the hub's client says first."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def list_repository(repo: str, revision: str) -> list[Remote]:
    """All files of a dataset repository."""
    with command.imports():
        from huggingface_hub import HfApi
    try:
        tree = HfApi().list_repo_tree(repo, repo_type="dataset", revision=revision, recursive=True)
        files = [entry for entry in tree if hasattr(entry, "size")  # the others are folders
                 and ".." not in entry.path.split("/")]
        return [Remote(file.path, file.size, file.lfs.sha256 if file.lfs else None) for file in files]
    except Exception as error:  # whatever the network or the client raises
        raise DownloadError(f"cannot list {repo} (revision {revision}): {first_line(error)}; "
                            "check --repo and the network") from error


def choose(files: list[Remote], args: argparse.Namespace) -> list[Wanted]:
    """Tokenizer, all validation shards and first training shards of a variant, with their places in --out."""
    repo, variant, train_shards, out = args.repo, args.variant, args.train_shards, args.out
    vocabulary = variant.removeprefix("sp")
    if not (variant.startswith("sp") and vocabulary.isdigit()):
        raise DownloadError(f"--variant {variant}: wanted is sp and the size of the vocabulary, as in sp8192")

    def files_at(place: str) -> list[Remote]:
        """Shards and tokenizers whose path in the repository holds this, in order."""
        return sorted(file for file in files
                      if f"/{place}" in f"/{file.path}" and file.name.endswith((".bin", ".model")))

    suffix = CASE_OPS_SUFFIX if args.case_ops else ""
    folder = f"datasets/fineweb10B_{variant}"
    tokenizers = files_at(f"tokenizers/fineweb_{vocabulary}_bpe{suffix}.model")
    train = files_at(f"{folder}{suffix}/fineweb_train_")
    sidecars = files_at(f"{folder}{suffix}/{SIDECAR}")
    val = [file for file in files_at(f"{folder}{suffix}/fineweb_val_") if file not in sidecars]
    complete = val and train and tokenizers
    if args.case_ops:
        complete = complete and len(sidecars) == len(val)
    if not complete:
        variants = {file.path.split("fineweb10B_")[1].split("/")[0] for file in files
                    if "fineweb10B_" in file.path}
        known = ", ".join(sorted(variants)) or "none"
        raise DownloadError(f"{repo} has no complete --variant {variant}{suffix}; it has {known}")
    if train_shards > len(train):
        raise DownloadError(f"--train-shards {train_shards}: {repo} has {len(train)} of {variant}")
    shards = val + sidecars + train[:train_shards]
    return [Wanted(tokenizers[0], out / f"tokenizers/fineweb_{vocabulary}_bpe.model"),
            *(Wanted(file, out / folder / file.name) for file in shards)]


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
    """What is wrong with a local copy; None if nothing is."""
    size = path.stat().st_size
    if size != remote.size:
        return f"{path} has {size} bytes, the hub's has {remote.size}"
    if remote.sha256 and command.sha256_of(path) != remote.sha256:
        return f"{path} has another checksum than the hub's"
    if remote.name.endswith(".bin"):
        try:
            count_tokens(path)
        except DownloadError as error:
            return str(error)
    return None


def fetch(wanted: Wanted, repo: str, revision: str) -> None:
    """Download one file aside, check it, and give it its name."""
    with command.imports():
        from huggingface_hub import hf_hub_download
    staging = wanted.local.parent / STAGING
    try:
        try:
            fetched = hf_hub_download(repo, wanted.remote.path, repo_type="dataset", revision=revision,
                                      local_dir=staging)
        except Exception as error:  # whatever the network or the client raises
            raise DownloadError(f"{wanted.remote.path}: {first_line(error)}; "
                                "run the same command again to fetch what is missing") from error
        wrong = problem(pathlib.Path(fetched), wanted.remote)
        if wrong:
            raise DownloadError(f"{wrong}; run the same command again to fetch it anew")
        os.replace(fetched, wanted.local)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def own_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """What prepare.py wrote of the shards that it made; None if there is no such file, or another's."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        return {"tokenizer": manifest["tokenizer"]["sha256"],
                "shards": {**manifest["val"]["shards"], **manifest["train"]["shards"]}}
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def refuse_others(wanted: list[Wanted], files: list[Remote]) -> None:
    """DownloadError if what is there belongs to other data than the hub's."""
    tokenizer, *shards = wanted
    folder = shards[0].local.parent
    if own_manifest(folder):
        raise DownloadError(f"{folder} holds shards of prepare.py: choose another --out")
    if tokenizer.local.exists() and problem(tokenizer.local, tokenizer.remote):
        raise DownloadError(f"{tokenizer.local} is another tokenizer: remove it or choose another --out")
    names = {file.local.name for file in shards}
    place = shards[0].remote.path.rpartition("/")[0]
    on_hub = {file.name: file for file in files if file.path.rpartition("/")[0] == place}
    for path in sorted(folder.glob("fineweb_*.bin")):
        if path.name not in names and (path.name not in on_hub or problem(path, on_hub[path.name])):
            raise DownloadError(f"{path} is none of the hub's: remove it or choose another --out")


def check(out: pathlib.Path, variant: str) -> str:
    """Look at all files of a variant; DownloadError if any is missing or not whole. Returns their counts."""
    folder = out / f"datasets/fineweb10B_{variant}"
    tokenizer = out / f"tokenizers/fineweb_{variant.removeprefix('sp')}_bpe.model"
    shards = {split: sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin")) for split in ("train", "val")}
    # 1) Is everything there, and whole?
    if not tokenizer.is_file():
        others = sorted(path.name.removeprefix("fineweb10B_") for path in out.glob("datasets/fineweb10B_sp*")
                        if path != folder)
        remedy = f"--variant may be {', '.join(others)}" if others else "fetch it without --check"
        raise DownloadError(f"there is no {tokenizer}: {remedy}")
    lines = []
    for split, paths in shards.items():
        if not paths:
            raise DownloadError(f"there is no {folder}/fineweb_{split}_*.bin: fetch them without --check")
        lines.append(f"{split}: {len(paths)} shards, {sum(map(count_tokens, paths)):,} tokens")
    numbered = [f"fineweb_val_{i:06}.bin" for i in range(len(shards["val"]))]
    if [path.name for path in shards["val"]] != numbered:
        raise DownloadError(f"{folder}/fineweb_val_*.bin are not numbered from 000000 without a gap")
    check_sidecars(shards["val"])
    # 2) Is it what prepare.py made?
    manifest = own_manifest(folder)
    if manifest:
        there = {path.name: command.sha256_of(path) for path in shards["train"] + shards["val"]}
        changed = [name for name in {**manifest["shards"], **there}
                   if manifest["shards"].get(name) != there.get(name)]
        changed += [tokenizer.name] if command.sha256_of(tokenizer) != manifest["tokenizer"] else []
        if changed:
            raise DownloadError(f"{folder}: {changed[0]} is not what manifest.json says")
        lines.append("all as manifest.json says")
    elif (folder / "manifest.json").exists():
        lines.append(f"{folder}/manifest.json is not of prepare.py: nothing was compared with it")
    # 3) How many documents has validation?
    documents = 0
    for path in shards["val"]:
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
        documents += int((tokens == BOS).sum())
    note = ""
    if documents != CHALLENGE_DOCUMENTS:
        note = f" (the challenge's validation has {CHALLENGE_DOCUMENTS:,})"
    lines.append(f"validation documents: {documents:,}{note}")
    return "\n".join(lines)


def check_sidecars(val: list[pathlib.Path]) -> None:
    """DownloadError unless validation has no side-cars, or one for every shard, with as many entries."""
    folder = val[0].parent
    there = sorted(folder.glob(f"{SIDECAR}*.bin"))
    expected = [path.with_name(path.name.replace("fineweb_val_", SIDECAR)) for path in val]
    if not there:
        return
    if there != expected:
        raise DownloadError(f"{folder}: side-cars {SIDECAR}*.bin are not one for each validation shard")
    for path, sidecar in zip(val, there):
        if count_tokens(path) != count_tokens(sidecar):
            raise DownloadError(f"{sidecar} has another number of entries than {path.name} has tokens")


def download(args: argparse.Namespace) -> None:
    """Fetch all files of a variant that are not there, whole."""
    files = list_repository(args.repo, args.revision)
    wanted = choose(files, args)
    args.out.mkdir(parents=True, exist_ok=True)
    with command.claim(args.out):
        refuse_others(wanted, files)
        fetch_missing(wanted, args)


def download_documents(args: argparse.Namespace) -> str:
    """Fetch the raw documents, unless they are there, whole. Returns how to go on."""
    files = list_repository(args.repo, args.revision)
    by_name = {file.name: file for file in files if file.path.rpartition("/")[0] in ("", "datasets")}
    missing = [name for name in DOCUMENTS if name not in by_name]
    if missing:
        raise DownloadError(f"{args.repo} has no {missing[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    with command.claim(args.out):
        fetch_missing([Wanted(by_name[name], args.out / name) for name in DOCUMENTS], args)
    documents, about = (args.out / name for name in DOCUMENTS)
    try:
        content = json.loads(about.read_bytes())
        count, validation = int(content["num_docs"]), int(content["docs_val"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DownloadError(f"{about} does not say num_docs and docs_val") from error
    return (f"{count:,} documents, of which the first {validation:,} are for validation\n"
            f"python data/prepare.py {documents} --out data/mine --val-docs {validation}")


def fetch_missing(wanted: list[Wanted], args: argparse.Namespace) -> None:
    """Fetch those files that are not there, whole."""
    # 1) What of it is missing?
    for folder in {file.local.parent for file in wanted}:
        shutil.rmtree(folder / STAGING, ignore_errors=True)  # of a process that was killed
    missing = [file for file in wanted if not file.local.exists() or problem(file.local, file.remote)]
    total = sum(file.remote.size for file in wanted)
    need = sum(file.remote.size for file in missing)
    what = "documents" if args.documents else args.variant
    command.say(f"{args.repo}, {what}: {len(wanted)} files, {total / 1e9:.2f} GB; "
                f"{len(missing)} files, {need / 1e9:.2f} GB to fetch")
    # 2) Is there room for it?
    for file in missing:
        file.local.parent.mkdir(parents=True, exist_ok=True)
    free = min((shutil.disk_usage(file.local.parent).free for file in missing), default=0)
    if missing and free < need + (1 << 28):
        raise DownloadError(f"--out {args.out}: {free / 1e9:.2f} GB are free, {need / 1e9:.2f} GB are to "
                            "come: make room")
    # 3) Fetch it.
    for number, file in enumerate(missing, 1):
        command.say(f"[{number}/{len(missing)}] {file.local}")
        fetch(file, args.repo, args.revision)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo",
                        help=f"dataset repository on the hub (default {DEFAULT_REPO}; with --case-ops "
                             f"{CASE_OPS_REPO}, with --documents {DOCUMENTS_REPO})")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of it (default main)")
    parser.add_argument("--variant", default="sp8192", help="sp and the vocabulary's size (default sp8192)")
    parser.add_argument("--train-shards", type=int, default=80,
                        help="first N training shards, 200 MB each (default 80)")
    parser.add_argument("--case-ops", action="store_true",
                        help="the published shards and tokenizer with case operations (v1 of case_ops.py)")
    parser.add_argument("--documents", action="store_true",
                        help="the published raw documents alone")
    parser.add_argument("--out", type=pathlib.Path,
                        help="the DATA_DIR to fill (default: this script's folder; with --case-ops "
                             "caseops/ in it)")
    parser.add_argument("--check", action="store_true", help="only look at the files that are there")
    args = parser.parse_args(argv)
    if args.train_shards < 1:
        parser.error("--train-shards wants at least 1")
    if args.documents and (args.case_ops or args.check):
        parser.error("--documents goes with neither --case-ops nor --check")
    here = pathlib.Path(__file__).resolve().parent
    if args.case_ops:
        args.repo = args.repo or CASE_OPS_REPO
        args.out = args.out or here / "caseops"
    args.repo = args.repo or (DOCUMENTS_REPO if args.documents else DEFAULT_REPO)
    args.out = args.out or here
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.documents:
            command.say(download_documents(args))
            return 0
        if not args.check:
            download(args)
        command.say(check(args.out, args.variant))
    except (DownloadError, OSError) as error:
        return command.report(error)
    return 0


if __name__ == "__main__":
    command.run(main)
