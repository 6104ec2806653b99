"""What all commands share, in tools/command.py; benchmarks and maintenance without a GPU; checkouts."""
import ast
import collections
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tools/maintenance")]
import bench_kernels
import command
import floors
import same_numbers

import bench_step
import docs
import train_gpt as tg
from kernel_cases import to_fp8_without_kernel

NEEDS = {  # of every command: a package, and where it is required
    "data/prepare.py": ("sentencepiece", ""), "data/download.py": ("numpy", ""),
    "tools/plot_run.py": ("matplotlib", "-dev"), "tools/plot_ttt.py": ("numpy", "-dev"),
    "tools/audit.py": ("sentencepiece", ""),
    "tools/sweep.py": ("scipy", ""), "tools/compare.py": ("scipy", ""),
    "tools/sample.py": ("torch", ""), "tools/pack.py": ("numpy", ""), "tools/bench_step.py": ("torch", ""),
    "tools/bench_quant.py": ("brotli", ""), "tools/bench_kernels.py": ("torch", "-gpu"),
    "tools/maintenance/docs.py": ("torch", ""), "tools/maintenance/same_numbers.py": ("numpy", "")}


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def start(tmp_path, body, *arguments, **options):
    """A process of a command whose main has this body."""
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT / 'tools')!r})\nimport command\n"
                      f"from pathlib import Path\n\n\ndef main():\n{textwrap.indent(body, '    ')}\n\n\n"
                      "command.run(main)\n", encoding="utf-8")
    return subprocess.Popen([sys.executable, script, *arguments], stderr=subprocess.PIPE,
                            **{"stdout": subprocess.PIPE, "env": BUFFERED, **options})


def finish(process) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("script", NEEDS)
def test_a_missing_package_is_named_with_what_installs_it(tmp_path, script):
    package, kind = NEEDS[script]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "result"}\n')
    done = subprocess.run([sys.executable, ROOT / script, "metrics.jsonl"], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and package in done.stderr
    assert done.stderr.endswith(f"pip install -r requirements{kind}.txt\n")


@pytest.mark.parametrize("script", [*NEEDS, "tools/submission.py"])
def test_every_command_starts(script):
    """What it imports is there, from other files of ours, too."""
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and not done.stderr


def test_every_command_is_listed_above():
    scripts = [path for folder in ("data", "tools") for path in (ROOT / folder).rglob("*.py")]
    ours = {str(path.relative_to(ROOT)) for path in scripts
            if "command.run(main)" in path.read_text(encoding="utf-8")}
    needs_none = {"tools/submission.py"}  # to start with
    assert {*NEEDS} == ours - needs_none


# How a command ends


def test_names_that_are_no_text_do_not_crash_what_names_them(tmp_path):
    """On any console: of bytes that are no UTF-8, and of letters that the console's encoding lacks."""
    body = "print(sys.argv[1])\nreturn command.report(sys.argv[1])"
    for encoding in ("utf-8", "ascii"):
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        status, out, err = finish(start(tmp_path, body, b"\xff\n\x1b[1m\xc3\xa9", env=env))
        shown = "é".encode() if encoding == "utf-8" else rb"\xe9"
        assert status == 2 and out == rb"\udcff" + b"\n\x1b[1m" + shown + b"\n"
        assert err == rb"error: \udcff\n\x1b[1m" + shown + b"\n"


def test_a_console_that_is_gone_ends_quietly(tmp_path):
    """What prints with print ends as SIGPIPE ends programs; what prints with say goes on."""
    for function, status in (("print", 141), ("command.say", 0)):
        process = start(tmp_path, f"time.sleep(.2)\n{function}('x' * 10**6)\n{function}('y')\n"
                                  "Path(sys.argv[1]).touch()", tmp_path / function)
        process.stdout.close()
        assert process.wait(60) == status and process.stderr.read() == b""
        assert (tmp_path / function).exists() == (status == 0)


@pytest.mark.parametrize("function", ["print", "command.say"])
def test_a_full_console_is_said(tmp_path, function):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        status, _, err = finish(start(tmp_path, f"{function}('text')", stdout=full))
    assert (status, err) == (2, b"error: No space left on device\n")


def test_closed_consoles_are_none(tmp_path):
    process = start(tmp_path, "print('x', file=sys.stderr)\ncommand.say('y')\nreturn command.report('z')")
    line = [sys.executable, str(tmp_path / "script.py")]
    finish(process)
    done = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "-", *line], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.parametrize("body", [
    "print('at work', flush=True)\ntime.sleep(60)",
    "import threading\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    "print('at work', flush=True)\ntime.sleep(60)",
    "with command.imports():\n    print('at work', flush=True)\n    time.sleep(60)",
], ids=["main", "with a thread", "imports"])
def test_ctrl_c_is_one_line_and_status_130(tmp_path, body):
    process = start(tmp_path, body)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, b"", b"error: interrupted\n")


# Files and folders


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    command.write_whole(path, b"one")
    (tmp_path / "link").symlink_to(path)
    command.write_whole(tmp_path / "link", b"two")
    assert path.read_bytes() == b"two" and (tmp_path / "link").is_symlink()
    for place in (tmp_path, "/dev/null", tmp_path / "none/a", path / "a"):
        with pytest.raises(OSError):
            command.write_whole(type(path)(place), b"three")

    def fail(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space"):
                command.write_whole(path, b"three")
        assert path.read_bytes() == b"two"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "link"]
    assert command.sha256_of(path) == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"


def test_a_folder_is_held_until_its_process_ends_however_that_ends(tmp_path):
    """And leaves no trace."""
    (tmp_path / "held").mkdir()
    body = ("with command.claim(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()")
    for end in ("kill", "let go"):
        first = start(tmp_path, body, tmp_path / "held", stdin=subprocess.PIPE)
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="another prepare.py or download.py is at work there"):
            with command.claim(tmp_path / "held"):
                raise AssertionError("held twice")
        if end == "kill":
            first.kill()
        assert first.communicate(b"")[1] == b""
        with command.claim(tmp_path / "held"):
            assert [file.name for file in (tmp_path / "held").iterdir()] == [".lock"]
        assert not list((tmp_path / "held").iterdir())


def test_a_lock_that_was_left_locks_nothing(tmp_path):
    """As a machine leaves it that was switched off."""
    (tmp_path / ".lock").write_text("1")
    with command.claim(tmp_path):
        pass


# What no command may do


def faults(path) -> list[str]:
    """Text that is read or written in the encoding of the machine; checks that python -O leaves out."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            found.append(f"{where} assert")
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'"
            opens = name == "open" and "b" not in mode and ast.unparse(node.func) != "os.open"
            if name in ("read_text", "write_text") or opens:
                found += [] if "encoding" in options else [f"{where} {name}"]
            if options.get("text") == "True":
                found.append(f"{where} text=True")
    return found


@pytest.mark.parametrize("script", [*NEEDS, "tools/command.py"])
def test_text_is_utf_8_and_no_check_is_an_assert(script):
    assert not faults(ROOT / script)


def test_faults_are_found(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("assert x\np.read_text()\np.write_text('')\nopen(p)\nopen(p, 'w')\nrun(x, text=True)\n"
                    "open(p, 'rb')\nopen(p, encoding='utf-8')\np.read_text(encoding='utf-8')\n")
    assert [fault.split(":")[1][0] for fault in faults(path)] == list("123456")


# Benchmarks and maintenance


@pytest.fixture
def refused(capfd):
    """refused(main, *arguments): the one line that a mistake ends with."""
    def call(main, *arguments) -> str:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
        out, err = capfd.readouterr()
        assert status == 2 and not out
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err
    return call


def test_bench_step_refuses_before_it_starts_processes(refused, monkeypatch, tmp_path):
    assert "this needs 1 GPUs, here are 0" in refused(bench_step.main) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bench_step.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    assert "this needs 4 GPUs, here are 2" in refused(bench_step.main, "--gpus", "1,4")
    assert f"--data {tmp_path} has no fineweb_train" in refused(bench_step.main, "--data", tmp_path)
    monkeypatch.setenv("NUM_HEADS", "0")
    assert "NUM_HEADS" in refused(bench_step.main)


def test_bench_step_times_each_call_after_each_other(monkeypatch):
    """Not always after the same one, which may heat the GPU more than others do."""
    clock, ran = [0.0], []

    class Event:
        def record(self):
            self.at = clock[0]

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())

    def call(name, ms):
        ran.append(name)
        clock[0] += ms

    calls = {name: functools.partial(call, name, ms) for name, ms in (("a", 2.0), ("b", 3.0), ("c", 5.0))}
    assert bench_step.medians(calls, 4, 1, tg.Ranks()) == {"a": 2.0, "b": 3.0, "c": 5.0}
    before = collections.defaultdict(set)
    for first, second in zip(ran, ran[1:]):
        before[second].add(first)
    assert all(len(names) > 1 for names in before.values())


def test_bench_step_names_a_commit_that_is_none(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "no-such-commit is neither a file nor a commit" in refused(
        bench_step.main, "--compare", "no-such-commit")
    monkeypatch.setenv("PATH", "")
    assert "or git is missing" in refused(bench_step.main, "--compare", "HEAD")


@pytest.mark.parametrize("options", [["--gpus", "x"], ["--gpus", "0"], ["--gpus", "1,"], ["--rounds", "0"],
                                     ["--repeat", "0"], ["--top", "-1"]])
def test_bench_step_refuses_impossible_options(options, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_step.main(options)
    assert ended.value.code == 2 and options[0] in capsys.readouterr().err


def test_bench_step_names_a_script_that_is_unlike_this(tmp_path, refused):
    other = tmp_path / "other.py"
    other.write_text("print('é')\n", encoding="utf-8")
    assert bench_step.read_script(str(other)) == "print('é')\n".encode()
    other.write_text("Config = 1\n", encoding="utf-8")
    args = bench_step.parse_arguments([])
    said = refused(lambda _: bench_step.make_candidate(str(other), "other", args, None))
    assert f"--compare {other}: it has other names or settings" in said


def write_numbers(folder, artifact, **scores):
    (folder / "run").mkdir(parents=True)
    (folder / "run/final_model.int6.ptz").write_bytes(artifact)
    np.savez(folder / "scores.npz", **scores)
    return folder


def test_numbers_that_are_not_the_same_are_found(tmp_path):
    before = write_numbers(tmp_path / "a", b"x", nll=np.zeros(2), gone=np.zeros(1))
    now = write_numbers(tmp_path / "b", b"y", nll=np.ones(2), new=np.zeros(1))
    assert same_numbers.differences(before, before) == []
    assert same_numbers.differences(before, now) == ["artifact", "gone", "new", "nll"]


def test_a_comparison_of_no_seed_is_no_success(capsys):
    with pytest.raises(SystemExit) as ended:
        same_numbers.main(["HEAD", "--seeds"])
    assert ended.value.code == 2 and "--seeds" in capsys.readouterr().err


def test_same_numbers_ends_in_one_line(tmp_path, refused, monkeypatch):
    assert "no-such-commit" in refused(same_numbers.main, "no-such-commit")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess(
        "", 1, b"", b"Traceback\n  lines\nValueError: caf\xe9 \xff\n"))
    with pytest.raises(same_numbers.RunFailed, match=r"ended with status 1: ValueError: caf"):
        same_numbers.run(tmp_path / "script.py", tmp_path / "run", 7, 1)


def test_docs_end_in_one_line(tmp_path, refused, monkeypatch):
    for name in ("RESULTS", "SETTINGS"):
        copy = tmp_path / getattr(docs, name).name
        shutil.copy(getattr(docs, name), copy)
        monkeypatch.setattr(docs, name, copy)
    monkeypatch.setattr(docs, "submitted_runs", str)
    docs.RESULTS.write_text("no markers\n", encoding="utf-8")
    assert "lacks the markers" in refused(docs.main, "--check")
    docs.RESULTS.unlink()
    assert "cannot be read" in refused(docs.main, "--check")
    monkeypatch.setattr(docs, "submitted_runs", lambda: json.loads("{"))
    assert "cannot be read" in refused(docs.main)


# Floors of a micro-batch


def test_products_have_the_operations_of_the_model_s_matrices():
    cfg = tg.Config(num_layers=3, model_dim=64, mlp_mult=3, num_loops=0, parallel_start_layer=3,
                    vocab_size=512, rope_dims=4)
    numbers = {name: matrix.numel() for name, matrix in tg.GPT(cfg).named_matrices()}
    mlp = sum(count for name, count in numbers.items() if name.endswith(("up", "down")))
    others = sum(numbers.values()) - mlp + 512 * 64
    lengths = np.array([3, 0, 5])
    for fp8, mlp_passes in ((False, 3), (True, 3 / 2)):
        work = floors.work_of(cfg, visits=3, skips=1, lanes=0, span_lengths=lengths, fp8=fp8)
        assert work["matrix products"].operations == 2 * 8 * (3 * others + mlp_passes * mlp)
        assert work["to FP8"].rows == fp8 * 3 * 2 * (1 + 2 / 2), "of 3 visits n and a gradient, to two copies"
        assert work["loss"].rows == 2 * 512 / 64
    attended = sum(q + 0.5 for length in lengths for q in range(length))  # half of the diagonal counts
    assert work["attention"].operations == 3 * 3.5 * 4 * 64 * attended


def test_every_kernel_of_the_script_belongs_to_a_part():
    kernels = re.findall(r"def (\w+_program)\(", (ROOT / "train_gpt.py").read_text())
    parts = {floors.part_of(kernel) for kernel in kernels if kernel != "adapter_adamw_program"}
    assert parts == {*floors.PARTS} - {"attention", "all else"}


def test_every_case_of_bench_kernels_is_made(monkeypatch):
    monkeypatch.setattr(tg, "to_fp8", to_fp8_without_kernel)
    cases = bench_kernels.make_cases(16, torch.randn)
    assert len(cases) == 9
    for case in cases.values():
        case.plain(*case.leaves)
        assert case.backward_bytes >= case.forward_bytes / 2 > 0


def test_no_part_was_ever_faster_than_its_floor():
    """By the logged profile of an H200 without FP8, whose kernels nearly all belong to a part."""
    log = (ROOT / "logs/profiles/2026-11-24_1xH200_step-another-card.txt").read_text()
    lengths = np.full(114, 98_304 // 114)  # its spans; of unequal ones attention has more work
    for looped, listed in enumerate(log.split("kernels of a micro-batch")[1:]):
        found = re.findall(r"^ +([\d.]+) ms +[\d.]+ x  (.+)$", listed, flags=re.M)
        spent = collections.Counter()
        for ms, kernel in found:
            spent[kernel] += float(ms)
        plan = tg.depth_plan(tg.Config(), looped=bool(looped))
        work = floors.work_of(tg.Config(), len(plan.visits), len(plan.encoder), 3, lengths, fp8=False)
        least = {part: of.ms(2 * 98_304 * 512, 4.13e12, 797e12) for part, of in work.items()}
        *parts, everything = floors.table(spent, least)
        assert len(parts) == len(floors.PARTS) and set(least) == {*floors.PARTS} - {"all else"}
        shares = [int(re.search(r" (\d+)%$", line)[1]) for line in parts[:-1]
                  if not re.search(" (join|lanes|to FP8) ", line)]  # torch.compile had made some of these
        assert all(20 < share <= 105 for share in shares), parts
        assert float(parts[-1].split()[0]) < 0.05 * float(everything.split()[0]), parts


# Checkouts


@pytest.fixture
def git(tmp_path, monkeypatch):
    """git(...) in a repository of its own; what it says."""
    if not shutil.which("git"):
        pytest.skip("no git")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder = tmp_path / "checkout"
    folder.mkdir()

    def call(*arguments, cwd=folder) -> str:
        done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, check=True)
        return done.stdout.decode()
    call("init", "-q")
    call("config", "core.autocrlf", "true")  # as git is set up on Windows
    call.folder = folder
    return call


SAMPLES = ("train_gpt.py", "data/smoke/smoke.jsonl", "data/smoke/tokenizers/fineweb_1024_bpe.model",
           "data/smoke/datasets/fineweb10B_sp1024/fineweb_val_000000.bin", "tests/golden/golden.npz",
           "data/smoke/datasets/fineweb10B_sp1024/manifest.json", "LICENSE", "Makefile")


@pytest.mark.parametrize("attributes", [True, False])
def test_a_checkout_on_windows_has_the_same_bytes(git, attributes):
    """Whatever git is told about the ends of lines. Without .gitattributes it is not so."""
    names = [*SAMPLES, ".gitattributes"][: len(SAMPLES) + attributes]
    for name in names:
        (git.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, git.folder / name)
    git("add", ".")
    for name in names:
        (git.folder / name).unlink()
    git("checkout", "--", ".")
    same = [(git.folder / name).read_bytes() == (ROOT / name).read_bytes() for name in names]
    assert all(same) == attributes


def test_every_file_is_text_or_binary_by_name():
    """Binary files are marked, so that git never takes one for text; text has LF in the repository."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no repository")
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, check=True).stdout
    for line in listed.decode().splitlines():
        facts, name = line.split("\t")
        stored, _, attributes = facts.split(maxsplit=2)
        is_binary = name.endswith((".bin", ".model", ".npz", ".ptz", ".png"))
        assert stored == ("i/-text" if is_binary else "i/lf"), line
        assert attributes.strip() == ("attr/-text" if is_binary else "attr/text=auto eol=lf"), line
