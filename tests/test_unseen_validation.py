"""Training cannot have seen validation, by whatever way a script might read its files.

Two properties of a run are looked at from outside. Beside decoys of the validation shards it leaves the same
weights and the same artifact, to the byte. And no process opens those shards before the artifact has its
name, or writes to it afterwards, which the kernel tells and not Python. Copies of the script that train on
validation break these.
"""
import ctypes
import mmap
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import ARTIFACT, CHECKPOINT, SHALLOW, make_data, shards_of, smoke_tokens

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify, which Linux has")

SETTINGS = dict(SHALLOW, QUANT_STATES=1, ITERATIONS=2)
IN_MODIFY, IN_OPEN, IN_MOVED_TO, IN_CREATE = 0x2, 0x20, 0x80, 0x100  # of inotify(7)
LIBC = ctypes.CDLL(None)
OPEN_SHARD = tg.open_shard  # as it is before a cheat replaces it


class Beside(NamedTuple):
    """Two DATA_DIRs that differ in the content of their validation shards alone."""
    truth: Path
    decoys: Path


def beginnings(stream, lengths):
    """Tokens of documents from the stream, each long enough to be cut at its length."""
    documents = iter(np.split(stream, np.flatnonzero(stream == 1))[1:])
    return np.concatenate([next(document for document in documents if len(document) >= length)[:length]
                           for length in lengths])


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Beside:
    """Decoys are the beginnings of other documents of the same lengths, which are not trained on either."""
    text = smoke_tokens("train")
    folders = []
    for source in (smoke_tokens("val"), text[15_000:]):
        val = beginnings(source, (300, 40, 170, 90, 260))
        folder = tmp_path_factory.mktemp("data")
        folders.append(make_data(folder, [text[:9000], text[9000:15_000]], [val[:400], val[400:]]))
    return Beside(*folders)


class Watch:
    """What becomes of some files and of a folder, in order and whoever does it."""

    def __init__(self, files: list[Path], folder: Path):
        self.descriptor = LIBC.inotify_init1(os.O_NONBLOCK)
        in_folder = IN_MODIFY | IN_MOVED_TO | IN_CREATE
        for path, events in (*((file, IN_OPEN) for file in files), (folder, in_folder)):
            watched = LIBC.inotify_add_watch(self.descriptor, bytes(path), events)
            assert watched > 0, f"inotify cannot watch {path}"

    def events(self) -> list[str]:
        """"" for a file that was opened; the name of what the folder got or what changed there.

        Ends the watch.
        """
        data = os.read(self.descriptor, 1 << 20)
        os.close(self.descriptor)
        names = []
        while data:
            _, _, _, length = struct.unpack_from("iIII", data)
            names.append(data[16 : 16 + length].rstrip(b"\0").decode())
            data = data[16 + length :]
        return names


class Trained(NamedTuple):
    """What a run has left, and in which order."""
    artifact: bytes
    checkpoint: bytes
    opened_early: bool  # validation, before the artifact was there
    changed_late: bool  # the artifact or the checkpoint, once validation had been opened


def train(run, data: Path, folder: Path) -> Trained:
    folder.mkdir()
    watch = Watch(shards_of(data, "val"), folder)
    outcome = run(**SETTINGS, DATA_DIR=data, ARTIFACT_DIR=folder)
    assert outcome.status == 0, outcome.err
    events = watch.events()
    assert "" in events, "validation is opened at last"
    files = [(folder / name).read_bytes() for name in (ARTIFACT, CHECKPOINT)]
    opened = events.index("")
    return Trained(*files, opened_early=opened < events.index(ARTIFACT),
                   changed_late=bool({ARTIFACT, CHECKPOINT} & set(events[opened:])))


@pytest.fixture
def trained(run, beside, tmp_path):
    """trained(): what a run leaves beside the true validation shards, and what one leaves beside decoys."""
    return lambda: [train(run, data, tmp_path / name) for name, data in beside._asdict().items()]


def test_decoys_are_other_documents_of_the_same_sizes(beside):
    for true, decoy in zip(*(shards_of(data, "val") for data in beside), strict=True):
        tokens, others = OPEN_SHARD(true), OPEN_SHARD(decoy)
        assert true.name == decoy.name and np.array_equal(tokens == 1, others == 1)
        assert (tokens != others).mean() > 0.9
    for true, decoy in zip(*(shards_of(data, "train") for data in beside), strict=True):
        assert true.read_bytes() == decoy.read_bytes()


def test_training_does_not_see_validation(trained):
    by_truth, by_decoys = trained()
    assert by_truth == by_decoys and not by_truth.opened_early and not by_truth.changed_late


@pytest.mark.parametrize("name", [ARTIFACT, CHECKPOINT])
def test_what_is_written_again_after_validation_is_caught(run, beside, tmp_path, monkeypatch, name):
    """In place or by another file of that name; even if the bytes are the same."""
    honest_score = tg.score

    def score_and_write(this_run, *args):
        scored = honest_score(this_run, *args)
        path = this_run.log.folder / name
        path.write_bytes(path.read_bytes())
        return scored

    monkeypatch.setattr(tg, "score", score_and_write)
    assert train(run, beside.truth, tmp_path / "late").changed_late


# ---- Cheats: each a way to get the bytes of a validation shard, with a place for a copy --------------------


def by_shell_copy(shard, place):
    subprocess.run(["cp", shard, place], check=True)
    return place.read_bytes()


def by_hard_link(shard, place):
    os.link(shard, place)
    return place.read_bytes()


def by_symbolic_link(shard, place):
    place.symlink_to(shard)
    return place.read_bytes()


def by_memory_map(shard, place):
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        return memory[:]


def by_thread(shard, place):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(shard.read_bytes).result()


def by_child_process(shard, place):
    return subprocess.run(["cat", shard], check=True, stdout=subprocess.PIPE).stdout


def by_other_library(shard, place):
    return torch.from_file(str(shard), size=shard.stat().st_size, dtype=torch.uint8).numpy().tobytes()


def replace_open_shard(monkeypatch, open_first):
    """Of the first training shard, open_first(tokens, the validation shard beside it) is what is read."""
    def open_shard(path):
        tokens = OPEN_SHARD(path)
        if path.name != "fineweb_train_000000.bin":
            return tokens
        return open_first(tokens, path.with_name("fineweb_val_000000.bin"))

    monkeypatch.setattr(tg, "open_shard", open_shard)


@pytest.mark.parametrize("read", [
    by_shell_copy, by_hard_link, by_symbolic_link, by_memory_map, by_thread, by_child_process,
    by_other_library])
def test_training_on_validation_is_caught(trained, monkeypatch, read):
    def mix(tokens, shard):
        seen = np.frombuffer(read(shard, shard.with_suffix(f".{read.__name__}")), "<u2")
        seen = seen[tg.HEADER_BYTES // 2 :]
        return np.append(seen, tokens[len(seen) :])

    replace_open_shard(monkeypatch, mix)
    by_truth, by_decoys = trained()
    assert by_truth.artifact != by_decoys.artifact and by_truth.checkpoint != by_decoys.checkpoint
    assert by_truth.opened_early and by_decoys.opened_early


def test_a_look_that_decides_nothing_is_caught(trained, monkeypatch):
    """Why the kernel is asked as well: a choice may happen to be the same beside decoys."""
    def choose(tokens, shard):
        return tokens if len(shard.read_bytes()) else tokens[::-1]

    replace_open_shard(monkeypatch, choose)
    by_truth, by_decoys = trained()
    assert by_truth.artifact == by_decoys.artifact and by_truth.opened_early
