"""data/download.py against a stand-in for the hub on this machine: listing, resuming, checks, mistakes."""
import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from conftest import ROOT, shard_bytes

pytest.importorskip("huggingface_hub")
sys.path.insert(0, str(ROOT / "data"))
import download

SHARDS = "datasets/fineweb10B_sp512"  # where they go; on the hub this is below datasets/
TRAIN_0 = f"{SHARDS}/fineweb_train_000000.bin"
TRAIN_1 = f"{SHARDS}/fineweb_train_000001.bin"
VAL_0 = f"{SHARDS}/fineweb_val_000000.bin"
VAL_1 = f"{SHARDS}/fineweb_val_000001.bin"
TOKENIZER = "tokenizers/fineweb_512_bpe.model"


def on_hub(path: str) -> str:
    return f"datasets/{path}"


def published() -> dict[str, bytes]:
    """A repository with a complete variant, sp512, and an incomplete one, sp99."""
    rng = np.random.default_rng(0)

    def draw_shard(count: int) -> bytes:
        """A document begins at every 50th token."""
        return shard_bytes(np.where(np.arange(count) % 50 == 0, 1, rng.integers(4, 512, count)))

    return {
        on_hub(TRAIN_0): draw_shard(100_000), on_hub(TRAIN_1): draw_shard(50_000),
        on_hub(VAL_0): draw_shard(1000), on_hub(VAL_1): draw_shard(500),
        on_hub(TOKENIZER): b"a tokenizer", "datasets/manifest.json": b"{}",
        "datasets/datasets/fineweb10B_sp99/fineweb_val_000000.bin": draw_shard(10)}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as listing and downloading need."""

    files: dict[str, bytes] = {}
    served: dict[str, int] = {}  # bytes sent, by file
    cut: dict[str, int] = {}  # files whose next transfer breaks off after so many bytes

    def log_message(self, *args):
        pass

    def send_head(self, status: int, headers: dict):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_json(self, status: int, value, **headers):
        body = json.dumps(value).encode()
        self.send_head(status, {"Content-Type": "application/json", "Content-Length": len(body), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        file = re.fullmatch(r"/datasets/owner/name/resolve/[^/]+/(.+)", path)
        if re.fullmatch(r"/api/datasets/owner/name/tree/main(/.*)?", path):
            self.send_json(200, self.listing())
        elif file and file[1] in self.files:
            self.send_file(file[1])
        else:
            missing = "EntryNotFound" if "owner/name" in path else "RepoNotFound"
            self.send_json(404, {}, **{"X-Error-Code": missing})

    do_HEAD = do_GET

    def listing(self) -> list[dict]:
        rows = []
        for path, body in self.files.items():
            row = {"type": "file", "path": path, "size": len(body), "oid": "0" * 40}
            if path.endswith("bin"):
                digest = hashlib.sha256(body).hexdigest()
                row["lfs"] = {"oid": digest, "size": len(body), "pointerSize": 100}
            rows.append(row)
        return rows

    def send_file(self, name: str):
        """A file, from where the client asks for it to begin."""
        body = self.files[name]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "c" * 40,
                   "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.send_head(200, {**headers, "Content-Length": len(body)})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_head(206 if start else 200, {**headers, "Content-Length": len(body) - start})
        sent = body[start:]
        if name in self.cut:
            sent = sent[: self.cut.pop(name)]
        self.served[name] = self.served.get(name, 0) + len(sent)
        self.wfile.write(sent)
        self.close_connection = True


@pytest.fixture
def hub(tmp_path):
    """A hub that runs, with the environment of a client of it."""
    handler = type("Handler", (Hub,), dict(files=published(), served={}, cut={}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    handler.environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "PATH": "/usr/bin:/bin"}
    yield handler
    server.shutdown()


def fetch(hub, out, *arguments):
    command = [sys.executable, ROOT / "data/download.py", "--repo", "owner/name", "--variant", "sp512",
               "--out", out, *arguments]
    return subprocess.run(list(map(str, command)), env=hub.environment, capture_output=True, text=True)


def assert_mistake(done, says):
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_fetches_what_is_asked_for(hub, tmp_path):
    out = tmp_path / "data"
    done = fetch(hub, out, "--train-shards", "1")
    assert done.returncode == 0, done.stderr
    there = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    wanted = TOKENIZER, TRAIN_0, VAL_0, VAL_1
    assert there == {path: hub.files[on_hub(path)] for path in wanted}, "nothing else, no temporary file"
    assert "train: 1 shards, 100,000 tokens" in done.stdout and "val: 2 shards, 1,500 tokens" in done.stdout
    assert "validation documents: 30 (the challenge's validation has 50,000)" in done.stdout


def test_a_second_run_fetches_only_what_is_missing(hub, tmp_path):
    assert fetch(hub, tmp_path, "--train-shards", "1").returncode == 0
    before = dict(hub.served)
    again = fetch(hub, tmp_path, "--train-shards", "2")
    assert again.returncode == 0 and "1 files" in again.stdout
    fetched = {path for path in hub.served if hub.served[path] != before.get(path)}
    assert fetched == {on_hub(TRAIN_1)}


def test_damaged_local_files_are_fetched_again(hub, tmp_path):
    assert fetch(hub, tmp_path, "--train-shards", "1").returncode == 0
    path = tmp_path / TRAIN_0
    whole = path.read_bytes()
    truncated = whole[:-10]
    altered = whole[:5000] + b"xx" + whole[5002:]
    for damaged in (truncated, altered):
        path.write_bytes(damaged)
        assert fetch(hub, tmp_path, "--train-shards", "1").returncode == 0 and path.read_bytes() == whole


def test_a_broken_transfer_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut[on_hub(TRAIN_0)] = 120_000
    fetch(hub, tmp_path, "--train-shards", "1")  # the client may go on by itself
    again = fetch(hub, tmp_path, "--train-shards", "1")
    assert again.returncode == 0, again.stderr
    whole = hub.files[on_hub(TRAIN_0)]
    assert (tmp_path / TRAIN_0).read_bytes() == whole
    assert hub.served[on_hub(TRAIN_0)] < 2 * len(whole), "not from the start again"


@pytest.mark.parametrize("body,says", [
    (b"not a shard at all", "is not a token shard"),
    (shard_bytes(range(4, 100))[:-2], "its header says 96")])
def test_a_bad_file_on_the_hub_never_gets_its_name(hub, tmp_path, body, says):
    hub.files[on_hub(VAL_1)] = body
    done = fetch(hub, tmp_path, "--train-shards", "1")
    assert_mistake(done, says)
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / VAL_1).exists()


@pytest.mark.parametrize("arguments,says", [
    (["--variant", "sp77"], "no complete --variant sp77; it has sp512, sp99"),
    (["--variant", "sp99"], "no complete --variant sp99"),
    (["--variant", "bytes"], "--variant bytes"),
    (["--train-shards", "3"], "--train-shards 3: owner/name has 2"),
    (["--repo", "owner/other"], "cannot list owner/other"),
    (["--train-shards", "0"], "at least 1"),
])
def test_mistakes_are_named(hub, tmp_path, arguments, says):
    assert_mistake(fetch(hub, tmp_path / "out", *arguments), says)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_no_network_is_said(hub, tmp_path):
    hub.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    # The hub's client tries six times, and waits 23 s in between; here it only believes that it does.
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    hub.environment["PYTHONPATH"] = str(tmp_path)
    assert_mistake(fetch(hub, tmp_path), "error: cannot list owner/name")


def test_check_fetches_nothing_and_finds_damage(hub, tmp_path):
    assert fetch(hub, tmp_path, "--train-shards", "1").returncode == 0
    served = dict(hub.served)
    assert fetch(hub, tmp_path, "--check").returncode == 0
    path = tmp_path / VAL_0
    path.write_bytes(path.read_bytes()[:-2])
    done = fetch(hub, tmp_path, "--check")
    assert done.returncode == 2 and str(path) in done.stderr and served == hub.served


def test_the_default_repository_can_be_set():
    assert download.DEFAULT_REPO == "kevclark/parameter-golf"
    script = str(ROOT / "data/download.py")
    code = f"import runpy; print(runpy.run_path({script!r})['DEFAULT_REPO'])"
    done = subprocess.run([sys.executable, "-c", code], env={"MATCHED_FINEWEB_REPO_ID": "a/b"},
                          capture_output=True, text=True)
    assert done.stdout.strip() == "a/b"
