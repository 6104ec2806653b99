"""tools/sweep.py: variants side by side, whatever happens. Most runs are of a script that trains nothing."""
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiment_runs import CPU

from conftest import ROOT, SMOKE, TINY, as_environment, read_result

sys.path.insert(0, str(ROOT / "tools"))
import command
import sweep
from variants import Variant, read_script, read_table

from finished_runs import Refused

SCRIPT = f'''
import dataclasses, json, os, sys, time, types
from pathlib import Path

sys.path.insert(0, {str(ROOT / "tests")!r})
from experiment_runs import result_of, write_run

gpus = int(os.environ.get("FAKE_GPUS", 0))
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: gpus))


class UserError(Exception):
    pass


@dataclasses.dataclass
class Config:
    score: float = 1.0
    behave: str = "well"
    data_dir: str = "data"
    preset: str = ""
    iterations: int = 9
    max_wallclock_seconds: float = 600.0
    val_loss_every: int = 0
    seed: int = 0
    run_id: str = ""
    artifact_dir: str = ""
    save_scores: str = ""

    @classmethod
    def from_env(cls, env):
        try:
            float(env.get("SCORE", 1))
        except ValueError:
            raise UserError(f"SCORE={{env['SCORE']!r}} is not a number")
        return cls(**{{f.name: env.get(f.name.upper(), f.default) for f in dataclasses.fields(cls)}})


def until(there):
    """Wait, for a minute at most."""
    for _ in range(6000):
        if there():
            return
        time.sleep(0.01)
    sys.exit("nobody came")


def main(env):
    diary = Path(env["DIARY"])  # a file for each run that began, named as it
    gpu = env.get("CUDA_VISIBLE_DEVICES", "none")
    number = len(list(diary.glob("*.json")))
    seen = dict(env) | {{"number": number, "pid": os.getpid(), "cwd": os.getcwd(), "script": __file__}}
    (diary / f"{{env['RUN_ID']}}.json").write_text(json.dumps(seen))
    if env["BEHAVE"] == "meet":
        until(lambda: len(list(diary.glob("*.json"))) >= gpus)
    if env["BEHAVE"] == "hang" and (diary / "hang").exists():
        (diary / "hanging").touch()
        time.sleep(600)
    if env["BEHAVE"] == "fail" and (diary / "fail").exists():
        print("a warning\\nerror: the wheel came off", file=sys.stderr)
        sys.exit(2)
    if env["BEHAVE"] == "crash":
        raise ValueError("42")
    if env["BEHAVE"] == "die":
        os.kill(os.getpid(), 9)
    if env["BEHAVE"] == "lie":
        sys.exit(0)
    folder = Path(env["ARTIFACT_DIR"])
    seed, score = int(env["SEED"]), float(env["SCORE"])
    write_run(folder, result_of(seed, score + 0.125 * seed, card=env.get("CARD", "CPU")), last=score + 0.5)
    (folder / "final_model.pt").write_bytes(bytes(1000))
    if "SAVE_SCORES" in env:
        Path(env["SAVE_SCORES"]).write_bytes(b"scores")


if __name__ == "__main__":
    main(os.environ)
'''
TABLE = """
# a comment
seeds 0 1
common BEHAVE=well ITERATIONS=5 script=script.py
base SCORE=1.5
better SCORE=1.25
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with a script and a diary of its runs; temporary folders are in tmp."""
    monkeypatch.chdir(tmp_path)
    for folder in ("diary", "tmp"):
        Path(folder).mkdir()
    Path("script.py").write_text(SCRIPT)
    monkeypatch.setenv("DIARY", str(tmp_path / "diary"))
    monkeypatch.setattr(sweep.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path


@pytest.fixture
def call(place, capsys):
    """call(table, *options): (status, output, errors) of a sweep; nothing temporary stays."""
    def run(table: str, *options: str) -> tuple[int, str, str]:
        Path("table.txt").write_text(table)
        status = sweep.main(["table.txt", *options])
        assert not list(Path("tmp").iterdir())
        return status, *capsys.readouterr()
    return run


def diary() -> dict[str, dict]:
    """What each run that began has seen, in their order; then the diary is empty."""
    pages = {path.stem: json.loads(path.read_text()) for path in Path("diary").glob("*.json")}
    for path in Path("diary").glob("*.json"):
        path.unlink()
    return dict(sorted(pages.items(), key=lambda page: page[1]["number"]))


def row(out: str, name: str) -> list[str]:
    """The cells of the last row of a variant."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()
            if line.startswith(f"| {name} ")][-1]


def background(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "tools/sweep.py", *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for(there, seconds: int = 60):
    for _ in range(seconds * 50):
        if there():
            return
        time.sleep(0.02)
    pytest.fail("waited in vain")


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return False


# What a sweep does


def test_seeds_are_the_outer_loop_and_the_table_is_paired(call):
    status, out, err = call(TABLE)
    assert (status, err) == (0, "")
    began = diary()
    assert [*began] == ["base-seed0", "better-seed0", "base-seed1", "better-seed1"]
    page = began["better-seed1"]
    assert (page["SEED"], page["SCORE"], page["ITERATIONS"]) == ("1", "1.25", "5")
    assert page["MAX_WALLCLOCK_SECONDS"] == "0" and int(page["VAL_LOSS_EVERY"]) > 10**6  # at the end only
    assert row(out, "base")[1:4] == ["2", "2.00000 +- 0.00000", "1.56250 +- 0.08839"]
    assert row(out, "better")[:4] == ["better", "2", "-0.25000 +- 0.00000 *", "-0.25000 +- 0.00000 *"]
    kept = Path("runs/table/better/seed1")
    assert {path.name for path in kept.iterdir()} == {"log.txt", "machine.txt", "metrics.jsonl",
                                                      "result.json"}
    assert Path("runs/table/table.md").read_text().strip() in out
    assert "3 to go, about" in out and ": finished 0, 4 to go, 1 at a time" in out


def test_what_is_finished_is_not_run_again(call):
    first = call(TABLE.replace("seeds 0 1", "seeds 0, 1"), "--scores")
    assert Path("runs/table/base/seed0/scores.npz").read_bytes() == b"scores"
    diary()
    status, out, err = call(TABLE)
    assert (status, err) == (0, "") and not diary()
    assert out.split("\n\n")[1:] == first[1].split("\n\n")[1:]


def test_what_else_lies_beside_runs_is_no_run(call):
    call(TABLE)
    shutil.copytree("runs/table/base/seed0", "runs/table/base/seed0-of-2025")
    assert call(TABLE)[0] == 0


def test_variants_and_seeds_may_be_added(call):
    call(TABLE)
    diary()
    status, out, _ = call(TABLE.replace("seeds 0 1", "seeds 0 1 7") + "third SCORE=1\n")
    new = {"third-seed0", "third-seed1", "base-seed7", "better-seed7", "third-seed7"}
    assert status == 0 and {*diary()} == new
    assert row(out, "third")[1] == "3"


def test_a_variant_may_have_seeds_of_its_own_and_tables_hold_all(call, capsys):
    """Also those that the table of variants no longer has; a folder's tables run nothing."""
    call(TABLE + "third SCORE=1 seeds=1,7\n")
    assert [*diary()] == ["base-seed0", "better-seed0", "base-seed1", "better-seed1", "third-seed1",
                          "third-seed7"]
    _, out, _ = call(TABLE.replace("seeds 0 1", "seeds 1").replace("better", "# better"))
    assert not diary() and row(out, "third")[1] == "1" and row(out, "better")[1] == "2"
    assert sweep.main(["runs/table"]) == 0
    assert capsys.readouterr().out.strip() == out.split("\n\n", 1)[1].strip()
    assert sweep.main(["diary"]) == 2 and "diary is not the folder of a sweep" in capsys.readouterr().err


def test_runs_of_two_machines_are_no_pair(call, monkeypatch):
    call(TABLE.replace("better", "# better"))
    monkeypatch.setattr(sweep, "this_machine", lambda: "another")
    _, out, _ = call(TABLE.replace("seeds 0 1", "seeds 0 1 2"))
    assert "better and base are no pair of seed 0, 1: they ran on two machines" in out
    assert row(out, "better")[1] == "1", "one pair, of seed 2"


def test_runs_are_side_by_side_one_on_each_gpu(call, monkeypatch):
    """Three runs go on only when three have begun, on GPUs of their own, by the names that they have."""
    monkeypatch.setenv("FAKE_GPUS", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meeting = TABLE.replace("well", "meet").replace("seeds 0 1", "seeds 0 1 2")
    assert call(meeting)[0] == 0
    began = [*diary().values()]
    assert {page["CUDA_VISIBLE_DEVICES"] for page in began[:3]} == {"0", "1", "2"} and len(began) == 6
    assert {page["CUDA_VISIBLE_DEVICES"] for page in began[3:]} <= {"0", "1", "2"}
    assert {int(page["OMP_NUM_THREADS"]) for page in began} == {max(1, sweep.cores() // 3)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv("FAKE_GPUS", "2")
    assert call(meeting, "--out", "other")[0] == 0
    assert {page["CUDA_VISIBLE_DEVICES"] for page in diary().values()} == {"GPU-a", "GPU-b"}


def test_on_a_cpu_one_follows_the_other(call, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    call(TABLE)
    assert not any(page.get("CUDA_VISIBLE_DEVICES") for page in diary().values())
    assert not any("OMP_NUM_THREADS" in page for page in diary().values()), "the script's own default counts"


def test_settings_come_from_the_table_alone(call, monkeypatch):
    """But for DATA_DIR, by which machines differ; what is no setting is as it was."""
    for name, value in dict(SCORE="9", PRESET="x", DATA_DIR="mine", OTHER="kept").items():
        monkeypatch.setenv(name, value)
    status, _, err = call(TABLE)
    assert status == 0 and "left out" in err and "SCORE" in err and "PRESET" in err and "DATA" not in err
    page = diary()["base-seed1"]
    assert page["SCORE"] == "1.5" and "PRESET" not in page
    assert (page["DATA_DIR"], page["OTHER"]) == ("mine", "kept")


def test_data_are_found_where_the_script_would_find_them(call, place):
    """From the working directory, or beside the script, of which a copy runs."""
    (place / "far").mkdir()
    (place / "script.py").rename(place / "far/script.py")
    table = TABLE.replace("script.py", "far/script.py DATA_DIR=texts")
    (place / "far/texts").mkdir()
    call(table)
    assert {page["cwd"] for page in diary().values()} == {str(place / "far")}
    (place / "texts").mkdir()
    call(table, "--out", "b")
    assert {page["cwd"] for page in diary().values()} == {str(place)}


# What may happen to it


def test_a_variant_that_fails_does_not_stop_the_others(call):
    """It is tried by one seed only; the next call tries again."""
    Path("diary/fail").touch()
    behaviours = dict(bad="fail", worse="crash", dead="die", liar="lie")
    table = TABLE + "".join(f"{name} SCORE=1 BEHAVE={how}\n" for name, how in behaviours.items())
    status, out, err = call(table)
    assert status == 2 and err == "error: failed: bad, worse, dead, liar; the same command tries again\n"
    for line in ("bad failed, seed 0: the wheel came off", "worse failed, seed 0: ValueError: 42",
                 "dead failed, seed 0: ended by signal 9", "liar failed, seed 0: cannot read "):
        assert f"\n{line}" in out
    assert len(diary()) == 8 and row(out, "better")[1] == "2"
    assert Path("runs/table/bad/seed0.stderr.txt").read_text() == "a warning\nerror: the wheel came off\n"
    Path("diary/fail").unlink()
    status, out, _ = call(table)
    assert status == 2 and [*diary()] == ["bad-seed0", "worse-seed0", "dead-seed0", "liar-seed0", "bad-seed1"]
    assert row(out, "bad")[1] == "2" and "bad failed" not in out
    assert not Path("runs/table/bad/seed0.stderr.txt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends the children of a killed sweep")
def test_a_killed_sweep_goes_on_in_a_copied_folder(place, capsys):
    """Its run ends with it. The copy goes on without the script, on a machine that is another."""
    Path("diary/hang").touch()
    Path("table.txt").write_text(TABLE.replace("seeds 0 1", "seeds 0 1 2") + "slow SCORE=2 BEHAVE=hang\n")
    process = background("table.txt")
    wait_for(lambda: Path("diary/hanging").exists())
    pid = json.loads(Path("diary/slow-seed0.json").read_text())["pid"]
    assert is_running(pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not is_running(pid))
    assert len(list(Path("tmp").iterdir())) == 1
    began = diary()
    assert [*began] == ["base-seed0", "better-seed0", "slow-seed0"]
    # a kill while results were being copied leaves a part
    part = Path("runs/table/slow/.seed0.part")
    part.mkdir()
    (part / "scores.npz").write_text("torn")
    shutil.copytree("runs/table", "elsewhere")
    Path("script.py").unlink()
    Path("diary/hang").unlink()
    assert sweep.main(["table.txt", "--out", "elsewhere"]) == 0
    later = [f"{name}-seed{seed}" for seed in (1, 2) for name in ("base", "better", "slow")]
    assert [*diary()] == ["slow-seed0", *later]
    assert not list(Path("tmp").iterdir()), "nor what the killed one had there"
    assert row(capsys.readouterr().out, "slow")[1] == "3"
    kept = {path.name for path in Path("elsewhere/slow").glob("**/*")}
    assert kept == {"seed0", "seed1", "seed2", "train_gpt.py", "log.txt", "machine.txt", "metrics.jsonl",
                    "result.json"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_runs_and_says_how_to_go_on(place, sent):
    Path("diary/hang").touch()
    Path("table.txt").write_text(TABLE + "slow SCORE=2 BEHAVE=hang\n")
    process = background("table.txt")
    wait_for(lambda: Path("diary/hanging").exists())
    pid = json.loads(Path("diary/slow-seed0.json").read_text())["pid"]
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not is_running(pid)
    assert err == "error: interrupted: finished runs are in runs/table; the same command goes on\n"
    assert not list(Path("tmp").iterdir()) and Path("runs/table/better/seed0/result.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line_and_the_run_is_kept(place, capsys, monkeypatch):
    whole = command.write_whole

    def write(path, data):
        if path.name == "metrics.jsonl" and "better" in path.parts:
            raise OSError(28, "No space left on device", str(path))
        whole(path, data)

    Path("table.txt").write_text(TABLE)
    with monkeypatch.context() as full:
        full.setattr(command, "write_whole", write)
        assert sweep.main(["table.txt"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write runs/table/better/seed0: No space left on device: make room")
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path("runs/table/better").iterdir()) == ["train_gpt.py"]
    diary()
    (run,) = Path("tmp").glob("*/better-seed0/run")
    assert str(run) in err and not (run / "final_model.pt").exists()
    with monkeypatch.context() as full:
        full.setattr(command, "write_whole", lambda path, data: Path("/dev/full").write_bytes(data))
        assert sweep.main(["table.txt", "--out", "b"]) == 2
    assert capsys.readouterr().err == "error: cannot write b/sweep.json: No space left on device\n"
    run.rename("runs/table/better/seed0")
    assert sweep.main(["table.txt"]) == 0
    assert [*diary()] == ["base-seed1", "better-seed1"]


def test_runs_without_scores_are_named_when_scores_are_asked_for(call):
    call(TABLE)
    _, _, err = call(TABLE.replace("seeds 0 1", "seeds 1 2"), "--scores")
    assert err == ("finished without --scores, delete them to run them again: base/seed0 base/seed1 "
                   "better/seed0 better/seed1\n")


def test_missing_data_are_found_before_a_run(place, capsys):
    """By the script's own search, from where a run would start; nothing is left."""
    Path("t.txt").write_text(f"seeds 0\ncommon PRESET=single_gpu script={ROOT}/train_gpt.py\na\n")
    assert sweep.main(["t.txt"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: a: DATA_DIR=./data: no datasets/") and "sweep-" not in err
    assert str(ROOT) in err and not Path("runs").exists()


def test_one_sweep_at_a_time_in_a_folder(call):
    call(TABLE)
    with command.claim(Path("runs/table")):
        status, out, err = call(TABLE)
    assert status == 2 and not out and err == "error: runs/table: another sweep.py is at work there\n"


def test_runs_on_another_card_are_told_apart(call, monkeypatch):
    monkeypatch.setenv("CARD", "1 x NVIDIA A")
    call(TABLE.replace("seeds 0 1", "seeds 0"))
    monkeypatch.setenv("CARD", "1 x NVIDIA B")
    _, out, _ = call(TABLE)
    assert sum(line.startswith("| base ") for line in out.splitlines()) == 2
    assert row(out, "better")[:2] == ["better", "1"]


# Mistakes


@pytest.mark.parametrize("table, words", [
    (TABLE + "base SCORE=2", "line 7: base is there twice"),
    (TABLE + "seeds 4", "line 7: seeds is there twice"),
    (TABLE + "a/b SCORE=2", "line 7: a/b is no name"),
    (TABLE + "new SCORE='2", "line 7: No closing quotation"),
    (TABLE + "new SCORE", "SCORE"),
    (TABLE + "new SCORE = 2", "NAME=VALUE without spaces, each once"),
    (TABLE + "new SCORE=1 SCORE=2", "each once"),
    (TABLE + "new SEED=1", "SEED=1"),
    (TABLE + "new ref=HEAD", "script=script.py and ref=HEAD: which of them?"),
    (TABLE.replace("seeds 0 1", ""), "needs a row `seeds`"),
    (TABLE.replace("seeds 0 1", "seeds"), "needs a row `seeds`"),
    (TABLE.replace("seeds 0 1", "seeds 0 0"), "each once"),
    (TABLE.replace("seeds 0 1", "seeds -1"), "whole numbers"),
    (TABLE + "new SCORE=1 seeds=1,1", "new: seeds= wants a list of whole numbers, each once"),
    (TABLE + "new SCORE=1 seeds=", "new: seeds= wants a list of whole numbers, each once"),
    ("seeds 0\ncommon ITERATIONS=1", "needs a row for each variant"),
    (TABLE.replace("ITERATIONS=5", ""), "how long is a run?"),
    (TABLE + "new SCORE=two", "new: SCORE='two' is not a number"),  # the script's own words
    (TABLE + "new SCORES=2", "new: SCORES is not a setting of its script"),
    (TABLE.replace("script.py", "none.py"), "base: script=none.py is no file that can be read"),
    (TABLE.replace("script=script.py", "ref=none"), "base: ref=none is no commit with a train_gpt.py"),
    (TABLE.replace("script.py", "table.txt"), "unlike train_gpt.py, or cannot be imported: SyntaxError"),
])
def test_mistakes_are_one_line_and_leave_nothing(call, table, words):
    status, out, err = call(table)
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not Path("runs").exists() and not diary()


def test_what_has_no_table_is_named(place, capsys):
    assert sweep.main(["none.txt"]) == 2
    assert capsys.readouterr().err == "error: cannot read none.txt: No such file or directory\n"


@pytest.mark.parametrize("change, words", [
    (lambda table: table.replace("SCORE=1.25", "SCORE=1.125"), "SCORE (1.25 there)"),
    (lambda table: table.replace("better ", "better DATA_DIR=x "), "DATA_DIR (unset there)"),
    (lambda table: Path("script.py").write_text(SCRIPT + "\n") and table, "its script"),
])
def test_a_changed_variant_needs_another_name_or_folder(call, change, words):
    call(TABLE)
    before = Path("runs/table/sweep.json").read_bytes()
    diary()
    status, out, err = call(change(TABLE))
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not diary() and Path("runs/table/sweep.json").read_bytes() == before
    assert call(change(TABLE), "--out", "other")[0] == 0


def test_folders_of_something_else_are_refused(call):
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    status, _, err = call(TABLE, "--out", "mine")
    assert status == 2 and "mine is there, and not the folder of a sweep" in err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
    Path("ours").mkdir()
    for name in (".lock", "sweep.json.123.part"):  # what a sweep that was killed at once leaves
        (Path("ours") / name).touch()
    assert call(TABLE, "--out", "ours")[0] == 0
    for damage in ("[]", "{}", '{"variants": 5}', '{"variants": {"base": {}}}', "torn"):
        Path("ours/sweep.json").write_text(damage)
        status, _, err = call(TABLE, "--out", "ours")
        assert status == 2 and err.startswith("error: ours/sweep.json: ") and err.count("\n") == 1


def test_a_damaged_result_is_named(call):
    call(TABLE)
    Path("runs/table/base/seed1/result.json").write_text("{}")
    status, _, err = call(TABLE)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("error: runs/table/base/seed1/result.json: ")


# The script itself


def test_a_commit_has_its_script(tmp_path):
    variant = Variant("old", "ref=HEAD", {}, [0])
    head = subprocess.run(["git", "-C", str(ROOT), "show", "HEAD:train_gpt.py"], capture_output=True)
    if head.returncode:
        pytest.skip("no git history here")
    assert read_script(variant, tmp_path, {}) == head.stdout
    with pytest.raises(Refused):
        read_script(Variant("old", "ref=HEAD:data", {}, [0]), tmp_path, {})


def test_variants_are_what_the_table_says(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text('seeds 3 1\ncommon A=1 B="x y" MAX_WALLCLOCK_SECONDS=60\n\nfirst  # as it is\n'
                    'next A=2 VAL_LOSS_EVERY=5 ref=HEAD~1 seeds=5\n')
    common = {"A": "1", "B": "x y", "MAX_WALLCLOCK_SECONDS": "60", "VAL_LOSS_EVERY": "1000000000"}
    own = {**common, "A": "2", "VAL_LOSS_EVERY": "5"}
    assert read_table(path) == [Variant("first", "", common, [3, 1]), Variant("next", "ref=HEAD~1", own, [5])]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends the children of a killed sweep")
def test_a_true_sweep_is_killed_and_resumed(place, capsys):
    """Two variants of the tiny model, one of which cannot run on this machine, and two seeds."""
    settings = {**TINY, "TTT_ENABLED": 0, "NUM_LAYERS": 2, "PARALLEL_START_LAYER": 1, "NUM_LOOPS": 0,
                "QUANT_STATES": 1, "DATA_DIR": SMOKE, "VAL_DOC_FRACTION": 0.05}
    common = " ".join(f"{name}={value}" for name, value in as_environment(settings).items())
    Path("tiny.txt").write_text(f"seeds 0 1\ncommon {common}\nbase\nbad ATTENTION=flash3\n")
    process = background("tiny.txt")
    wait_for(Path("runs/tiny/base/seed0").exists, 120)
    process.kill()
    process.communicate()
    before = Path("runs/tiny/base/seed0/log.txt").stat().st_mtime_ns
    assert sweep.main(["tiny.txt"]) == 2
    out, err = capsys.readouterr()
    assert err == "error: failed: bad; the same command tries again\n"
    assert Path("runs/tiny/base/seed0/log.txt").stat().st_mtime_ns == before
    results = [read_result(Path(f"runs/tiny/base/seed{seed}")) for seed in (0, 1)]
    averages = [result["val_bpb_unquantized"] for result in results]
    assert [result["steps"] for result in results] == [6, 6] and averages[0] != averages[1]
    cells = row(out, "base")
    assert cells[1] == "2" and cells[3].startswith(f"{sum(averages) / 2:.5f} +- ") and cells[-1] == CPU
    assert cells[2] != cells[3] and cells[2][0].isdigit()  # the last weights, too, were scored
    assert "\nbad failed, seed 0: flash_attn_interface cannot be imported" in out
