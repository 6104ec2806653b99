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
from conftest import ROOT

pytest.importorskip("huggingface_hub")
sys.path.insert(0, str(ROOT / "data"))
import download  # noqa: E402


def shard(tokens) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


def published() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    draw = lambda n: np.where(np.arange(n) % 50 == 0, 1, rng.integers(4, 512, n))
    base = "datasets/datasets/fineweb10B_sp512"
    return {f"{base}/fineweb_train_000000.bin": shard(draw(100_000)), f"{base}/fineweb_train_000001.bin": shard(draw(50_000)),
            f"{base}/fineweb_val_000000.bin": shard(draw(1000)), f"{base}/fineweb_val_000001.bin": shard(draw(500)),
            "datasets/tokenizers/fineweb_512_bpe.model": b"a tokenizer", "datasets/manifest.json": b"{}",
            "datasets/datasets/fineweb10B_sp99/fineweb_val_000000.bin": shard(draw(10))}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as listing and downloading need; `served` counts bytes by file, `cut` breaks a transfer once."""

    files: dict[str, bytes] = {}
    served: dict[str, int] = {}
    cut: dict[str, int] = {}

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/datasets/owner/name/tree/main(/.*)?", path):
            rows = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40,
                     **({"lfs": {"oid": hashlib.sha256(b).hexdigest(), "size": len(b), "pointerSize": 100}} if p.endswith("bin") else {})}
                    for p, b in self.files.items()]
            return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
        match = re.fullmatch(r"/datasets/owner/name/resolve/[^/]+/(.+)", path)
        if not match or match[1] not in self.files:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound" if "owner/name" not in path else "EntryNotFound")
        name, body = match[1], self.files[match[1]]
        etag = dict(ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit="c" * 40, Accept_Ranges="bytes")
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in {**etag, "Content_Length": len(body)}.items():
                self.send_header(key.replace("_", "-"), str(value))
            return self.end_headers()
        rest = body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        for key, value in {**etag, "Content_Length": len(rest)}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if name in self.cut:
            rest = rest[: self.cut.pop(name)]
        self.served[name] = self.served.get(name, 0) + len(rest)
        self.wfile.write(rest)
        self.close_connection = True

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    handler = type("Handler", (Hub,), dict(files=published(), served={}, cut={}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", "PATH": "/usr/bin:/bin",
                           "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    yield handler
    server.shutdown()


def fetch(hub, out, *arguments):
    command = [sys.executable, str(ROOT / "data/download.py"), "--repo", "owner/name", "--variant", "sp512", "--out", str(out)]
    return subprocess.run([*command, *arguments], env=hub.environment, capture_output=True, text=True)


def test_fetches_what_is_asked_for(hub, tmp_path):
    out = tmp_path / "data"
    done = fetch(hub, out, "--train-shards", "1")
    assert done.returncode == 0, done.stderr
    there = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    strip = lambda path: path.removeprefix("datasets/")
    wanted = [p for p in hub.files if "sp512" in p and "train_000001" not in p or "fineweb_512" in p]
    assert there == {strip(p): hub.files[p] for p in wanted}, "nothing else, and nothing left of the way"
    assert "train: 1 shards, 100,000 tokens" in done.stdout and "val: 2 shards, 1,500 tokens" in done.stdout
    assert "validation documents: 30 (the challenge's validation has 50,000)" in done.stdout


def test_a_second_run_fetches_only_what_is_missing(hub, tmp_path):
    assert fetch(hub, tmp_path, "--train-shards", "1").returncode == 0
    before = dict(hub.served)
    again = fetch(hub, tmp_path, "--train-shards", "2")
    assert again.returncode == 0 and "1 files" in again.stdout
    new = {path for path in hub.served if hub.served[path] != before.get(path)}
    assert new == {"datasets/datasets/fineweb10B_sp512/fineweb_train_000001.bin"}


def test_damaged_local_files_are_fetched_again(hub, tmp_path):
    assert fetch(hub, tmp_path, "--train-shards", "1").returncode == 0
    path = tmp_path / "datasets/fineweb10B_sp512/fineweb_train_000000.bin"
    whole = path.read_bytes()
    for damage in (whole[:-10], whole[:5000] + b"xx" + whole[5002:]):
        path.write_bytes(damage)
        assert fetch(hub, tmp_path, "--train-shards", "1").returncode == 0 and path.read_bytes() == whole


def test_a_broken_transfer_goes_on_where_it_stopped(hub, tmp_path):
    name = "datasets/datasets/fineweb10B_sp512/fineweb_train_000000.bin"
    hub.cut[name] = 120_000
    runs = [fetch(hub, tmp_path, "--train-shards", "1") for _ in range(2)]
    assert runs[-1].returncode == 0, runs[-1].stderr
    assert (tmp_path / "datasets/fineweb10B_sp512/fineweb_train_000000.bin").read_bytes() == hub.files[name]
    assert hub.served[name] < 2 * len(hub.files[name]), "not from the start again"


@pytest.mark.parametrize("body,says", [(b"not a shard at all", "is not a token shard"), (shard(range(4, 100))[:-2], "its header says 96")])
def test_a_bad_file_on_the_hub_never_gets_its_name(hub, tmp_path, body, says):
    name = "datasets/datasets/fineweb10B_sp512/fineweb_val_000001.bin"
    hub.files[name] = body
    done = fetch(hub, tmp_path, "--train-shards", "1")
    assert done.returncode == 2 and says in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "datasets/fineweb10B_sp512/fineweb_val_000001.bin").exists()


@pytest.mark.parametrize("arguments,says", [
    (["--variant", "sp77"], "no complete --variant sp77; it has sp512, sp99"), (["--variant", "sp99"], "no complete --variant sp99"),
    (["--variant", "bytes"], "--variant bytes"), (["--train-shards", "3"], "--train-shards 3: owner/name has 2"),
    (["--repo", "owner/other"], "cannot list owner/other"), (["--train-shards", "0"], "at least 1"),
])
def test_mistakes_are_named(hub, tmp_path, arguments, says):
    done = fetch(hub, tmp_path / "out", *arguments)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_no_network_is_said(hub, tmp_path):
    hub.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = fetch(hub, tmp_path)
    assert done.returncode == 2 and "error: cannot list owner/name" in done.stderr and "Traceback" not in done.stderr


def test_check_fetches_nothing_and_finds_damage(hub, tmp_path):
    assert fetch(hub, tmp_path, "--train-shards", "1").returncode == 0
    served = dict(hub.served)
    assert fetch(hub, tmp_path, "--check").returncode == 0
    path = tmp_path / "datasets/fineweb10B_sp512/fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    done = fetch(hub, tmp_path, "--check")
    assert done.returncode == 2 and str(path) in done.stderr and served == hub.served


def test_defaults(monkeypatch):
    assert download.DEFAULT_REPO == "kevclark/parameter-golf"
    code = f"import runpy; print(runpy.run_path({str(ROOT / 'data/download.py')!r})['DEFAULT_REPO'])"
    done = subprocess.run([sys.executable, "-c", code], env={"MATCHED_FINEWEB_REPO_ID": "a/b"}, capture_output=True, text=True)
    assert done.stdout.strip() == "a/b"
