"""data/download.py against a stand-in for the hub on this machine: listing, going on, checks, mistakes."""
import hashlib
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import train_gpt as tg
from conftest import ROOT, SMOKE, shard_bytes

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


SUFFIX = "_lossless_caps_caseops_v1_reserved"
SIDECAR_0, SIDECAR_1 = (f"{SHARDS}/fineweb_val_bytes_00000{i}.bin" for i in range(2))


def case_ops_name(path: str) -> str:
    """The name in the repository of a file with case operations."""
    return on_hub(path).replace("sp512/", f"sp512{SUFFIX}/").replace("_bpe.", f"_bpe{SUFFIX}.")


def published_case_ops() -> dict[str, bytes]:
    """A repository of the same form with case operations: a suffix in its names, and side-cars."""
    plain = published()
    files = {case_ops_name(path): plain[on_hub(path)] for path in (TRAIN_0, TRAIN_1, VAL_0, VAL_1)}
    sizes = np.random.default_rng(1).integers(0, 9, 1000)
    sidecars = {SIDECAR_0: shard_bytes(sizes), SIDECAR_1: shard_bytes(sizes[:500])}
    return files | {case_ops_name(path): data for path, data in sidecars.items()} | {
        case_ops_name(TOKENIZER): b"with markers", "datasets/manifest.json": b"{}"}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as listing and downloading need."""

    files: dict[str, bytes] = {}
    served: dict[str, int] = {}  # bytes sent, by file
    cut: dict[str, int] = {}  # files whose next transfer breaks off after so many bytes
    stopped: dict[str, threading.Event] = {}  # files whose next transfer waits in the middle
    waiting: threading.Event  # set when one does

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
        if name in self.stopped:
            half = len(sent) // 2
            self.wfile.write(sent[:half])
            sent = sent[half:]
            self.waiting.set()
            self.stopped.pop(name).wait(60)
        self.wfile.write(sent)
        self.close_connection = True


@pytest.fixture
def hub(tmp_path):
    """A hub that runs, with the environment of a client of it."""
    handler = type("Handler", (Hub,), dict(files=published(), served={}, cut={}, stopped={},
                                           waiting=threading.Event()))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    handler.environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "PATH": "/usr/bin:/bin"}
    yield handler
    server.shutdown()


def command(out, *arguments):
    line = [sys.executable, ROOT / "data/download.py", "--repo", "owner/name", "--variant", "sp512",
            "--out", out, *arguments]
    return list(map(str, line))


def fetch(hub, out, *arguments, **options):
    return subprocess.run(command(out, *arguments), env=hub.environment, capture_output=True, text=True,
                          **options)


@pytest.fixture
def stopped(hub, tmp_path):
    """A process in the middle of the first training shard, and what lets it go on."""
    go_on = hub.stopped[on_hub(TRAIN_0)] = threading.Event()
    process = subprocess.Popen(command(tmp_path / "out", "--train-shards", "1"), env=hub.environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hub.waiting.wait(60)
    yield process, go_on
    go_on.set()
    process.kill()
    process.communicate()


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def assert_mistake(done, says):
    """The client of the hub may have said something before."""
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") or done.stderr.startswith("usage: ")


def test_fetches_what_is_asked_for(hub, tmp_path):
    out = tmp_path / "data"
    done = fetch(hub, out, "--train-shards", "1")
    assert done.returncode == 0, done.stderr
    wanted = TOKENIZER, TRAIN_0, VAL_0, VAL_1
    assert files_in(out) == {path: hub.files[on_hub(path)] for path in wanted}, "and no temporary file"
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


def test_the_client_goes_on_inside_a_file_while_it_runs(hub, tmp_path):
    """From the last of its chunks of 10 MB that were whole."""
    whole = hub.files[on_hub(TRAIN_0)] = shard_bytes(np.ones(12_000_000))
    hub.cut[on_hub(TRAIN_0)] = 23_000_000
    done = fetch(hub, tmp_path, "--train-shards", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / TRAIN_0).read_bytes() == whole
    assert hub.served[on_hub(TRAIN_0)] < 1.2 * len(whole), "not from the start again"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_whole_files_are_kept_and_one_that_was_on_its_way_begins_anew(hub, stopped, tmp_path, how):
    process, go_on = stopped
    process.send_signal(how)
    if how == signal.SIGINT:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and said.splitlines()[-1] == "error: interrupted"
        assert "Traceback" not in said
        assert set(files_in(tmp_path / "out")) == {TOKENIZER, VAL_0, VAL_1}, "nothing half there"
    process.wait()
    go_on.set()
    left = tmp_path / "out/tokenizers/.download/part"  # of another one that was killed
    left.parent.mkdir(exist_ok=True)
    left.touch()
    before = dict(hub.served)
    assert fetch(hub, tmp_path / "out", "--train-shards", "1").returncode == 0
    wanted = TOKENIZER, TRAIN_0, VAL_0, VAL_1
    assert files_in(tmp_path / "out") == {path: hub.files[on_hub(path)] for path in wanted}
    size = len(hub.files[on_hub(TRAIN_0)])
    assert hub.served == before | {on_hub(TRAIN_0): before[on_hub(TRAIN_0)] + size}


def test_two_at_work_in_one_folder(hub, stopped, tmp_path):
    """The second is told so at once and takes nothing from the first."""
    process, go_on = stopped
    said = "another prepare.py or download.py is at work there"
    assert_mistake(fetch(hub, tmp_path / "out", "--train-shards", "1"), said)
    go_on.set()
    assert process.wait(60) == 0 and len(files_in(tmp_path / "out")) == 4
    assert hub.served[on_hub(TRAIN_0)] == len(hub.files[on_hub(TRAIN_0)])


def test_a_full_disk_ends_in_one_line(hub, tmp_path):
    """The system's own refusal: here files may have no more than so many bytes."""
    resource = pytest.importorskip("resource")
    limit = 100_000  # less than a training shard has
    done = fetch(hub, tmp_path / "out", "--train-shards", "1",
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_mistake(done, "File too large")
    assert set(files_in(tmp_path / "out")) == {TOKENIZER, VAL_0, VAL_1}


@pytest.mark.parametrize("there,says", [
    ({f"{SHARDS}/manifest.json": (SMOKE / "datasets/fineweb10B_sp1024/manifest.json").read_bytes(),
      VAL_0: b"mine"}, "holds shards of prepare.py"),
    ({TOKENIZER: b"mine"}, f"{TOKENIZER} is another tokenizer"),
    ({TRAIN_1: b"mine"}, f"{TRAIN_1} is none of the hub's"),
    ({f"{SHARDS}/fineweb_val_000002.bin": b"mine"}, "fineweb_val_000002.bin is none of the hub's"),
], ids=["prepared", "tokenizer", "other train", "other val"])
def test_other_data_stay_and_are_not_mixed_with_the_hubs(hub, tmp_path, there, says):
    for name, data in there.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert_mistake(fetch(hub, tmp_path / "out", "--train-shards", "1"), says)
    assert files_in(tmp_path / "out") == there and not hub.served


def test_a_manifest_of_others_is_left_alone(hub, tmp_path):
    """And named, as nothing is compared with it."""
    path = tmp_path / SHARDS / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"[1]")
    done = fetch(hub, tmp_path, "--train-shards", "1")
    assert done.returncode == 0, done.stderr
    assert f"{path} is not of prepare.py: nothing was compared" in done.stdout
    assert path.read_bytes() == b"[1]"
    for foreign in (b"{}", b'{"val": {}}', b"no json", b"\xff", 100_000 * b"["):
        path.write_bytes(foreign)
        assert download.own_manifest(path.parent) is None


def test_a_path_that_leaves_the_repository_is_not_fetched(hub, tmp_path):
    hub.files[f"../{on_hub(SHARDS)}/fineweb_train_000002.bin"] = b"x"
    assert_mistake(fetch(hub, tmp_path, "--train-shards", "3"), "owner/name has 2")


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


@pytest.fixture
def whole(hub, tmp_path):
    """All files of a variant, without the hub."""
    for name in (TOKENIZER, TRAIN_0, VAL_0, VAL_1):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hub.files[on_hub(name)])
    return tmp_path


@pytest.mark.parametrize("missing,says", [
    ([TOKENIZER, SHARDS], f"there is no .*/{TOKENIZER}: fetch"), ([TOKENIZER], f"/{TOKENIZER}: fetch"),
    ([TRAIN_0], f"{SHARDS}/fineweb_train_.*: fetch"), ([VAL_0, VAL_1], f"{SHARDS}/fineweb_val_.*: fetch"),
    ([VAL_0], "not numbered from 000000 without a gap")])
def test_a_check_of_nothing_is_no_success(whole, capsys, missing, says):
    arguments = ["--check", "--variant", "sp512", "--out", str(whole)]
    assert download.main(arguments) == 0
    assert "train: 1 shards, 100,000 tokens" in capsys.readouterr().out
    for name in missing:
        path = whole / name
        path.rename(path.with_name("elsewhere"))
    assert download.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(f"error: .*{says}.*\n", err)


def test_a_check_names_the_variants_that_are_there(whole, capsys):
    assert download.main(["--check", "--out", str(whole)]) == 2
    assert "fineweb_8192_bpe.model: --variant may be sp512\n" in capsys.readouterr().err


def test_a_check_compares_with_the_manifest_of_prepare(tmp_path, capsys):
    """One flipped bit, another tokenizer, a shard more or less."""
    folder = "datasets/fineweb10B_sp1024"
    for path in SMOKE.glob("*/**/*.*"):
        copy = tmp_path / path.relative_to(SMOKE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    arguments = ["--check", "--variant", "sp1024", "--out", str(tmp_path)]
    assert download.main(arguments) == 0
    assert "all as manifest.json says" in capsys.readouterr().out
    for name in (f"{folder}/fineweb_val_000000.bin", "tokenizers/fineweb_1024_bpe.model"):
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
        assert download.main(arguments) == 2
        assert f"{path.name} is not what manifest.json says" in capsys.readouterr().err
        path.write_bytes(data)
    path = tmp_path / folder / "fineweb_train_000002.bin"
    for other in ("fineweb_train_000003.bin", "gone"):
        path = path.rename(path.with_name(other))
        assert download.main(arguments) == 2
        assert "is not what manifest.json says" in capsys.readouterr().err


def test_a_missing_package_is_named(hub, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['huggingface_hub'] = None\n")
    hub.environment["PYTHONPATH"] = str(tmp_path)
    done = fetch(hub, tmp_path / "out")
    assert_mistake(done, "pip install -r requirements.txt")
    assert "huggingface_hub" in done.stderr and done.stderr.count("\n") == 1


# ---- Case operations, and documents ------------------------------------------------------------------------


def test_case_operations_come_under_the_names_of_plain_shards(hub, tmp_path):
    """With their side-cars. What is there is kept, and data of the other kind is not mixed with it."""
    hub.files = published_case_ops()
    done = fetch(hub, tmp_path, "--case-ops", "--train-shards", "1")
    assert done.returncode == 0, done.stderr
    wanted = TOKENIZER, TRAIN_0, VAL_0, VAL_1, SIDECAR_0, SIDECAR_1
    assert files_in(tmp_path) == {path: hub.files[case_ops_name(path)] for path in wanted}
    assert "val: 2 shards, 1,500 tokens" in done.stdout and "validation documents: 30 " in done.stdout
    served = dict(hub.served)
    (tmp_path / SIDECAR_1).unlink()
    assert fetch(hub, tmp_path, "--case-ops", "--train-shards", "1").returncode == 0
    assert {path for path in hub.served if hub.served[path] != served[path]} == {case_ops_name(SIDECAR_1)}
    hub.files = published()
    assert_mistake(fetch(hub, tmp_path, "--train-shards", "1"), f"{TOKENIZER} is another tokenizer")


def test_train_gpt_finds_what_was_fetched(hub, tmp_path):
    """Side-cars are none of its validation shards."""
    hub.files = published_case_ops()
    assert fetch(hub, tmp_path, "--case-ops", "--train-shards", "2").returncode == 0
    files = tg.find_data(tg.Config(vocab_size=512, data_dir=str(tmp_path)), need_train=True)
    assert files.tokenizer == tmp_path / TOKENIZER and files.train == [tmp_path / TRAIN_0, tmp_path / TRAIN_1]
    assert files.val == [tmp_path / VAL_0, tmp_path / VAL_1]


@pytest.mark.parametrize("missing", [SIDECAR_1, VAL_1, TOKENIZER])
def test_case_operations_are_complete_with_all_side_cars_only(hub, tmp_path, missing):
    hub.files = published_case_ops()
    del hub.files[case_ops_name(missing)]
    done = fetch(hub, tmp_path, "--case-ops", "--train-shards", "1")
    assert_mistake(done, f"owner/name has no complete --variant sp512{SUFFIX}; it has sp512{SUFFIX}")
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("damage,says", [
    (lambda path: path.unlink(), "side-cars fineweb_val_bytes_*.bin are not one for each validation shard"),
    (lambda path: path.write_bytes(shard_bytes(range(499))), "has another number of entries than"),
    (lambda path: path.write_bytes(b"bytes"), "is not a token shard")])
def test_side_cars_that_do_not_fit_are_found(hub, tmp_path, capsys, damage, says):
    hub.files = published_case_ops()
    assert fetch(hub, tmp_path, "--case-ops", "--train-shards", "1").returncode == 0
    arguments = ["--check", "--variant", "sp512", "--out", str(tmp_path)]
    assert download.main(arguments) == 0
    damage(tmp_path / SIDECAR_1)
    assert download.main(arguments) == 2 and says in capsys.readouterr().err


DOCUMENTS = "datasets/docs_selected.jsonl"
ABOUT = "datasets/docs_selected.source_manifest.json"


@pytest.fixture
def documents(hub):
    hub.files[DOCUMENTS] = b"".join(b'{"text": "document %d"}\n' % i for i in range(9))
    hub.files[ABOUT] = json.dumps(dict(num_docs=9, docs_val=4, docs_sha256="0", shuffle_seed=1)).encode()
    return hub


def test_the_documents_are_fetched_alone_and_once(documents, tmp_path):
    """And can be prepared by the command that is printed."""
    done = fetch(documents, tmp_path, "--documents")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == {path.removeprefix("datasets/"): documents.files[path]
                                  for path in (DOCUMENTS, ABOUT)}
    assert "9 documents, of which the first 4 are for validation" in done.stdout
    served = dict(documents.served)
    assert fetch(documents, tmp_path, "--documents").returncode == 0 and documents.served == served
    command = done.stdout.splitlines()[-1].replace("data/mine", str(tmp_path / "mine")).split()
    model = SMOKE / "tokenizers/fineweb_1024_bpe.model"
    prepared = subprocess.run([sys.executable, *command[1:], "--tokenizer", str(model)], cwd=ROOT,
                              capture_output=True, text=True)
    assert prepared.returncode == 0 and "none of the 4 validation documents is among the 5" in prepared.stdout


@pytest.mark.parametrize("path,body,says", [
    (DOCUMENTS, None, "owner/name has no docs_selected.jsonl"),
    (ABOUT, b"[]", "docs_selected.source_manifest.json does not say num_docs and docs_val")])
def test_documents_that_cannot_be_used(documents, tmp_path, path, body, says):
    documents.files = {name: data for name, data in documents.files.items() if name != path}
    if body:
        documents.files[path] = body
    assert_mistake(fetch(documents, tmp_path, "--documents"), says)


@pytest.mark.parametrize("other", ["--check", "--case-ops"])
def test_documents_have_no_variant(capsys, other):
    with pytest.raises(SystemExit) as ended:
        download.main(["--documents", other])
    assert ended.value.code == 2 and "goes with neither" in capsys.readouterr().err


@pytest.mark.parametrize("arguments,repo,out", [
    ([], download.DEFAULT_REPO, ROOT / "data"),
    (["--case-ops"], "romeerp/parameter-golf-caseops-v1", ROOT / "data/caseops"),
    (["--documents"], "willdepueoai/parameter-golf", ROOT / "data"),
    (["--case-ops", "--repo", "a/b", "--out", "x"], "a/b", Path("x"))])
def test_every_kind_has_its_repository_and_its_folder(arguments, repo, out):
    args = download.parse_arguments(arguments)
    assert args.repo == repo and args.out == out


@pytest.mark.parametrize("given,used", [("a/b", "a/b"), ("", "kevclark/parameter-golf")])
def test_the_default_repository_can_be_set(given, used):
    script = str(ROOT / "data/download.py")
    code = f"import runpy; print(runpy.run_path({script!r})['DEFAULT_REPO'])"
    done = subprocess.run([sys.executable, "-c", code], env={"MATCHED_FINEWEB_REPO_ID": given},
                          capture_output=True, text=True)
    assert done.stdout.strip() == used
