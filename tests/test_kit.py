"""The submission kit, tools/submission.py and tools/pack.py.

Most runs here are fabricated; those in logs/ and one of the script as it is are read, too.
"""
import base64
import hashlib
import json
import lzma
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train_gpt as tg
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import error_bars

import finished_runs
import pack
import submission


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SOURCE = '"""A script."""\n\n\nprint("one", "=" * 100)\n'
PACKED = b"print('one')\n"
SHA256 = {"code": sha256(SOURCE.encode()), "packed": sha256(PACKED), "model": sha256(b"f" * 9)}
TOKENS, BYTES = 40_540_803, 151_080_645  # FineWeb's, about; those after the cut are not known
NATS_A_BIT = math.log(2) * BYTES / TOKENS  # of a token, of a byte
BPB = {0: 1.0581, 1: 1.0575, 2: 1.0584}  # by seed
SETTINGS = {"seed": 0, "run_id": "s0", "data_dir": "d", "matrix_lr": 0.03}
DEFAULTS = {"preset": "", "seed": 1337, "run_id": "", "data_dir": "data", "val_doc_fraction": 1.0,
            "train_log_every": 50, "val_loss_every": 0, "eval_max_seconds": 600.0, "matrix_lr": 0.026,
            "beta2": 0.99}
VERSIONS = {"python": "3.12.3", "cuda": "13.0", "torch": "2.11.0+cu130", "flash_attn_3": "3.0.0",
            "numpy": "2.3.5"}
PHASES = {"imports": 9.0, "join": 3.0, "setup": 5.0, "open training data": 1.0, "warm-up": 60.0,
          "train": 596.0, "calibrate": 3.1, "export": 9.0, "hash training data": 30.0,
          "open validation": 0.5, "count bytes": 4.0, "score unquantized": 2.0, "open artifact": 3.5,
          "score quantized": 2.5, "prepare adaptation": 40.0, "adapt": 406.0, "report": 0.4}
SECONDS = 1175.5  # half a second more
CLOCKS = {"training": {"seconds": 599.1, "budget": 600.0}, "scoring": {"seconds": 412.0, "budget": 600.0}}
ON_CLOCK = {"train": "training", "calibrate": "training", "open artifact": "scoring",
            "score quantized": "scoring", "count n-grams": "scoring", "adapt": "scoring"}
NEWER = """recompilations bytes_at_cut cap_bytes phases targets_left_out model_sha256 train_sha256
    train_data_sha256""".split()  # what results of older scripts may lack
UNKNOWN, FEW = "unknown validation set", "not on 8 GPUs"  # caveats
PROXY = dict(documents=1800, tokens=1_738_469, bytes=6_473_176, bytes_at_cut=None)
RULES = ("score before update", "documents independent", "every target once", "full distribution", "headline",
         "causal", "size", "clocks", "all documents", "origin", "no drift", "confined",
         "as this script")  # of an audit
IN_SCORING = {"score_before_update", "documents_independent", "every_target_once", "full_distribution"}
UNSEEN = IN_SCORING | {"validation_read_only_after_export"}  # what no log can show


def with_scores(r: dict) -> dict:
    """A result with losses, if it has none, that fit its bits per byte, and without what is None."""
    nats_a_bit = math.log(2) * r["bytes"] / r["tokens"]
    losses = {name.replace("bpb", "loss"): r[name] * nats_a_bit for name in r if name.startswith("val_bpb")}
    return {name: value for name, value in {**losses, **r}.items() if value is not None}


def result_of_seed(seed: int, /, **changes) -> dict:
    """What a flawless record run would leave, but for the changes."""
    bpb = BPB.get(seed, 1.06)
    model_bytes = 15_999_000 + seed
    return with_scores(dict(
        val_bpb=bpb, val_bpb_quantized=bpb + 0.011, val_bpb_unquantized=bpb + 0.002,
        caveats=[], unadapted_tokens=0, recompilations=0,
        documents=50_000, tokens=TOKENS, bytes=BYTES, bytes_at_cut=151_078_222,
        total_bytes=model_bytes + len(PACKED), code_bytes=len(PACKED), model_bytes=model_bytes,
        cap_bytes=16_000_000, clocks=CLOCKS,
        mode="train", seed=seed, steps=400 + seed, targets_left_out=7, run_id=f"s{seed}",
        settings={**SETTINGS, "seed": seed, "run_id": f"s{seed}"},
        hardware="8 x NVIDIA H100 80GB HBM3", versions=VERSIONS, phases=PHASES, seconds=SECONDS,
        code_sha256=SHA256["code"], packed_sha256=SHA256["packed"], model_sha256=SHA256["model"],
        tokenizer_sha256="a" * 64, train_sha256="e" * 64, train_data_sha256="d" * 64, val_sha256="b" * 64)
        | changes)


def older(r: dict) -> dict:
    """The result as older scripts wrote it."""
    return {name: value for name, value in r.items() if name not in NEWER}


def log_lines(r: dict, source: str) -> list[str]:
    """The log of a run with this result, in train_gpt.py's form."""
    gpus, device = r["hardware"].split(" x ")
    left_out = f" targets_left_out:{r['targets_left_out']}" if "targets_left_out" in r else ""
    lines = [f"run_id:{r['run_id']} artifact_dir:x code_sha256:{r['code_sha256']}",
             f"versions: {finished_runs.key_values(r['versions'])}",
             f"settings other than the record's: {finished_runs.key_values(r['settings'])}",
             f"all settings: {finished_runs.key_values({**DEFAULTS, 'seed': r['seed'], **r['settings']})}",
             f"device:{device} world_size:{gpus} attention:flash3_attention kernels:Triton",
             "=" * 100, source, "=" * 100,
             f"tokenizer: sha256:{r['tokenizer_sha256']} changes in text: nothing",
             *([f"case operations: {r['case_ops']} sidecars:0"] if "case_ops" in r else []),
             "step:1/2 train_loss:9.0",
             f"train: steps:{r['steps']} tokens:9 epochs:1.0{left_out}",
             "training shards read: 1 of 2",
             f"bytes: code:{r['code_bytes']} model:{r['model_bytes']} total:{r['total_bytes']} cap:16000000",
             f"validation: documents:{r['documents']} tokens:{r['tokens']} bytes:{r['bytes']} "
             "documents_a_byte_short:0 (a space first)"]
    for name, stage in (("unquantized", "_unquantized"), ("quantized", "_quantized"), ("final", "")):
        lines.append(f"{name} val_loss:{r[f'val_loss{stage}']:.8f} val_bpb:{r[f'val_bpb{stage}']:.8f}")
    for name, seconds in r.get("phases", {}).items():
        lines.append(f"phase {name:20}{seconds:9.1f} s  {ON_CLOCK.get(name, '')}".rstrip())
    lines += [f"clock {name:20}{clock['seconds']:9.1f} s" for name, clock in r["clocks"].items()]
    if "recompilations" in r:
        lines.append(f"recompilations on the clocks:{r['recompilations']}")
    return lines + [f"caveats: {'; '.join(r['caveats']) or 'none'}", "RESULT " + json.dumps(r), ""]


def metrics_rows(r: dict) -> list[dict]:
    """The rows of metrics.jsonl of a run with this result."""
    settings = {**DEFAULTS, "seed": r["seed"], **r["settings"]}
    gpus = int(r["hardware"].split()[0])
    began = 1.8e9
    ran = [began]  # when each phase ended
    for seconds in r.get("phases", PHASES).values():
        ran.append(ran[-1] + seconds)
    a_step = r.get("phases", PHASES)["train"] / r["steps"]
    every = settings["train_log_every"]
    rows = [{"kind": "settings", "time": ran[2] + 1, **settings, "world_size": gpus}]
    for step in range(1, r["steps"] + 1):
        reported = step if step <= 3 else min(r["steps"], -(-step // every) * every)
        rows.append({"kind": "step", "time": ran[5] + reported * a_step, "step": step, "loss": 3.0,
                     "seconds": (step - 1) * a_step})
    for (name, seconds), ended in zip(r.get("phases", {}).items(), ran[1:]):
        if name not in ("imports", "join"):
            rows.append({"kind": "phase", "time": ended, "name": name, "seconds": seconds + 0.0002})
    rows += [{"kind": "of another script", "time": ran[-1]}, {"kind": "result", "time": ran[-1], **r}]
    if "phases" not in r:
        rows = [{name: value for name, value in row.items() if name != "time"} for row in rows]
    return rows


def write_rows(folder, rows: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, r: dict, source: str = SOURCE):
    """Write the files of a run with this result, in train_gpt.py's form; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("\n".join(log_lines(r, source)), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(r, indent=1) + "\n")
    (folder / "train_gpt_packed.py").write_bytes(PACKED)
    write_rows(folder, metrics_rows(r))
    return folder


def write_audit(folder, model=SHA256["model"], script=SHA256["code"], said=None, **verdicts):
    """Write an audit.json of a run in which all passes but these verdicts; returns the folder.

    `said` are values of its result that are others there. A verdict that is None is left out.
    """
    rules = dict.fromkeys(RULES, "pass") | {name.replace("_", " "): word for name, word in verdicts.items()}
    result = json.loads((folder / "result.json").read_text())
    audit = {name: result[name] for name in finished_runs.AUDITED_VALUES} | (said or {})
    audit |= {"model_sha256": model, "script_sha256": script,
              "rules": {name: word for name, word in rules.items() if word is not None}}
    (folder / "audit.json").write_text(json.dumps(audit))
    return folder


@pytest.fixture
def own(monkeypatch):
    """Makes SOURCE this repository's script."""
    monkeypatch.setattr(submission, "is_own", lambda run: run.source == SOURCE)


@pytest.fixture
def runs(tmp_path, own):
    """Folders, in no order, of three flawless runs of this repository's script that passed an audit."""
    folders = [write_run(tmp_path / f"seed{seed}", result_of_seed(seed)) for seed in (2, 0, 1)]
    return [str(write_audit(folder)) for folder in folders]


@pytest.fixture
def refused(capsys):
    """refused(main, *arguments): the one line that a mistake ends with."""
    def call(main, *arguments) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err
    return call


# Runs that add up

def test_three_runs_make_a_submission(runs, tmp_path, capsys):
    file = tmp_path / "submission.json"
    baseline = "--baseline=1.0728,1.0726,1.0732"
    arguments = ["check", *runs, "--write", str(file), "--author", "A", "--date", "2026-01-02", baseline]
    assert submission.main(arguments) == 0
    made = json.loads(file.read_text())
    assert made["author"] == "A" and made["date"] == "2026-01-02" and made["seeds"] == [0, 1, 2]
    results = [result_of_seed(seed) for seed in (0, 1, 2)]
    for name in ("val_loss", "val_bpb"):
        values = [r[name] for r in results]
        assert made[name] == pytest.approx(statistics.fmean(values), rel=1e-15)
        assert made[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
    row = made["seed_results"]["2"]
    assert row["artifact_bytes"] == made["artifact_bytes"] == 15_999_002 + len(PACKED)
    assert row["steps"] == 402 and row["training_seconds"] == 599.1
    assert (tmp_path / row["log"]).samefile(tmp_path / "seed2/log.txt")
    assert made["model_bytes"] + made["code_bytes"] == made["artifact_bytes"]
    assert all(made["compliance"].values()) and made["caveats"] == [] and made["corpus"] == "FineWeb"
    assert made["track"] == "10min_16mb" and made["record"] is True
    first, *others, last = capsys.readouterr().out.splitlines()
    assert first == ("no contradiction, seeds [0, 1, 2]: val_bpb 1.05800 +- 0.00046, 15,999,015 bytes, "
                     "track 10min_16mb")
    assert any("lower at all: p = " in line for line in others)
    assert any(", below the 0.01 that" in line for line in others)
    assert last == str(file)


def test_a_submission_has_all_fields_of_the_one_in_the_repository(runs, tmp_path):
    file = tmp_path / "submission.json"
    assert submission.main(["check", *runs, "--write", str(file)]) == 0
    made = json.loads(file.read_text())
    theirs = json.loads((ROOT / "submission.json").read_text())
    assert set(theirs) <= set(made)
    assert set(theirs["compliance"]) <= set(made["compliance"])
    row, *_ = theirs["seed_results"].values()
    assert set(row) <= set(made["seed_results"]["0"])


def test_the_table_has_every_seed_their_mean_and_their_deviation(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert submission.main(["table", *runs, "--baseline=1.0728,1.0726,1.0732"]) == 0
    printed = capsys.readouterr().out
    assert "| 0 | 1.05810 | " in printed
    assert "| **mean** | **1.05800** | " in printed
    assert "| std | 0.00046 | " in printed
    assert "| [log](seed2/log.txt) |" in printed
    assert "lower at all: p = " in printed and ", below the 0.01 that" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1", "seed2"], "none is written"


def test_a_check_writes_nothing_unless_told(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert submission.main(["check", *runs]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1", "seed2"]


def test_a_record_has_to_be_better_by_the_margin(runs, tmp_path):
    """This one is better without doubt, but by 0.0009 bits a byte, which is less than 0.005 nats a token."""
    file = tmp_path / "submission.json"
    arguments = ["check", *runs, "--write", str(file), "--baseline", "1.0590,1.0589,1.0588"]
    assert submission.main(arguments) == 0
    made = json.loads(file.read_text())
    assert made["significance"]["p_improves"] < 0.05
    assert made["significance"]["p_improves_by_0.005_nats"] > 0.9
    assert made["track"] == "10min_16mb" and made["record"] is False


def test_one_run_is_a_submission_without_spread(tmp_path, capsys):
    r = result_of_seed(5, hardware="4 x NVIDIA H200", caveats=[UNKNOWN, FEW], **PROXY)
    log = write_run(tmp_path / "run", r) / "log.txt"  # a log alone is read, too
    file = tmp_path / "submission.json"
    older = dict(author="Kept", corpus="prose", val_sha256=r["val_sha256"], date="1999-01-01")
    file.write_text(json.dumps(older))
    assert submission.main(["check", str(log), "--write", str(file)]) == 0
    made = json.loads(file.read_text())
    assert made["val_bpb_std"] is None and made["val_bpb"] == r["val_bpb"] and made["record"] is False
    assert made["author"] == "Kept" and made["date"] > "2000"
    assert made["corpus"] == "prose; unknown validation set"
    no = {rule for rule, holds in made["compliance"].items() if holds is False}
    assert no == {"eight_gpus", "h100", "fineweb", "three_seeds"}
    assert made["track"] == "non-record-16mb"
    assert made["caveats"] == made["seed_results"]["5"]["caveats"] == [UNKNOWN, FEW]
    assert "caveat: not on 8 GPUs" in capsys.readouterr().out


def test_the_same_submission_made_again_keeps_its_date(runs, tmp_path):
    file = tmp_path / "submission.json"
    assert submission.main(["check", *runs, "--write", str(file), "--date", "2001-02-03"]) == 0
    made = json.loads(file.read_text())
    assert made["date"] == "2001-02-03"
    assert submission.main(["check", *runs, "--write", str(file)]) == 0
    assert json.loads(file.read_text()) == made
    assert submission.main(["check", runs[0], "--write", str(file)]) == 0
    assert json.loads(file.read_text())["date"] > made["date"], "of other runs it is another"


EARLY = "VAL_LOSS_EVERY=100: validation was read during training"


@pytest.mark.parametrize("changes, rules", [
    (dict(caveats=["late"]), set()),
    (dict(settings={"val_loss_every": 100}, caveats=[EARLY]), {"validation_read_only_after_export"}),
    (dict(documents=49_999), {"fineweb"}),
    (dict(caveats=[UNKNOWN], **PROXY), {"fineweb"}),
    (dict(hardware="8 x NVIDIA H200"), {"h100"}),
])
def test_what_speaks_against_runs_keeps_them_from_being_a_record(changes, rules, own, tmp_path):
    folders = [write_run(tmp_path / f"{seed}", result_of_seed(seed, **changes)) for seed in range(3)]
    made = made_of(*folders)
    assert {rule for rule, holds in made["compliance"].items() if not holds} == rules
    assert made["track"] == "non-record-16mb" and made["record"] is False


def made_of(*folders) -> dict:
    """The submission of these runs, which is a record if nothing speaks against it."""
    loaded = finished_runs.load(list(folders))
    logs = [str(run.log) for run in loaded]
    return submission.make_submission(loaded, logs, {"date": ""}, {submission.BY_MARGIN: 0.0})


@pytest.mark.parametrize("changes, fineweb", [
    (dict(), True),
    (dict(tokens=40_540_160, bytes=151_078_222), True),
    (dict(tokens=47_851_900, bytes=151_075_900, bytes_at_cut=151_074_499), True),
    (dict(tokens=43_000_000, bytes=151_080_266, bytes_at_cut=None), True),  # by another tokenizer
    (dict(tokens=43_000_000, bytes=151_082_691, bytes_at_cut=None, caveats=[UNKNOWN]), False),
    (dict(tokens=43_000_000, bytes=151_074_498, bytes_at_cut=None, caveats=[UNKNOWN]), False),
    (dict(tokens=43_000_000, bytes_at_cut=None, documents=49_999, caveats=[UNKNOWN]), False),
    (dict(bytes=151_086_414, caveats=[UNKNOWN]), False),  # long words behind the cut
    (dict(documents=49_999), False),
    (dict(bytes_at_cut=151_078_221, caveats=[UNKNOWN]), False),
    (dict(bytes_at_cut=151_074_499, caveats=[UNKNOWN]), False),  # the other tokenizer's, at the other cut
    (dict(tokens=47_851_900, caveats=[UNKNOWN]), False),
    (dict(caveats=[UNKNOWN], **PROXY), False),
])
def test_fineweb_is_known_by_its_bytes(changes, fineweb, tmp_path):
    made = made_of(write_run(tmp_path / "run", result_of_seed(0, **changes)))
    assert made["compliance"]["fineweb"] is fineweb
    assert made["corpus"].endswith("FineWeb" if fineweb else "documents; unknown validation set")


def test_whether_an_older_run_scored_fineweb_is_not_known(tmp_path):
    """It has its number of documents and about its bytes, and so would another text have.

    So runs that claim to be older, whose seconds are judged less strictly, are no record.
    """
    r = result_of_seed(0)
    without_report = r | {"phases": {name: r["phases"][name] for name in PHASES if name != "report"}}
    for name, result in (("older", older(r)), ("without report", without_report)):
        made = made_of(write_run(tmp_path / name, result))
        assert made["compliance"]["fineweb"] is None and made["record"] is False
        assert made["corpus"] == "50,000 validation documents; unknown validation set"


def test_the_bytes_of_the_other_cut_are_an_unknown_set(tmp_path, refused):
    """Which a result has to state: 151,074,499 bytes are FineWeb's with case operations alone."""
    r = result_of_seed(0, bytes_at_cut=151_074_499, caveats=[])
    assert "lacks the caveat `unknown validation set`" in refused(submission.main, "check",
                                                                  write_run(tmp_path / "run", r))


@pytest.mark.parametrize("call", ['with log.phase("report"):', "with A.phase('report'):"])
def test_a_new_run_cannot_pass_for_an_older_one(call, tmp_path, refused):
    """Its source, whose hash is checked, says what its result has to have."""
    source = f"{SOURCE}\n{call}\n    pass\n"
    r = result_of_seed(0) | {"code_sha256": sha256(source.encode())}
    assert finished_runs.load([write_run(tmp_path / "new", r, source)])
    without_report = r | {"phases": {name: r["phases"][name] for name in PHASES if name != "report"}}
    for name, result in (("older", older(r)), ("without report", without_report)):
        folder = write_run(tmp_path / name, result, source)
        assert "its script writes a phase `report`" in refused(submission.main, "check", folder)


# What no log can show

def test_what_no_log_can_show_is_null(tmp_path, capsys):
    folder = write_run(tmp_path / "run", result_of_seed(0))
    file = tmp_path / "submission.json"
    assert submission.main(["check", str(folder), "--write", str(file)]) == 0
    made = json.loads(file.read_text())
    assert {rule for rule, holds in made["compliance"].items() if holds is None} == UNSEEN
    assert "not established, see docs/submitting.md: score_before_update, " in capsys.readouterr().out


def test_with_a_rule_not_established_three_runs_are_no_record(runs, monkeypatch):
    assert made_of(*map(Path, runs))["record"] is True
    monkeypatch.setattr(submission, "is_own", lambda run: run.result["seed"] != 1)
    made = made_of(*map(Path, runs))
    assert made["compliance"]["validation_read_only_after_export"] is None
    assert {made["compliance"][rule] for rule in IN_SCORING} == {True}, "all runs passed an audit"
    assert made["record"] is False and made["track"] == "non-record-16mb" and made["caveats"] == []


def test_each_run_has_to_be_audited(tmp_path):
    folders = [write_audit(write_run(tmp_path / f"{seed}", result_of_seed(seed))) for seed in range(3)]
    rules = made_of(*folders)["compliance"]
    assert {rule for rule, holds in rules.items() if holds is None} == UNSEEN - IN_SCORING
    write_audit(folders[1], causal="NOT CHECKED")
    rules = made_of(*folders)["compliance"]
    assert rules["score_before_update"] is None and rules["full_distribution"] is True
    (folders[1] / "audit.json").unlink()
    rules = made_of(*folders)["compliance"]
    assert {rules[rule] for rule in UNSEEN} == {None}


def test_what_came_before_the_artifact_no_audit_can_see(tmp_path):
    """A script that trains on validation may leave, and be audited with, what this repository's packs to."""
    source, packed = (ROOT / "train_gpt.py").read_text(encoding="utf-8") + "#\n", tg.pack_script()
    folder = write_own_run(tmp_path / "run", source, packed)
    rules = made_of(write_audit(folder, script=sha256(packed)))["compliance"]
    assert {rules[rule] for rule in IN_SCORING} == {True}
    assert rules["validation_read_only_after_export"] is None


@pytest.mark.parametrize("word", ["NOT CHECKED", None])
@pytest.mark.parametrize("rule", ["confined", "no drift", "as this script"])
def test_what_an_audit_could_not_make_sure_of_is_not_established(rule, word, tmp_path):
    """Else a script could look up, outside its folder, the losses that it has to have."""
    folder = write_audit(write_run(tmp_path / "run", result_of_seed(0)), **{rule: word})
    made = made_of(folder)
    assert {made["compliance"][name] for name in IN_SCORING} == {None} and made["caveats"] == []


@pytest.mark.parametrize("rule, broken", [
    ("score before update", "score_before_update"), ("causal", "score_before_update"),
    ("documents independent", "documents_independent"), ("every target once", "every_target_once"),
    ("all documents", "every_target_once"), ("headline", "every_target_once"),
    ("full distribution", "full_distribution"), ("size", "artifact_under_16000000_bytes"),
    ("clocks", "training_under_600s"), ("clocks", "scoring_under_600s"),
    ("origin", None), ("a rule of another audit", None)])
def test_what_an_audit_found_broken_is_broken(rule, broken, runs, tmp_path):
    write_audit(tmp_path / "seed2", **{rule: "FAIL"})
    made = made_of(*map(Path, runs))
    assert broken is None or made["compliance"][broken] is False
    assert made["caveats"] == [f"audit of seed 2: FAIL {rule}"] and made["record"] is False


def own_result(**changes) -> dict:
    """A flawless result of this repository's script."""
    packed = tg.pack_script()
    r = dict(code_sha256=sha256((ROOT / "train_gpt.py").read_bytes()), packed_sha256=sha256(packed),
             code_bytes=len(packed), model_bytes=100, total_bytes=len(packed) + 100)
    return result_of_seed(0, **r | changes)


def write_own_run(folder, source: str, packed: bytes, **changes):
    """Write the files of a run of this source, which left that packed script."""
    r = own_result(code_sha256=sha256(source.encode()), packed_sha256=sha256(packed),
                   code_bytes=len(packed), total_bytes=len(packed) + 100, **changes)
    folder = write_run(folder, r, source)
    (folder / "train_gpt_packed.py").write_bytes(packed)
    return folder


def packed_again(packed: bytes, change) -> bytes:
    """A packed script with another source in it."""
    head, text, tail = re.split(rb'(?<=b85decode\(")([^"]+)', packed)
    source = change(lzma.decompress(base64.b85decode(text)).decode())
    return head + base64.b85encode(lzma.compress(source.encode())) + tail


def test_the_packed_script_is_what_the_minifier_makes():
    """Also of what a CPU does not run: nothing else is taken away, or put in."""
    minifier = pytest.importorskip("python_minifier")
    annotations = minifier.RemoveAnnotationsOptions(remove_return_annotations=False,
                                                    remove_argument_annotations=False)
    made = minifier.minify((ROOT / "train_gpt.py").read_text(encoding="utf-8"),
                           remove_annotations=annotations, remove_literal_statements=True,
                           hoist_literals=False, rename_locals=False)
    assert submission.unpack(tg.pack_script()) == made


def test_the_script_itself_vouches_for_its_rules(tmp_path):
    """Whether it ran as it is or packed, and also if it was packed with another Python."""
    source, packed = (ROOT / "train_gpt.py").read_text(encoding="utf-8"), tg.pack_script()
    small = submission.unpack(packed)
    compile(small, "packed", "exec")
    written_otherwise = packed_again(packed, lambda text: text + "\n\n")
    for name, ran, left in (("source", source, packed), ("packed", small, packed),
                            ("another Python", source, written_otherwise),
                            ("packed by another", small + "\n\n", written_otherwise)):
        made = made_of(write_own_run(tmp_path / name, ran, left))
        assert {made["compliance"][rule] for rule in UNSEEN} == {True}, name
    write_audit(tmp_path / "packed", script=sha256(packed), causal="FAIL")
    assert made_of(tmp_path / "packed")["compliance"]["score_before_update"] is False, "an audit saw more"


def test_another_script_does_not_vouch_for_its_rules(tmp_path):
    source, packed = (ROOT / "train_gpt.py").read_text(encoding="utf-8"), tg.pack_script()
    small = submission.unpack(packed)
    cheat = packed_again(packed, lambda text: text.replace(".99", ".98"))
    written_otherwise = packed_again(packed, lambda text: text + "\n\n")
    twice = b"# " + re.search(rb'b85decode\("[^"]+"\)', packed)[0] + b"\n" + cheat
    otherwise_run = packed.replace(b"decode()", b"decode().replace('.99', '.98')")
    assert cheat != packed != otherwise_run
    for name, ran, left in (("one comment more", source + "#\n", packed), ("ships another", source, cheat),
                            ("ships what changes it", source, otherwise_run),
                            ("ships it beside another", source, twice),
                            ("ran what changed it", small, otherwise_run),
                            ("ships what is not packed", source, b"print()\n"),
                            ("ran another, packed", small.replace(".99", ".98"), packed),
                            ("ran another, shipped", small.replace(".99", ".98"), written_otherwise),
                            ("ran and ships another", small.replace(".99", ".98"), cheat)):
        made = made_of(write_own_run(tmp_path / name, ran, left))
        assert {made["compliance"][rule] for rule in UNSEEN} == {None}, name


def test_the_script_itself_that_looked_early_says_so(tmp_path):
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    changes = dict(settings={**SETTINGS, "val_loss_every": 100}, caveats=[EARLY])
    made = made_of(write_own_run(tmp_path / "run", source, tg.pack_script(), **changes))
    assert made["compliance"]["validation_read_only_after_export"] is False
    assert {made["compliance"][rule] for rule in IN_SCORING} == {True}


@pytest.mark.parametrize("changes, words", [
    (dict(model="c" * 64), "not an audit of this run's final_model.int6.ptz"),
    (dict(script="c" * 64), "not an audit with this run's script"),
    (dict(said=dict(val_loss=2.9, val_bpb=1.1)), "val_loss, val_bpb not as in this run's RESULT"),
    (dict(said=dict(code_sha256="c" * 64, packed_sha256=None, val_sha256="c" * 64)),
     "code_sha256, packed_sha256, val_sha256 not as in"),
    (dict(causal="passed"), "its rules have to be an object of pass, FAIL, NOT CHECKED"),
    (dict(causal=["FAIL"]), "its rules have to be an object of pass, FAIL, NOT CHECKED"),
])
def test_an_audit_of_something_else_is_refused(changes, words, tmp_path, refused):
    folder = write_audit(write_run(tmp_path / "run", result_of_seed(0)), **changes)
    said = refused(submission.main, "check", folder)
    assert words in said and str(folder / "audit.json") in said


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"rules": 3}', "[" * 99_999])
def test_an_audit_that_is_damaged_is_refused(content, tmp_path, refused):
    folder = write_run(tmp_path / "run", result_of_seed(0))
    (folder / "audit.json").write_text(content)
    assert str(folder / "audit.json") in refused(submission.main, "check", folder)


def test_an_audit_of_the_packed_script_is_of_the_run(tmp_path):
    folder = write_audit(write_run(tmp_path / "run", result_of_seed(0)), script=SHA256["packed"])
    assert made_of(folder)["compliance"]["full_distribution"] is True


# Seconds

@pytest.mark.parametrize("shown, fits", [("9.0", True), ("9.1", True), ("9.2", False), ("8.9", False)])
def test_seconds_are_rounded_twice(shown, fits, tmp_path, refused):
    """To three decimals in a result and to one in a log: 9.0499 s are 9.05 there and 9.0 here."""
    folder = write_run(tmp_path / "run", result_of_seed(0, phases={**PHASES, "export": 9.05}))
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8")
    (line,) = re.findall(r"\nphase export +9\.\d s", text)
    log.write_text(text.replace(line, f"{line[:-5]}{shown} s"), encoding="utf-8")
    if fits:
        assert finished_runs.load([folder])
    else:
        assert "no line `phase export 9.1 s`" in refused(submission.main, "check", folder)


def slowed(rows: list[dict], factor: float) -> list[dict]:
    """Rows of a run whose own clocks showed 1 / factor of the time that passed."""
    began = rows[0]["time"]
    return [row | {"time": began + factor * (row["time"] - began)} for row in rows]


def in_training(rows: list[dict], longer: float) -> list[dict]:
    """Rows of a run that took so much longer from the middle of its training on, and told nobody."""
    middle = next(i for i, row in enumerate(rows) if row.get("step") == 200)
    return rows[:middle] + [row | {"time": row["time"] + longer} for row in rows[middle:]]


def only_in_training(rows: list[dict], longer: float) -> list[dict]:
    """Rows of steps that took so much longer, in a run that is so much faster after them."""
    return [row | {"time": row["time"] + longer * row.get("step", 0) / 400} for row in rows]


@pytest.mark.parametrize("change, words", [
    (lambda rows: slowed(rows, 1.05), "the run took 1175.5 s by its own clock, 12"),
    (lambda rows: slowed(rows, 0.95), "the run took 1175.5 s by its own clock, 11"),
    (lambda rows: in_training(rows, 20.0), "the run took 1175.5 s by its own clock, 11"),
    (lambda rows: only_in_training(rows, 20.0), "up to step 150, training took 219.0 to 225.0 s by"),
    (lambda rows: only_in_training(rows, -20.0), "up to step 150, training took 219.0 to 225.0 s by"),
    (lambda rows: moved_to_the_phase_before(rows, 20.0), "phase prepare adaptation took "),
    (lambda rows: [row | {"seconds": 1.0} if row.get("name") == "adapt" else row for row in rows],
     "1.000 by its row in metrics.jsonl"),
    (lambda rows: [{key: row[key] for key in row if key != "time"} for row in rows], "without `time`"),
    (lambda rows: [rows[0], rows[1] | {"time": "noon"}, *rows[2:]], "values of another kind"),
])
def test_clocks_that_are_not_the_walls_are_refused(change, words, tmp_path, refused):
    folder = write_run(tmp_path / "run", result_of_seed(0))
    write_rows(folder, change(metrics_rows(result_of_seed(0))))
    assert words in refused(submission.main, "check", folder)


def moved_to_the_phase_before(rows: list[dict], seconds: float) -> list[dict]:
    """Adaptation that took longer, and its preparation that took less, than they say."""
    return [row | {"time": row["time"] - seconds} if row.get("name") == "prepare adaptation" else row
            for row in rows]


@pytest.mark.parametrize("change", [
    lambda rows: slowed(rows, 1.009),
    lambda rows: slowed(rows, 0.991),
    lambda rows: in_training(rows, 6.0),
    lambda rows: moved_to_the_phase_before(rows, 1.5),
    lambda rows: only_in_training(rows, 6.0),
    lambda rows: [row | {"time": row["time"] + 1e6} for row in rows],
])
def test_clocks_may_differ_by_two_seconds_and_one_percent(change, tmp_path):
    folder = write_run(tmp_path / "run", result_of_seed(0))
    write_rows(folder, change(metrics_rows(result_of_seed(0))))
    assert finished_runs.load([folder])


@pytest.mark.parametrize("in_setup, fits", [(0, True), (69, True), (100, False)])
def test_a_long_start_is_part_of_the_run(in_setup, fits, tmp_path, refused):
    """The first row is written some seconds into the setup, which may take long on a slow disk."""
    phases = {**PHASES, "imports": 90.0, "join": 60.0, "setup": 70.0}
    r = result_of_seed(0, phases=phases, seconds=1378.5)
    folder = write_run(tmp_path / "run", r)
    first, *others = metrics_rows(r)
    write_rows(folder, [first | {"time": first["time"] - 1 + in_setup}, *others])
    if fits:
        assert finished_runs.load([folder])
    else:
        assert "the run took 1378.5 s by its own clock" in refused(submission.main, "check", folder)


def test_a_run_of_few_slow_steps_adds_up(tmp_path):
    """A step has the seconds at its start and the time of its report, which may lie a whole step later."""
    folder = write_run(tmp_path / "run", result_of_seed(0, steps=7, settings=dict(seed=0, train_log_every=3)))
    assert finished_runs.load([folder])
    steps = finished_runs.step_reports(finished_runs.load([folder])[0])
    assert [report.step for report in steps] == [1, 2, 3, 6, 7]
    assert all(report.least < report.most for report in steps)


def test_reading_validation_early_stops_the_clock_of_training(tmp_path, refused):
    """Then steps that are slow by the wall are no contradiction; the seconds are those of another phase."""
    phases = {name: seconds for name, seconds in PHASES.items() if name != "calibrate"}
    r = result_of_seed(0, settings={"seed": 0, "val_loss_every": 200}, seconds=SECONDS + 40,
                       phases=phases | {"validate": 40.0, "calibrate": 3.1},
                       caveats=["VAL_LOSS_EVERY=200: validation was read during training"])
    folder = write_run(tmp_path / "run", r)
    write_rows(folder, [row | {"time": row["time"] + 40 * (row.get("step", 0) > 200)}
                        for row in metrics_rows(r)])
    assert finished_runs.load([folder])
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8")
    (line,) = re.findall(r"\nphase validate +40.0 s", text)
    log.write_text(text.replace(line, line.replace("40", "19") + line.replace("40", "21")), encoding="utf-8")
    assert finished_runs.load([folder]), "it was done twice"
    write_rows(folder, in_training(metrics_rows(r), 40.0))
    assert "the run took 1215.5 s by its own clock" in refused(submission.main, "check", folder)


def test_older_runs_have_no_times_to_compare(tmp_path):
    """Nor have they phases for all of their seconds."""
    r = older(result_of_seed(0, seconds=9999.0))
    assert finished_runs.load([write_run(tmp_path / "run", r)])
    phases = {name: seconds for name, seconds in PHASES.items() if name != "report"}
    r["phases"] = phases
    folder = write_run(tmp_path / "phases", r)
    assert finished_runs.load([folder])


def test_runs_may_differ_in_where_they_read_and_write(tmp_path):
    r = result_of_seed(1)
    own = dict(artifact_dir="x", data_dir="/elsewhere", save_scores="s.npz", train_log_every=7)
    r["settings"] = r["settings"] | own
    folders = [write_run(tmp_path / "a", result_of_seed(0)), write_run(tmp_path / "b", r)]
    assert len(finished_runs.load(folders)) == 2


def test_results_of_older_scripts_are_read(tmp_path):
    """They have their values in another order and lack the newer ones."""
    r = older(result_of_seed(0, model_bytes=9, total_bytes=9 + len(PACKED)))
    in_another_order = dict(reversed(r.items()))
    folder = write_run(tmp_path / "run", in_another_order)
    (folder / "final_model.int6.ptz").write_bytes(b"f" * 9)
    (folder / "result.json").write_text(json.dumps(r))
    (loaded,) = finished_runs.load([folder])
    assert loaded.result == r and list(loaded.result) == list(in_another_order)
    assert finished_runs.load([write_audit(folder)]), "its artifact shows that the audit is of it"
    (folder / "final_model.int6.ptz").unlink()
    for model in (SHA256["model"], sha256(b""), None):
        write_audit(folder, model=model)
        with pytest.raises(finished_runs.Refused, match="not an audit of this run's final_model"):
            finished_runs.load([folder])


def test_the_runs_in_logs_add_up():
    logs = ROOT / "logs"
    assert len(finished_runs.load(sorted(logs.glob("*_cpu_smoke-seed*")))) == 3
    assert finished_runs.load([logs / "2026-11-21_4xH200_full"])
    assert finished_runs.load([logs / "2026-11-22_2xH200_full"])


def test_a_run_of_the_script_as_it_is_adds_up(run, tmp_path):
    outcome = run()
    assert outcome.status == 0, outcome.err
    (loaded,) = finished_runs.load([tmp_path / "run"])
    assert loaded.result == outcome.result
    made = made_of(tmp_path / "run")
    assert {made["compliance"][rule] for rule in UNSEEN} == {True}, "its script is held to them by the tests"


def test_submission_json_is_what_the_kit_makes_of_its_logs():
    theirs = json.loads((ROOT / "submission.json").read_text())
    logs = [row["log"] for row in theirs["seed_results"].values()]
    loaded = finished_runs.load([(ROOT / log).parent for log in logs])
    made = submission.make_submission(loaded, logs, theirs, theirs.get("significance", {}))
    for seed, row in theirs.pop("seed_results").items():
        assert {name: made["seed_results"][seed][name] for name in row} == row
    rules = theirs.pop("compliance")
    assert {name: made["compliance"][name] for name in rules} == rules
    assert {name: made[name] for name in theirs} == theirs


# Runs that do not

FAULTS = {  # changes of one run's result, and words of the refusal
    "too large": (
        dict(model_bytes=16_000_000, total_bytes=16_000_000 + len(PACKED)), "16000013 bytes of 16000000"),
    "wrong sum": (dict(total_bytes=15_000_000), "total_bytes are not code_bytes + model_bytes"),
    "trained too long": (
        dict(clocks={**CLOCKS, "training": {"seconds": 600.1, "budget": 700.0}}),
        "training took 600.1 s of 600"),
    "over its own budget": (
        dict(clocks={**CLOCKS, "training": {"seconds": 91.0, "budget": 90.0}}), "took 91.0 s of 90"),
    "scored too long": (
        dict(clocks={**CLOCKS, "scoring": {"seconds": 601, "budget": 0.0}}), "scoring took 601 s of 600"),
    "no clock": (dict(clocks={"training": {"seconds": 1.0, "budget": 0.0}}), "lacks a clock"),
    "not all adapted": (dict(unadapted_tokens=12), "12 targets were not adapted"),
    "not all documents": (dict(settings={**SETTINGS, "val_doc_fraction": 0.5}), "VAL_DOC_FRACTION"),
    "another cap": (dict(cap_bytes=17_000_000), "its cap is 17000000 bytes"),
    "less than none left out": (dict(targets_left_out=-1), "targets_left_out are -1"),
    "no hash of training data": (dict(train_data_sha256=None), "RESULT lacks train_data_sha256"),
    "no hash, but a word": (dict(train_data_sha256="unknown"), "train_data_sha256 of its RESULT is no SHA"),
    "half a hash": (dict(tokenizer_sha256="a" * 32), "tokenizer_sha256 of its RESULT is no SHA-256"),
    "no bytes at the cut": (dict(bytes_at_cut=None), "bytes_at_cut are None, of 40540803 tokens"),
    "bytes at no cut": (PROXY | dict(bytes_at_cut=151_078_222), "bytes_at_cut are 151078222, of 1738469"),
    "more bytes at the cut": (dict(bytes_at_cut=BYTES + 1), "bytes_at_cut are 151080646 of 40540160 tokens"),
    "fewer bytes at the end": (dict(tokens=40_540_160), "bytes_at_cut are 151078222 of 40540160 tokens"),
    "no caveat of the machine": (dict(hardware="4 x NVIDIA H100"), "lacks the caveat `not on 8 GPUs`"),
    "no caveat of CPUs": (dict(hardware="8 x CPU x86_64"), "lacks the caveat `not on 8 GPUs`"),
    "no caveat of other data": (PROXY, "lacks the caveat `unknown validation set`"),
    "no caveat of altered data": (dict(bytes_at_cut=151_078_223), "the caveat `unknown validation set`"),
    "no caveat of a preset": (dict(settings={**SETTINGS, "preset": "smoke"}), "the caveat `preset smoke`"),
    "no caveat of an early look": (
        dict(settings={**SETTINGS, "val_loss_every": 100}), f"lacks the caveat `{EARLY}`"),
    "no caveat of compiling": (dict(recompilations=3), "the caveat `recompilations on the clocks: 3`"),
    "seconds of no phase": (dict(seconds=SECONDS + 14), "14.5 of its 1189.5 s belong to no phase"),
    "more in phases": (dict(seconds=SECONDS - 15), "its phases have 14.5 s more than its 1160.5 s"),
    "a phase of less than no time": (
        dict(phases={**PHASES, "export": -9.0}, seconds=SECONDS - 18), "no line `phase export -9.0 s`"),
    "a clock without its phases": (
        dict(clocks={**CLOCKS, "scoring": {"seconds": 312.0, "budget": 600.0}}),
        "the clock `scoring` has 312.0 s, its phases 412.000"),
    "not trained": (dict(mode="checkpoint"), "mode checkpoint"),
    "score of other tokens": (dict(val_loss=2.7), "contradict each other"),
    "not a number": (dict(val_bpb=math.nan), "NaN is no number"),
    "endless": (dict(seconds=math.inf), "Infinity is no number"),
    "clock that is not a number": (
        dict(clocks={**CLOCKS, "training": {"seconds": math.nan, "budget": 600.0}}), "NaN is no number"),
    "another source": (dict(code_sha256="c" * 64), "the source in it does not have the code_sha256"),
    "another packed script": (dict(packed_sha256="c" * 64), "train_gpt_packed.py"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_does_not_add_up_is_refused(fault, tmp_path, refused):
    changes, words = FAULTS[fault]
    folder = write_run(tmp_path / "run", result_of_seed(0, **changes))
    said = refused(submission.main, "check", folder, "--write", tmp_path / "s.json")
    assert words in said and str(folder / "log.txt") in said
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("command", [["check"], ["table"], ["record", "X"]])
def test_every_command_refuses_what_does_not_add_up(command, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run", result_of_seed(0, total_bytes=15_000_000))
    assert "total_bytes are not code_bytes" in refused(submission.main, *command, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


DIFFERENCES = {  # a second run that is flawless by itself, and words of the refusal
    "machine": (
        dict(hardware="8 x NVIDIA H200"), "hardware is 8 x NVIDIA H200, but 8 x NVIDIA H100 80GB HBM3 in"),
    "validation": (dict(val_sha256="c" * 64), "val_sha256"),
    "training data": (dict(train_sha256="c" * 64), "train_sha256"),
    "tokenizer": (dict(tokenizer_sha256="c" * 64), "tokenizer_sha256"),
    "documents": (dict(documents=49_999), "documents is 49999, but 50000"),
    "versions": (dict(versions={"python": "3.12.3", "torch": "2.13.0"}), "versions"),
    "a setting": (
        dict(settings={**SETTINGS, "seed": 1, "matrix_lr": 0.04}), "setting matrix_lr is 0.04, but 0.03"),
    "a default": (dict(settings={"seed": 1}), "setting matrix_lr is the default, but 0.03"),
    "a further setting": (
        dict(settings={**SETTINGS, "seed": 1, "beta2": 0.9}), "setting beta2 is 0.9, but the default"),
    "bytes at the cut": (
        dict(bytes_at_cut=BYTES, caveats=[UNKNOWN]), "bytes_at_cut is 151080645, but 151078222"),
    "no seed of its own": (dict(seed=0, settings=SETTINGS), "seed 0 is that of"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_runs_that_do_not_belong_together_are_refused(difference, tmp_path, refused):
    changes, words = DIFFERENCES[difference]
    first = write_run(tmp_path / "run0", result_of_seed(0))
    second = write_run(tmp_path / "run1", result_of_seed(1, **changes))
    assert finished_runs.load([first]) and finished_runs.load([second]), "each is fine alone"
    said = refused(submission.main, "check", first, second)
    assert words in said and str(second / "log.txt") in said


@pytest.mark.parametrize("content", [b"", b"g" * 9, b"f" * 8])
def test_an_artifact_beside_the_log_is_the_runs(content, tmp_path, refused):
    r = result_of_seed(0) | dict(model_bytes=9, total_bytes=9 + len(PACKED))
    folder = write_run(tmp_path / "run", r)
    artifact = folder / "final_model.int6.ptz"
    artifact.write_bytes(b"f" * 9)
    assert finished_runs.load([folder])
    artifact.write_bytes(content)
    assert "final_model.int6.ptz beside it" in refused(submission.main, "check", folder)


@pytest.mark.parametrize("change", [
    dict(tokens=0), dict(tokens="x"), dict(steps="many"), dict(seed=None), dict(seed=[1]), dict(clocks=[]),
    dict(clocks={"training": {}, "scoring": {}}), dict(caveats=None), dict(caveats="none"), dict(hardware=8),
    dict(settings=None), dict(total_bytes="16"), dict(val_bpb_quantized="2.6"), dict(versions=3)])
def test_values_of_another_kind_are_refused(change, tmp_path, refused):
    r = result_of_seed(0)
    log = write_run(tmp_path / "run", r) / "log.txt"
    log.write_text(log.read_text().replace(json.dumps(r), json.dumps(r | change)))
    assert str(log) in refused(submission.main, "check", log)


def test_mixed_scripts_are_refused(tmp_path, refused):
    other = SOURCE + "# changed\n"
    r = result_of_seed(1) | dict(code_sha256=sha256(other.encode()))
    first = write_run(tmp_path / "a", result_of_seed(0))
    second = write_run(tmp_path / "b", r, other)
    assert finished_runs.load([second])
    assert "code_sha256" in refused(submission.main, "check", first, second)


def test_case_operations_are_those_of_the_log(tmp_path, refused):
    folder = write_run(tmp_path / "run", result_of_seed(0, case_ops="v2"))
    assert finished_runs.load([folder])
    log = folder / "log.txt"
    log.write_text(log.read_text().replace("case operations: v2", "case operations: v1"))
    assert "no line `case operations: v2" in refused(submission.main, "check", folder)


@pytest.mark.parametrize("file, old, new, words", [
    ("log.txt", '"one"', '"two"', "code_sha256"),
    ("log.txt", "final val_loss:2", "final val_loss:1", "no line `final val_loss:2"),
    ("log.txt", "documents:50000", "documents:40000", "no line `validation: documents:50000"),
    ("log.txt", "total:15999013", "total:16999013", "no line `bytes: code:13 model:15999000"),
    ("log.txt", "clock training               ", "clock training              9", "no line `clock training"),
    ("log.txt", "caveats: none", "caveats: preset smoke", "no line `caveats: none"),
    ("log.txt", "train: steps:400", "train: steps:40", "no line `train: steps:400"),
    ("log.txt", "\nquantized val_loss:", "\nquantized val_loss:1", "no line `quantized val_loss:"),
    ("log.txt", "unquantized val_loss:", "unquantized val_loss:1", "no line `unquantized val_loss:"),
    ("log.txt", "world_size:8", "world_size:1", "no line `device:NVIDIA H100 80GB HBM3 world_size:8"),
    ("log.txt", "torch:2.11", "torch:2.12", "no line `versions: python"),
    ("log.txt", "matrix_lr:0.03", "matrix_lr:0.04", "no line `settings other than the record's"),
    ("log.txt", "all settings: preset: seed:0", "all settings: preset: seed:1", "seed 0 of its RESULT is"),
    ("log.txt", '"steps": 400', '"steps": 401', "steps not as in the RESULT line"),
    ("log.txt", '"seconds": 1175.5', '"seconds": 1e999', "1e999 is no number"),
    ("log.txt", "RESULT {", "RESULT x{", "damaged, no JSON object"),
    ("log.txt", "RESULT ", "", "not the log of a finished run"),
    ("log.txt", "=" * 100 + "\ntokenizer", "tokenizer", "not the log of a finished run"),
    ("result.json", '"val_bpb": 1.0581', '"val_bpb": 1.0481', "val_bpb not as in the RESULT line"),
    ("log.txt", " targets_left_out:7\n", "\n", "no line that ends with `targets_left_out:7`"),
    ("log.txt", "targets_left_out:7\n", "targets_left_out:70\n", "ends with `targets_left_out:7`"),
    ("log.txt", "on the clocks:0", "on the clocks:1", "no line `recompilations on the clocks:0"),
    ("log.txt", "run_id:s0 artifact", "run_id:s1 artifact", "no line `run_id:s0"),
    ("log.txt", "                   406.0", "                   460.0", "no line `phase adapt 406.0 s`"),
    ("log.txt", "596.0 s  training", "596.0 s", "phase `train` is not on the clock `training`"),
    ("log.txt", "9.0 s\n", "9.0 s  training\n", "the clock `training` has 599.1 s, its phases 617.1"),
    ("log.txt", "\ncaveats: none", "\ncaveats: none\ncaveats: late", "2 lines that begin with `caveats:`"),
    ("log.txt", "\nclock sc", "\nclock training                650.0 s\nclock sc", "no line `clock training"),
    ("log.txt", "\nfinal val", "\nfinal val_loss:9 val_bpb:9\nfinal val", "2 lines that begin with"),
    ("log.txt", "\nRESULT {", "\nRESULT {}\nRESULT {", "2 lines that begin with `RESULT`"),
    ("log.txt", " val_doc_fraction:1.0 ", " val_doc_fraction:0.5 ", "VAL_DOC_FRACTION: not all documents"),
    ("log.txt", "tokenizer: sha256:a", "tokenizer: sha256:b", "no line `tokenizer: sha256:aaaa"),
    ("log.txt", " eval_max_seconds:600.0 ", " eval_max_seconds:0.0 ", "is not its EVAL_MAX_SECONDS"),
    ("log.txt", " val_loss_every:0 ", " val_loss_every:100 ", f"lacks the caveat `{EARLY}`"),
    ("log.txt", " preset: ", " preset:smoke ", "lacks the caveat `preset smoke`"),
    ("log.txt", " beta2:0.99\n", " beta2:0.98\n", "beta2 0.99 in metrics.jsonl is not the one in its line"),
    ("metrics.jsonl", '"world_size": 8', '"world_size": 4', "is not of 8 processes"),
    ("metrics.jsonl", '"step": 17,', '"step": 18,', "has not the 400 steps of its RESULT"),
    ("metrics.jsonl", '"kind": "settings"', '"kind": "setting"', "has to begin with the settings"),
    ("metrics.jsonl", '"kind": "of another script"', '"kind": "result"', "end with the only result"),
    ("metrics.jsonl", '{"kind": "of another script"', "[3]\n{", "line 417: no JSON object, but [3]"),
    ("metrics.jsonl", '{"kind": "of another script"', "[" * 99_999 + "\n{", "line 417: damaged, no JSON"),
    ("result.json", "}", "", "damaged, no JSON object"),
    ("metrics.jsonl", '"val_bpb": 1.0581', '"val_bpb": 1.0481', "val_bpb not as in the RESULT line"),
    ("train_gpt_packed.py", "one", "two", "packed_sha256"),
    ("train_gpt_packed.py", "print('one')\n", "", "packed_sha256"),
])
def test_files_that_were_changed_are_refused(file, old, new, words, tmp_path, refused):
    folder = write_run(tmp_path / "run", result_of_seed(0))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    said = refused(submission.main, "check", folder)
    assert words in said and str(folder) in said


@pytest.mark.parametrize("cut", [1, 2, 40, 400])
def test_a_torn_last_row_is_refused(cut, tmp_path, refused):
    folder = write_run(tmp_path / "run", result_of_seed(0))
    file = folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    if cut == 1:
        assert finished_runs.load([folder]), "only the end of the line is missing"
    else:
        assert f"{file}, line 418: damaged, no JSON object" in refused(submission.main, "check", folder)


def test_bytes_that_are_no_text_are_refused_or_kept(tmp_path, refused):
    folder = write_run(tmp_path / "run", result_of_seed(0))
    log = folder / "log.txt"
    log.write_bytes(log.read_bytes().replace(b"step:1/2", b"\xff\xfe"))
    assert finished_runs.load([folder])
    log.write_bytes(log.read_bytes().replace(b'"one"', b'"\xff"'))
    assert "code_sha256" in refused(submission.main, "check", folder)
    (folder / "result.json").write_bytes(b"\xff")
    assert "result.json: damaged" in refused(submission.main, "check", folder)


def test_a_source_in_utf_8_is_read(tmp_path):
    source = SOURCE + "# \u2581 \u00e9\n"
    r = result_of_seed(0, code_sha256=sha256(source.encode()))
    (loaded,) = finished_runs.load([write_run(tmp_path / "run", r, source)])
    assert loaded.source == source


def test_names_that_are_no_text_end_in_one_line(tmp_path, refused):
    """A name that is not UTF-8 can be read and shown, but not be written into a file that is."""
    folder = write_run(tmp_path / os.fsdecode(b"run\xff\n\x1b[31m"), result_of_seed(0))
    command = [sys.executable, ROOT / "tools/submission.py", "table", folder]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert r"run\udcff" in shown.stdout
    file = tmp_path / "submission.json"
    assert "a name that is not UTF-8" in refused(submission.main, "check", folder, "--write", file)
    author = os.fsdecode(b"\xff")
    out = tmp_path / "records"
    assert "a name that is not UTF-8" in refused(
        submission.main, "record", "X", folder, "--out", out, "--author", author)
    assert not file.exists() and not out.exists() and len(list(tmp_path.iterdir())) == 1
    (folder / "result.json").unlink()
    said = refused(submission.main, "check", folder)
    assert "cannot read" in said and r"run\udcff\n\x1b[31m" in said


def test_nothing_is_left_where_a_file_cannot_be_written(runs, tmp_path, refused, monkeypatch):
    file = tmp_path / "submission.json"
    file.write_text("{}")

    def fail(*_):
        raise OSError(28, "No space left", str(file))
    monkeypatch.setattr("os.replace", fail)
    assert "No space left" in refused(submission.main, "check", *runs, "--write", file)
    assert file.read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1", "seed2", "submission.json"]


def test_files_that_are_missing_are_refused(tmp_path, refused):
    assert "cannot read" in refused(submission.main, "check", tmp_path / "nowhere")
    folder = write_run(tmp_path / "run", result_of_seed(0))
    (folder / "metrics.jsonl").unlink()
    assert finished_runs.load([folder]), "a run's log and result suffice"
    (folder / "result.json").unlink()
    assert "cannot read" in refused(submission.main, "check", folder)


def test_files_of_another_run_are_refused(tmp_path, refused):
    folder = write_run(tmp_path / "run", result_of_seed(0))
    (folder / "final_model.int6.ptz").write_bytes(b"four")
    assert "final_model.int6.ptz beside it has 4 bytes" in refused(submission.main, "check", folder)
    (folder / "final_model.int6.ptz").unlink()
    (folder / "metrics.jsonl").write_text("")
    assert "metrics.jsonl, line 1: damaged" in refused(submission.main, "check", folder)


def test_a_result_that_lacks_what_is_needed_is_refused(tmp_path, refused):
    log = write_run(tmp_path / "older", result_of_seed(0)) / "log.txt"
    log.write_text(log.read_text().replace('"steps": 400, ', ""))
    assert "RESULT lacks steps" in refused(submission.main, "check", log)


# The command line

def test_names_that_are_kept_are_said(runs, tmp_path, capsys):
    check = ["check", *runs, "--write", str(tmp_path / "submission.json")]
    assert submission.main([*check, "--author", "A", "--github-id", "a", "--title", "T"]) == 0
    assert "kept from" not in capsys.readouterr().out
    assert submission.main([*check, "--title", "U"]) == 0
    assert "kept from an older submission.json: author 'A', github_id 'a'" in capsys.readouterr().out
    assert submission.main(["record", "X", *runs, "--out", str(tmp_path / "records")]) == 0
    assert "kept from an older submission.json: author " in capsys.readouterr().out


def test_mistakes_on_the_command_line_leave_nothing(runs, tmp_path, refused):
    assert "it is not a file" in refused(submission.main, "check", *runs, "--write", tmp_path)
    nowhere = tmp_path / "no/s.json"
    assert str(nowhere) in refused(submission.main, "check", *runs, "--write", nowhere)
    for option in ("--baseline=nan,1", "--date=tomorrow"):
        with pytest.raises(SystemExit) as ended:
            submission.main(["check", *runs, option])
        assert ended.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1", "seed2"]


@pytest.mark.parametrize("arguments", [[], ["x"], ["check"], ["table"], ["record"], ["record", "X"]])
def test_an_incomplete_command_ends_with_usage_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        submission.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


BASELINE = {"--help", "--baseline", "--baseline-loss"}
DESCRIPTION = {"--author", "--github-id", "--title", "--corpus", "--date"}
OPTIONS = {
    "check": BASELINE | DESCRIPTION | {"--write"},
    "table": BASELINE,
    "record": BASELINE | DESCRIPTION | {"--out"},
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_the_options(command, capsys):
    with pytest.raises(SystemExit) as ended:
        submission.main([command, "--help"])
    assert ended.value.code == 0
    listed = re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, flags=re.M)
    assert set(listed) == OPTIONS[command]


# The t-tests

def welch_by_integration(new, old, margin: float) -> float:
    """The p-value from the density, summed numerically over t = sqrt(df) tan(angle)."""
    a = np.var(new, ddof=1) / len(new)
    b = np.var(old, ddof=1) / len(old)
    t = (np.mean(old) - np.mean(new) - margin) / np.sqrt(a + b)
    df = (a + b) ** 2 / (a**2 / (len(new) - 1) + b**2 / (len(old) - 1))
    angle = (np.arange(1_000_000) + 0.5) / 1_000_000 * np.pi - np.pi / 2
    density = np.cos(angle) ** (df - 1)
    beyond = angle > np.arctan(t / np.sqrt(df))
    return float(density[beyond].sum() / density.sum())


@pytest.mark.parametrize("new, old, margin", [
    ([1.0581, 1.0575, 1.0584], [1.0728, 1.0726, 1.0747], 0.0),
    ([1.0581, 1.0575, 1.0584], [1.0611, 1.0604, 1.0598], 0.002),
    ([1.06, 1.07], [1.064, 1.066, 1.071, 1.069], 0.0),
    ([1.1, 1.101, 1.1025], [1.0, 1.0, 1.0], 0.0),
])
def test_welch_is_the_integral_of_the_density(new, old, margin):
    p = error_bars.welch(new, old, margin)[2]
    assert p == pytest.approx(welch_by_integration(new, old, margin), abs=2e-6)


def test_welch_by_hand():
    """Equal numbers and variances give 4 degrees of freedom, t = 2.5 sqrt(3 / 2), a tail in closed form."""
    low, high = [0.0, 1.0, 2.0], [2.5, 3.5, 4.5]
    t, df, p = error_bars.welch(low, high)
    assert t == pytest.approx(2.5 * math.sqrt(1.5))
    assert df == pytest.approx(4)
    assert p == pytest.approx(0.0188, abs=5e-5)
    assert error_bars.welch(low, high, 2.5)[2] == pytest.approx(0.5)
    assert error_bars.welch(high, low)[2] == pytest.approx(1 - p)


def test_t_tests_that_cannot_be_done_are_refused(runs, refused):
    said = refused(submission.main, "check", *runs, "--baseline", "1.07")
    assert "two seeds or more on each side: 3 v 1" in said
    said = refused(submission.main, "check", runs[0], "--baseline", "1.07,1.08,1.06")
    assert "two seeds or more on each side: 1 v 3" in said


def test_a_t_test_of_scores_that_do_not_vary_is_refused(tmp_path, refused):
    folders = [write_run(tmp_path / f"seed{seed}", result_of_seed(seed)) for seed in (7, 8)]
    said = refused(submission.main, "check", *folders, "--baseline", "1.07,1.07")
    assert "a t-test needs scores that vary" in said


def test_a_baseline_in_nats_is_one_in_bits(runs):
    loaded = finished_runs.load([ROOT / run for run in runs])
    baseline = [1.07, 1.071, 1.0705]
    bits = submission.significance(loaded, baseline, None)
    nats = submission.significance(loaded, None, [value * NATS_A_BIT for value in baseline])
    assert all(bits[name] == pytest.approx(nats[name]) for name in bits)
    margin = error_bars.welch([run.result["val_bpb"] for run in loaded], baseline, 0.005 / NATS_A_BIT)
    assert bits["p_improves_by_0.005_nats"] == pytest.approx(margin[2])
    assert submission.significance(loaded, None, None) == {}


# The folder of a record

def test_record_is_a_folder_to_submit(runs, tmp_path, capsys):
    records = tmp_path / "records"
    name = "2026-01-02_It"
    options = "--out", str(records), "--github-id", "me", "--baseline", "1.07,1.08"
    assert submission.main(["record", name, *runs, *options]) == 0
    # 1) The files are there, and nothing else.
    assert [path.name for path in records.iterdir()] == [name], "nothing aside is left"
    folder = records / name
    assert {path.name for path in folder.iterdir()} == {
        "train_gpt.py", "train_gpt_readable.py", "README.md", "requirements.txt", "submission.json",
        "train_seed0.log", "train_seed1.log", "train_seed2.log",
        "audit_seed0.json", "audit_seed1.json", "audit_seed2.json"}
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in folder.iterdir())
    # 2) Scripts and logs are those of the runs.
    assert (folder / "train_gpt.py").read_bytes() == PACKED
    assert (folder / "train_gpt_readable.py").read_text() == SOURCE
    assert (folder / "train_seed2.log").read_bytes() == (tmp_path / "seed2/log.txt").read_bytes()
    assert (folder / "audit_seed2.json").read_bytes() == (tmp_path / "seed2/audit.json").read_bytes()
    assert len(finished_runs.load(sorted(folder.glob("*.log")))) == 3, "its logs add up where they are now"
    # 3) The rest follows from them.
    made = json.loads((folder / "submission.json").read_text())
    assert made["github_id"] == "me" and made["name"] == name and made["track"] == "10min_16mb"
    assert {row["log"] for row in made["seed_results"].values()} == {
        "train_seed0.log", "train_seed1.log", "train_seed2.log"}
    readme = (folder / "README.md").read_text()
    assert submission.table(made) in readme
    assert "Not a record run" not in readme and "p = " in readme and "{" not in readme
    assert "\n    SEED=0 MATRIX_LR=0.03 torchrun --standalone --nproc_per_node=8 train_gpt.py\n" in readme
    pins = (folder / "requirements.txt").read_text().splitlines()
    assert {"torch==2.11.0", "flash-attn-3==3.0.0", "numpy==2.3.5"} <= set(pins)
    assert pins[1].endswith("/whl/cu130")


def test_record_says_what_speaks_against_it(tmp_path):
    caveats = ["preset smoke", UNKNOWN, FEW]
    settings = {**SETTINGS, "preset": "smoke"}
    r = result_of_seed(0, caveats=caveats, hardware="1 x CPU x86_64", settings=settings, **PROXY)
    run = write_run(tmp_path / "run", r)
    assert submission.main(["record", "X", str(run), "--out", str(tmp_path), "--title", "A title"]) == 0
    readme = (tmp_path / "X/README.md").read_text()
    assert readme.startswith("# A title\n")
    assert "**Not a record run**" in readme and "**no**: eight_gpus" in readme and "preset smoke" in readme
    assert "nproc_per_node=1" in readme and "(one seed)" in readme
    assert "- **not established**: score_before_update" in readme and "audit_seed" not in readme


@pytest.mark.parametrize("packed_ran", [False, True])
def test_record_takes_the_packed_script_from_train_gpt(packed_ran, tmp_path):
    """Runs whose packed script is not at hand: what train_gpt.py packs to is taken if it has the hash."""
    packed, source = tg.pack_script(), (ROOT / "train_gpt.py").read_text()
    logged = "import minified\n" if packed_ran else source  # a packed script logs itself as its source
    r = result_of_seed(0) | dict(
        code_sha256=sha256(logged.encode()), packed_sha256=sha256(packed),
        code_bytes=len(packed), model_bytes=100, total_bytes=len(packed) + 100)
    log = write_run(tmp_path / "run", r, logged) / "log.txt"
    assert submission.main(["record", "X", str(log), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "X/train_gpt.py").read_bytes() == packed
    assert (tmp_path / "X/train_gpt_readable.py").read_text() == source


def test_record_refuses_runs_whose_scripts_it_cannot_have(runs, tmp_path, refused):
    out = "--out", tmp_path / "records"
    said = refused(submission.main, "record", "X", tmp_path / "seed0/log.txt", *out)
    assert "does not pack to the bytes" in said, "no packed script with that hash"
    wrong = write_run(tmp_path / "w", result_of_seed(0) | dict(code_bytes=14, total_bytes=15_999_014))
    said = refused(submission.main, "record", "X", wrong, *out)
    assert "code_bytes are 14, but the packed script has 13" in said
    minified = write_run(tmp_path / "m", result_of_seed(0) | dict(code_sha256=sha256(b"x\n")), "x\n")
    assert "not what that was packed from" in refused(submission.main, "record", "X", minified, *out)
    assert "seed 0 is that of" in refused(submission.main, "record", "X", runs[1], runs[1], *out)
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("name", ["../X", ".X", "", "X/Y"])
def test_record_refuses_what_is_no_name(name, runs, tmp_path, refused):
    out = tmp_path / "records"
    assert "is no name for a folder" in refused(submission.main, "record", name, *runs, "--out", out)
    assert not out.exists()


def test_record_writes_over_nothing_and_leaves_no_half(runs, tmp_path, refused, monkeypatch):
    out = tmp_path / "records"
    (out / "X").mkdir(parents=True)
    assert "X is there already" in refused(submission.main, "record", "X", *runs, "--out", out)
    assert not list((out / "X").iterdir())

    def fail(*_):
        raise OSError(28, "No space left")
    monkeypatch.setattr("pathlib.Path.rename", fail)
    assert "No space left" in refused(submission.main, "record", "Y", *runs, "--out", out)
    assert [path.name for path in out.iterdir()] == ["X"], "not even half a folder is left"


def test_requirements_name_what_attention_ran_on():
    versions = {"python": "3.12.3", "cuda": "13.0", "torch": "2.11.0"}
    assert "flash-attn-3" in submission.requirements(versions, "attention:flash3_attention")
    assert "flash" not in submission.requirements(versions, "attention:varlen_attention")
    versions["flash_attn_3"] = "3.0"
    assert "flash-attn-3==3.0" in submission.requirements(versions, "attention:flash3_attention")


# The packed script

def test_pack_writes_the_packed_script(tmp_path, capsys):
    file = tmp_path / "packed.py"
    assert pack.main(["-o", str(file)]) == 0
    assert file.read_bytes() == tg.pack_script()
    printed = capsys.readouterr().out
    assert sha256(file.read_bytes()) in printed and f"{file.stat().st_size:,} bytes" in printed
    assert sha256((ROOT / "train_gpt.py").read_bytes()) in printed


def test_pack_tells_the_packed_script_from_another(tmp_path, capsys):
    file = tmp_path / "packed.py"
    file.write_bytes(tg.pack_script())
    assert pack.main(["--check", str(file)]) == 0
    assert f"{file} is what train_gpt.py packs to" in capsys.readouterr().out
    file.write_bytes(file.read_bytes() + b"#\n")
    assert pack.main(["--check", str(file)]) == 1
    assert "is not what train_gpt.py packs to" in capsys.readouterr().out


def test_pack_says_what_it_cannot_read_or_write(tmp_path, refused):
    assert "cannot read" in refused(pack.main, "--check", tmp_path / "none")
    assert "cannot write" in refused(pack.main, "-o", tmp_path / "none" / "x.py")
