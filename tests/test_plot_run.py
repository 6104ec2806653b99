"""tools/plot_run.py: what it reads of metrics.jsonl, what it leaves out with a word, what it refuses."""
import json
import os
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import plot_run

SETTINGS = {"kind": "settings", "train_batch_tokens": 1000, "time": 1.5}
STEP = {"kind": "step", "step": 1, "loss": 6.5, "seconds": 1.0, "lr": 0.1, "looped": False, "time": 2.5}
STEPS = [{**STEP, "step": step, "seconds": 2.0 * step, "looped": step > 2} for step in (1, 2, 3, 4)]
VALIDATION = {"kind": "validation", "step": 4, "val_loss": 5.5, "val_bpb": 2.5}
RESULT = {"kind": "result", "val_bpb_unquantized": 2.5, "val_bpb_quantized": 2.625, "val_bpb": 2.375,
          "val_loss": 5.5, "caveats": []}
RUN = [SETTINGS, *STEPS, VALIDATION, RESULT]


def write(path, rows, end="\n"):
    """A metrics.jsonl; rows are objects or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def test_figures_are_those_of_the_file(tmp_path):
    run = plot_run.read_run(write(tmp_path / "a/metrics.jsonl", RUN).parent)
    assert run["name"] == "a" and [row["step"] for row in run["steps"]] == [1, 2, 3, 4]
    assert plot_run.scores_of(run) == {"unquantized": 2.5, "quantized": 2.625, "adapted": 2.375}
    without_adaptation = {**run, "result": {**RESULT, "tokens": 9, "unadapted_tokens": 9}}
    assert plot_run.scores_of(without_adaptation) == {"unquantized": 2.5, "quantized": 2.625}
    assert plot_run.speeds(run) == ([2, 3, 4], [500.0, 500.0, 500.0])
    assert run["validations"] == [VALIDATION] and run["settings"] == SETTINGS


def test_lines_may_end_as_on_windows(tmp_path):
    path = write(tmp_path / "metrics.jsonl", RUN)
    assert plot_run.read_run(write(tmp_path / "other/metrics.jsonl", RUN, end="\r\n"))["steps"] == STEPS
    assert plot_run.read_run(path)["steps"] == STEPS


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_left_out_with_a_word(tmp_path, capsys, kept):
    """A run that was killed leaves it, with any number of its bytes; a full disk, zeros."""
    path = write(tmp_path / "metrics.jsonl", RUN[:-1])
    for torn in (json.dumps(RESULT).encode()[:kept], bytes(9), b'{"kind": "step", "caf\xc3'):
        path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in RUN[:-1]) + torn)
        run = plot_run.read_run(path)
        assert run["steps"] == STEPS and run["result"] is None
        assert capsys.readouterr().err == f"{path}: its last line is torn and left out\n"


def test_a_last_line_without_its_end_is_read_if_it_is_whole(tmp_path, capsys):
    path = write(tmp_path / "metrics.jsonl", RUN)
    path.write_bytes(path.read_bytes()[:-1])
    assert plot_run.read_run(path)["result"] == RESULT and not capsys.readouterr().err


def test_rows_of_other_kinds_are_left_out_with_a_word(tmp_path, capsys):
    path = write(tmp_path / "metrics.jsonl", [*RUN, {"kind": "new\n", "x": 1}, {"kind": "new\n", "x": 2}])
    assert plot_run.read_run(path)["steps"] == STEPS
    assert capsys.readouterr().err == f"{path}: rows of kind new\\n are left out: 2\n"


@pytest.mark.parametrize("rows,says", [
    ([SETTINGS, "no json", *STEPS], "line 2"), ([SETTINGS, json.dumps(STEP)[:30], *STEPS], "line 2"),
    ([*RUN, "no json"], f"line {len(RUN) + 1}"),
    (["5"], "line 1"), (["[]"], "line 1"), (["{}"], "line 1"), ([100_000 * "["], "line 1"),
    ([{**STEP, "loss": "6.5"}], "line 1"), ([{**STEP, "loss": None}], "line 1"),
    ([{**STEP, "loss": 10**400}], "line 1"),
    ([{name: value for name, value in STEP.items() if name != "lr"}], "line 1"),
    ([{"kind": ["step"]}], "line 1"), ([{**SETTINGS, "train_batch_tokens": "9"}], "line 1"),
    ([], "neither steps nor a result"), ([SETTINGS], "neither steps nor a result")])
def test_foreign_files_end_in_one_line(tmp_path, capsys, rows, says):
    path = write(tmp_path / "metrics.jsonl", rows)
    with pytest.raises(SystemExit) as ended:
        plot_run.main([str(path)])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith(f"error: {path}") and says in err
    assert err.count("\n") == 1 and len(err) < 400


@pytest.mark.parametrize("name", ["a", "_a", "$x_$", b"\xff", "a\nb", "é"])
def test_a_picture_of_runs_of_any_name(tmp_path, capsys, name):
    """With losses that are no numbers, of which matplotlib makes no axis; a run without steps; one without a
    result."""
    folder = tmp_path / os.fsdecode(name)
    broken = [{**STEPS[0], "loss": float("nan")}, {**STEPS[1], "loss": float("inf")}, *STEPS[2:]]
    runs = [write(folder / "metrics.jsonl", [SETTINGS, *broken, {**RESULT, "val_bpb": None}]).parent,
            write(tmp_path / "scored.jsonl", [SETTINGS, RESULT]), write(tmp_path / "cut.jsonl", RUN[:4])]
    out = tmp_path / "picture.png"
    assert plot_run.main([*map(str, runs), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and capsys.readouterr() == (f"{out}\n", "")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("out,says", [
    ("none/x.png", "No such file"), ("x.none", "'none' is not supported"), (".", "it is not a file"),
    ("/dev/full", "it is not a file")])
def test_a_picture_that_cannot_be_written_ends_in_one_line(tmp_path, monkeypatch, capsys, out, says):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "metrics.jsonl", RUN)
    with pytest.raises(SystemExit) as ended:
        plot_run.main([str(path), "-o", out])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith(f"error: cannot write {out}: ") and says in err
    assert err.count("\n") == 1 and [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_runs_of_before_are_read(capsys):
    logged = sorted((ROOT / "logs").glob("*/metrics.jsonl"))
    assert logged
    for path in logged:
        run = plot_run.read_run(path)
        assert run["steps"] and plot_run.scores_of(run) and not capsys.readouterr().err
