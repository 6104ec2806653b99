"""The submission kit, tools/pack.py, submission.py and make_record.py, on fabricated runs and on those in logs/."""
import hashlib
import json
import math
import statistics
import sys

import numpy as np
import pytest
from conftest import ROOT, tg

sys.path.insert(0, str(ROOT / "tools"))
import make_record  # noqa: E402
import pack  # noqa: E402
import submission as kit  # noqa: E402

SOURCE = '"""A script."""\n\n\nprint("one", "=" * 100)\n'
PACKED = b"print('one')\n"
TOKENS, BYTES = 47_800_000, 151_080_000  # FineWeb's, about
BPB = {0: 1.0581, 1: 1.0575, 2: 1.0584}
SETTINGS = {"seed": 0, "run_id": "s0", "data_dir": "d", "matrix_lr": 0.03}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def result_of_seed(seed: int) -> dict:
    """What a flawless record run would leave."""
    r = {f"val_bpb{stage}": BPB.get(seed, 1.06) + more
         for stage, more in (("", 0), ("_quantized", 0.011), ("_unquantized", 0.002))}
    r |= {name.replace("bpb", "loss"): value * math.log(2) * BYTES / TOKENS for name, value in r.items()}
    versions = {"python": "3.12.3", "cuda": "13.0", "torch": "2.11.0+cu130", "flash_attn_3": "3.0.0", "numpy": "2.3.5"}
    model_bytes = 15_999_000 + seed
    return r | dict(
        seed=seed, run_id=f"s{seed}", settings={**SETTINGS, "seed": seed, "run_id": f"s{seed}"}, mode="train",
        versions=versions, hardware="8 x NVIDIA H100 80GB HBM3", steps=5000 + seed, seconds=1300.5, caveats=[],
        code_sha256=sha256(SOURCE.encode()), packed_sha256=sha256(PACKED), code_bytes=len(PACKED),
        tokenizer_sha256="a" * 64, val_sha256="b" * 64, train_sha256="e" * 64, model_sha256=sha256(b"f" * 9),
        model_bytes=model_bytes, cap_bytes=16_000_000,
        total_bytes=model_bytes + len(PACKED), documents=50_000, tokens=TOKENS, bytes=BYTES, unadapted_tokens=0,
        clocks={"training": {"seconds": 599.1, "budget": 600.0}, "scoring": {"seconds": 412.0, "budget": 600.0}})


def write_run(folder, r: dict, source: str = SOURCE):
    """The files of a run with this result, in the form in which train_gpt.py writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    bar, stream = "=" * 100, "documents:{documents} tokens:{tokens} bytes:{bytes}".format(**r)
    listed = lambda values: " ".join(f"{name}:{value}" for name, value in values.items())
    score = lambda name, stage: f"{name} val_loss:{r[f'val_loss{stage}']:.8f} val_bpb:{r[f'val_bpb{stage}']:.8f}"
    gpus, device = r["hardware"].split(" x ")
    (folder / "log.txt").write_text("\n".join((
        f"run_id:{r['run_id']} code_sha256:{r['code_sha256']}", f"versions: {listed(r['versions'])}",
        f"settings other than the record's: {listed(r['settings'])}", f"all settings: preset: seed:{r['seed']} run_id:x",
        f"device:{device} world_size:{gpus} attention:flash3_attention kernels:Triton", bar, source, bar,
        "step:1/2 train_loss:9.0", f"train: steps:{r['steps']} tokens:9 epochs:1.0",
        "bytes: code:{code_bytes} model:{model_bytes} total:{total_bytes} cap:16000000".format(**r),
        f"validation: {stream} documents_a_byte_short:0 (a space first)", score("unquantized", "_unquantized"),
        score("quantized", "_quantized"), score("final", ""),
        *(f"clock {name:20}{clock['seconds']:9.1f} s" for name, clock in r["clocks"].items()),
        f"caveats: {'; '.join(r['caveats']) or 'none'}", "RESULT " + json.dumps(r), "")))
    (folder / "result.json").write_text(json.dumps(r, indent=1) + "\n")
    rows = {"kind": "settings"}, {"kind": "step", "step": 1}, {"kind": "result", **r}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train_gpt_packed.py").write_bytes(PACKED)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [str(write_run(tmp_path / f"seed{seed}", result_of_seed(seed))) for seed in (2, 0, 1)]


@pytest.fixture
def refused(capsys):
    """refused(main, *arguments): the one line that a mistake ends with."""
    def call(main, *arguments) -> str:
        assert main([str(a) for a in arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1, err
        return err
    return call


# Runs that add up

def test_three_runs_make_a_submission(runs, tmp_path, capsys):
    out = tmp_path / "submission.json"
    baseline = "--baseline=1.0728,1.0726,1.0732"
    assert kit.main([*runs, "--write", str(out), "--table", "--author", "A", "--date", "2026-01-02", baseline]) == 0
    made, results = json.loads(out.read_text()), [result_of_seed(seed) for seed in (0, 1, 2)]
    theirs = json.loads((ROOT / "submission.json").read_text())
    assert set(theirs) <= set(made) and set(theirs["compliance"]) <= set(made["compliance"])
    assert set(next(iter(theirs["seed_results"].values()))) <= set(made["seed_results"]["0"])
    assert made["author"] == "A" and made["date"] == "2026-01-02" and made["seeds"] == [0, 1, 2]
    for name in ("val_loss", "val_bpb"):
        assert made[name] == pytest.approx(statistics.fmean(r[name] for r in results), rel=1e-15)
        assert made[f"{name}_std"] == pytest.approx(np.std([r[name] for r in results], ddof=1))
    row = made["seed_results"]["2"]
    assert row["artifact_bytes"] == made["artifact_bytes"] == 15_999_002 + len(PACKED) and row["steps"] == 5002
    assert row["training_seconds"] == 599.1 and (tmp_path / row["log"]).samefile(tmp_path / "seed2/log.txt")
    assert made["model_bytes"] + made["code_bytes"] == made["artifact_bytes"]
    assert all(made["compliance"].values()) and made["caveats"] == [] and made["corpus"] == "FineWeb"
    assert made["track"] == "10min_16mb" and made["record"] is True
    printed = capsys.readouterr().out
    assert "| 0 | 1.05810 | " in printed and "| **mean** | **1.05800** | " in printed
    assert "| std | 0.00046 | " in printed
    assert "lower at all: p = " in printed and ", below the 0.01 that" in printed


def test_a_record_has_to_be_better_by_the_margin(runs, tmp_path):
    """Better than its baseline without doubt, but by .0009 bits per byte, which is less than .005 nats a token."""
    out = tmp_path / "submission.json"
    assert kit.main([*runs, "--write", str(out), "--baseline", "1.0590,1.0589,1.0588"]) == 0
    made = json.loads(out.read_text())
    assert made["significance"]["p_improves"] < 0.05 < 0.9 < made["significance"]["p_improves_by_0.005_nats"]
    assert made["track"] == "10min_16mb" and made["record"] is False


def test_one_run_is_a_submission_without_spread(tmp_path, capsys):
    out, r = tmp_path / "submission.json", result_of_seed(5)
    r |= dict(hardware="4 x NVIDIA H200", documents=1800, caveats=["not on 8 GPUs"])
    log = write_run(tmp_path / "run", r) / "log.txt"  # a log alone is read, too
    out.write_text(json.dumps(dict(author="Kept", corpus="prose", val_sha256=r["val_sha256"], date="1999-01-01")))
    assert kit.main([str(log), "--write", str(out)]) == 0
    made = json.loads(out.read_text())
    assert made["val_bpb_std"] is None and made["val_bpb"] == r["val_bpb"] and made["record"] is False
    assert made["author"] == "Kept" and made["corpus"] == "prose; not FineWeb" and made["date"] > "2000"
    no = {rule for rule, holds in made["compliance"].items() if not holds}
    assert no == {"eight_gpus", "h100", "fineweb", "three_seeds"} and made["track"] == "non-record-16mb"
    assert made["caveats"] == made["seed_results"]["5"]["caveats"] == ["not on 8 GPUs"]
    assert "caveat: not on 8 GPUs" in capsys.readouterr().out
    out.write_text(json.dumps(made | dict(date="2001-02-03")))
    again = made | dict(date="2001-02-03")
    assert kit.main([str(log), "--write", str(out)]) == 0 and json.loads(out.read_text()) == again, "made again, not anew"


@pytest.mark.parametrize("changes, rules", [
    (dict(caveats=["late"]), set()),
    (dict(settings={"val_loss_every": 100}), {"validation_read_only_after_export"}),
    (dict(documents=49_999), {"fineweb"}),
    (dict(hardware="8 x NVIDIA H200"), {"h100"}),
])
def test_what_speaks_against_runs_keeps_them_from_being_a_record(changes, rules, tmp_path):
    runs = kit.load([write_run(tmp_path / f"{seed}", result_of_seed(seed) | changes) for seed in range(3)])
    made = kit.submission(runs, ["a", "b", "c"], {"date": ""}, {kit.BY_MARGIN: 0.0})
    assert {rule for rule, holds in made["compliance"].items() if not holds} == rules
    assert made["track"] == "non-record-16mb" and made["record"] is False


def test_what_may_differ_between_runs(tmp_path):
    r = result_of_seed(1)
    r["settings"] |= dict(artifact_dir="x", data_dir="/elsewhere", save_scores="s.npz", train_log_every=7)
    assert len(kit.load([write_run(tmp_path / "a", result_of_seed(0)), write_run(tmp_path / "b", r)])) == 2


def test_the_runs_in_logs_add_up():
    assert len(kit.load(sorted((ROOT / "logs").glob("smoke-seed*")))) == 3
    assert kit.load([ROOT / "logs/proxy-4xH200"]) and kit.load([ROOT / "logs/proxy-2xH200"])


def test_submission_json_is_what_the_kit_makes_of_its_logs():
    theirs = json.loads((ROOT / "submission.json").read_text())
    logs = [row["log"] for row in theirs["seed_results"].values()]
    runs = kit.load([(ROOT / log).parent for log in logs])
    made = kit.submission(runs, logs, theirs, theirs.get("significance", {}))
    pairs = [(values, made["seed_results"][seed]) for seed, values in theirs.pop("seed_results").items()]
    for values, ours in (*pairs, (theirs.pop("compliance"), made["compliance"]), (theirs, made)):
        assert {name: ours[name] for name in values} == values


# Runs that do not

def clocks(**changes) -> dict:
    return dict(clocks={**result_of_seed(0)["clocks"], **changes})


FAULTS = {  # changes of one run's result, and words of the refusal
    "too large": (dict(model_bytes=16_000_000, total_bytes=16_000_000 + len(PACKED)), "16000013 bytes of 16000000"),
    "wrong sum": (dict(total_bytes=15_000_000), "total_bytes are not code_bytes + model_bytes"),
    "trained too long": (clocks(training={"seconds": 600.1, "budget": 700.0}), "training took 600.1 s of 600"),
    "over its own budget": (clocks(training={"seconds": 91.0, "budget": 90.0}), "took 91.0 s of 90"),
    "scored too long": (clocks(scoring={"seconds": 601, "budget": 0.0}), "scoring took 601 s of 600"),
    "no clock": (dict(clocks={"training": {"seconds": 1.0, "budget": 0.0}}), "lacks a clock"),
    "not all adapted": (dict(unadapted_tokens=12), "12 targets were not adapted"),
    "not all documents": (dict(settings={**SETTINGS, "val_doc_fraction": 0.5}), "VAL_DOC_FRACTION"),
    "not trained": (dict(mode="checkpoint"), "mode checkpoint"),
    "score of other tokens": (dict(tokens=TOKENS - 1), "contradict each other"),
    "not a number": (dict(val_loss=math.nan, val_bpb=math.nan), "not as in the RESULT line of"),
    "another source": (dict(code_sha256="c" * 64), "the source in it has not the code_sha256"),
    "another packed script": (dict(packed_sha256="c" * 64), "train_gpt_packed.py"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_does_not_add_up_is_refused(fault, tmp_path, refused):
    changes, words = FAULTS[fault]
    folder = write_run(tmp_path / "run", result_of_seed(0) | changes)
    said = refused(kit.main, folder, "--write", tmp_path / "s.json")
    assert words in said and str(folder / "log.txt") in said
    assert not (tmp_path / "s.json").exists()


DIFFERENCES = {  # a second run that is flawless by itself, and words of the refusal
    "machine": (dict(hardware="8 x NVIDIA H200"), "hardware is 8 x NVIDIA H200, but 8 x NVIDIA H100 80GB HBM3 in"),
    "validation": (dict(val_sha256="c" * 64), "val_sha256"),
    "training data": (dict(train_sha256="c" * 64), "train_sha256"),
    "tokenizer": (dict(tokenizer_sha256="c" * 64), "tokenizer_sha256"),
    "documents": (dict(documents=49_999), "documents is 49999, but 50000"),
    "versions": (dict(versions={"python": "3.12.3", "torch": "2.13.0"}), "versions"),
    "a setting": (dict(settings={**SETTINGS, "matrix_lr": 0.04}), "setting matrix_lr is 0.04, but 0.03"),
    "a default": (dict(settings={"seed": 1}), "setting matrix_lr is the default, but 0.03"),
    "a further setting": (dict(settings={**SETTINGS, "beta2": 0.9}), "setting beta2 is 0.9, but the default"),
    "no seed of its own": (dict(seed=0), "seed 0 is that of"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_runs_that_do_not_belong_together_are_refused(difference, tmp_path, refused):
    changes, words = DIFFERENCES[difference]
    results = result_of_seed(0), result_of_seed(1) | changes
    first, second = (write_run(tmp_path / f"run{i}", r) for i, r in enumerate(results))
    assert kit.load([first]) and kit.load([second]), "each is fine alone"
    assert words in (said := refused(kit.main, first, second)) and str(second / "log.txt") in said


@pytest.mark.parametrize("content", [b"", b"g" * 9, b"f" * 8])
def test_an_artifact_beside_the_log_is_the_runs(content, tmp_path, refused):
    r = result_of_seed(0) | dict(model_bytes=9, total_bytes=9 + len(PACKED))
    folder = write_run(tmp_path / "run", r)
    (folder / "final_model.int6.ptz").write_bytes(b"f" * 9)
    assert kit.load([folder])
    (folder / "final_model.int6.ptz").write_bytes(content)
    assert "final_model.int6.ptz beside it" in refused(kit.main, folder)


@pytest.mark.parametrize("change", [dict(tokens=0), dict(tokens="x"), dict(steps="many"), dict(seed=None), dict(seed=[1]),
                                    dict(clocks=[]), dict(clocks={"training": {}, "scoring": {}}), dict(caveats=None),
                                    dict(caveats="none"), dict(hardware=8), dict(settings=None), dict(total_bytes="16"),
                                    dict(val_bpb_quantized="2.6"), dict(versions=3)])
def test_values_of_another_kind_are_refused(change, tmp_path, refused):
    folder, r = write_run(tmp_path / "run", result_of_seed(0)), result_of_seed(0)
    text = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(text.replace(json.dumps(r), json.dumps(r | change)))
    assert str(folder / "log.txt") in refused(kit.main, folder / "log.txt")


def test_who_signs_is_said(runs, tmp_path, capsys):
    out = tmp_path / "submission.json"
    assert kit.main([*runs, "--write", str(out), "--author", "A", "--github-id", "a", "--title", "T"]) == 0
    assert "kept from" not in capsys.readouterr().out
    assert kit.main([*runs, "--write", str(out), "--title", "U"]) == 0
    assert "kept from an older submission.json: author 'A', github_id 'a'" in capsys.readouterr().out
    assert make_record.main(["X", *runs, "--out", str(tmp_path / "records")]) == 0
    assert "kept from an older submission.json: author " in capsys.readouterr().out


def test_mistakes_on_the_command_line(runs, tmp_path, refused):
    assert "is a folder" in refused(kit.main, *runs, "--write", tmp_path)
    assert str(tmp_path / "no/s.json") in refused(kit.main, *runs, "--write", tmp_path / "no/s.json")
    for option in ("--baseline=nan,1", "--date=tomorrow"):
        with pytest.raises(SystemExit):
            kit.main([*runs, option])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1", "seed2"]


def test_requirements_name_what_attention_ran_on():
    versions = {"python": "3.12.3", "cuda": "13.0", "torch": "2.11.0"}
    assert "flash-attn-3" in make_record.requirements(versions, "attention:flash3_attention")
    assert "flash-attn-3==3.0" in make_record.requirements({**versions, "flash_attn_3": "3.0"}, "attention:flash3_attention")
    assert "flash" not in make_record.requirements(versions, "attention:varlen_attention")


def test_mixed_scripts_are_refused(tmp_path, refused):
    other = SOURCE + "# changed\n"
    r = result_of_seed(1) | dict(code_sha256=sha256(other.encode()))
    folders = write_run(tmp_path / "a", result_of_seed(0)), write_run(tmp_path / "b", r, other)
    assert kit.load(folders[1:]) and "code_sha256" in refused(kit.main, *folders)


@pytest.mark.parametrize("file, old, new, words", [
    ("log.txt", '"one"', '"two"', "code_sha256"),
    ("log.txt", "final val_loss:2", "final val_loss:1", "no line `final val_loss:2"),
    ("log.txt", "documents:50000", "documents:40000", "no line `validation: documents:50000"),
    ("log.txt", "total:15999013", "total:16999013", "no line `bytes: code:13 model:15999000"),
    ("log.txt", "clock training               ", "clock training              9", "no line `clock training"),
    ("log.txt", "caveats: none", "caveats: preset smoke", "no line `caveats: none"),
    ("log.txt", "train: steps:5000", "train: steps:500", "no line `train: steps:5000"),
    ("log.txt", "\nquantized val_loss:", "\nquantized val_loss:1", "no line `quantized val_loss:"),
    ("log.txt", "unquantized val_loss:", "unquantized val_loss:1", "no line `unquantized val_loss:"),
    ("log.txt", "world_size:8", "world_size:1", "no line `device:NVIDIA H100 80GB HBM3 world_size:8"),
    ("log.txt", "torch:2.11", "torch:2.12", "no line `versions: python"),
    ("log.txt", "matrix_lr:0.03", "matrix_lr:0.04", "no line `settings other than the record's"),
    ("log.txt", "all settings: preset: seed:0", "all settings: preset: seed:1", "seed 0 is not its own"),
    ("log.txt", '"steps": 5000', '"steps": 5001', "steps not as in the RESULT line"),
    ("log.txt", "RESULT {", "RESULT x{", "not the result of a run"),
    ("log.txt", "RESULT ", "", "not the log of a finished run"),
    ("log.txt", "=" * 100 + "\nstep", "step", "not the log of a finished run"),
    ("result.json", '"val_bpb": 1.0581', '"val_bpb": 1.0481', "val_bpb not as in the RESULT line"),
    ("result.json", "}", "", "not the result of a run"),
    ("metrics.jsonl", '"val_bpb": 1.0581', '"val_bpb": 1.0481', "val_bpb not as in the RESULT line"),
    ("train_gpt_packed.py", "one", "two", "packed_sha256"),
    ("train_gpt_packed.py", "print('one')\n", "", "packed_sha256"),
])
def test_files_that_were_changed_are_refused(file, old, new, words, tmp_path, refused):
    path = write_run(tmp_path / "run", result_of_seed(0)) / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert words in (said := refused(kit.main, path.parent)) and str(path.parent) in said


def test_files_that_are_missing_or_of_another_run_are_refused(tmp_path, refused):
    assert "cannot read" in refused(kit.main, tmp_path / "nowhere")
    folder = write_run(tmp_path / "run", result_of_seed(0))
    (folder / "final_model.int6.ptz").write_bytes(b"four")
    assert "final_model.int6.ptz beside it has 4 bytes" in refused(kit.main, folder)
    (folder / "final_model.int6.ptz").unlink()
    (folder / "metrics.jsonl").write_text("")
    assert "metrics.jsonl: not the result" in refused(kit.main, folder)
    (folder / "metrics.jsonl").unlink()
    assert kit.load([folder]), "a run's log and result suffice"
    (folder / "result.json").unlink()
    assert "cannot read" in refused(kit.main, folder)
    log = write_run(tmp_path / "older", result_of_seed(0)) / "log.txt"
    log.write_text(log.read_text().replace('"steps": 5000, ', ""))
    assert "RESULT lacks steps" in refused(kit.main, log)


# The t-tests

def test_tail_of_the_t_distribution():
    for t, df, p in ((6.3138, 1, 0.05), (31.8205, 1, 0.01), (2.92, 2, 0.05), (6.9646, 2, 0.01), (2.1318, 4, 0.05),
                     (2.7764, 4, 0.025), (3.7469, 4, 0.01), (7.1732, 4, 0.001), (1.8125, 10, 0.05), (2.4573, 30, 0.01)):
        assert kit.t_tail(t, df) == pytest.approx(p, rel=1e-4), "the printed tables"
    for t in (-30.0, -1.0, -1e-3, 0.0, 1e-3, 0.7, 3.0, 40.0):
        u = t * t / 4  # closed forms exist of 4, 1 and 2 degrees of freedom; of many it is the normal distribution
        four = 0.5 - 0.375 * t / math.sqrt(1 + u) * (1 - u / (1 + u) / 3)
        assert kit.t_tail(t, 4) == pytest.approx(four, abs=1e-12)
        assert kit.t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-12)
        assert kit.t_tail(t, 2) == pytest.approx(0.5 - t / math.sqrt(2 + t * t) / 2, abs=1e-12)
        assert kit.t_tail(t, 1e6) == pytest.approx(math.erfc(t / math.sqrt(2)) / 2, abs=1e-6)


def welch_by_integration(new, old, margin: float) -> float:
    """The p-value from the density, summed numerically over t = sqrt(df) tan(angle)."""
    (a, m), (b, n) = ((np.var(x, ddof=1) / len(x), len(x)) for x in (new, old))
    t = (np.mean(old) - np.mean(new) - margin) / np.sqrt(a + b)
    df = (a + b) ** 2 / (a**2 / (m - 1) + b**2 / (n - 1))
    angle = (np.arange(1_000_000) + 0.5) / 1_000_000 * np.pi - np.pi / 2
    density = np.cos(angle) ** (df - 1)
    return float(density[angle > np.arctan(t / np.sqrt(df))].sum() / density.sum())


@pytest.mark.parametrize("new, old, margin", [
    ([1.0581, 1.0575, 1.0584], [1.0728, 1.0726, 1.0747], 0.0),
    ([1.0581, 1.0575, 1.0584], [1.0611, 1.0604, 1.0598], 0.002),
    ([1.06, 1.07], [1.064, 1.066, 1.071, 1.069], 0.0),
    ([1.1, 1.101, 1.1025], [1.0, 1.0, 1.0], 0.0),
])
def test_welch_against_integration(new, old, margin):
    assert kit.welch(new, old, margin)[2] == pytest.approx(welch_by_integration(new, old, margin), abs=2e-6)


def test_welch_by_hand():
    """Equal numbers and variances: 4 degrees of freedom, t = 2.5 sqrt(3 / 2), and the closed form of the tail."""
    t, df, p = kit.welch([0.0, 1.0, 2.0], [2.5, 3.5, 4.5])
    assert t == pytest.approx(2.5 * math.sqrt(1.5)) and df == pytest.approx(4)
    assert p == pytest.approx(0.0188, abs=5e-5)
    assert kit.welch([0.0, 1.0, 2.0], [2.5, 3.5, 4.5], 2.5)[2] == pytest.approx(0.5)
    assert kit.welch([2.5, 3.5, 4.5], [0.0, 1.0, 2.0])[2] == pytest.approx(1 - p)


def test_t_tests_that_cannot_be_done_are_refused(runs, refused):
    assert "two seeds or more on each side: 3 v 1" in refused(kit.main, *runs, "--baseline", "1.07")
    assert "two seeds or more on each side: 1 v 3" in refused(kit.main, runs[0], "--baseline", "1.07,1.08,1.06")


def test_a_baseline_in_nats_is_one_in_bits(runs):
    loaded, nats = kit.load([ROOT / run for run in runs]), BYTES * math.log(2) / TOKENS
    bits = kit.significance(loaded, [1.07, 1.071, 1.0705], None)
    loss = kit.significance(loaded, None, [value * nats for value in (1.07, 1.071, 1.0705)])
    assert all(bits[name] == pytest.approx(loss[name]) for name in bits) and kit.significance(loaded, None, None) == {}
    margin = kit.welch([r.result["val_bpb"] for r in loaded], [1.07, 1.071, 1.0705], 0.005 / nats)
    assert bits["p_improves_by_0.005_nats"] == pytest.approx(margin[2])


# The folder of a record

def test_record_is_a_folder_to_submit(runs, tmp_path, capsys):
    out = tmp_path / "records"
    options = "--out", str(out), "--github-id", "me", "--baseline", "1.07,1.08"
    assert make_record.main(["2026-01-02_It", *runs, *options]) == 0
    folder = out / "2026-01-02_It"
    assert [path.name for path in out.iterdir()] == [folder.name], "nothing aside is left"
    assert {path.name for path in folder.iterdir()} == {
        "train_gpt.py", "train_gpt_readable.py", "README.md", "requirements.txt", "submission.json",
        "train_seed0.log", "train_seed1.log", "train_seed2.log"}
    out = capsys.readouterr().out
    assert all(str(path) in out for path in folder.iterdir())
    assert (folder / "train_gpt.py").read_bytes() == PACKED and (folder / "train_gpt_readable.py").read_text() == SOURCE
    assert (folder / "train_seed2.log").read_bytes() == (tmp_path / "seed2/log.txt").read_bytes()
    made, readme = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    assert made["github_id"] == "me" and made["name"] == "2026-01-02_It" and made["track"] == "10min_16mb"
    assert kit.table(made) in readme and "Not a record run" not in readme and "p = " in readme and "{" not in readme
    assert "\n    SEED=0 MATRIX_LR=0.03 torchrun --standalone --nproc_per_node=8 train_gpt.py\n" in readme
    assert {row["log"] for row in made["seed_results"].values()} == {f"train_seed{seed}.log" for seed in range(3)}
    pins = (folder / "requirements.txt").read_text().splitlines()
    assert {"torch==2.11.0", "flash-attn-3==3.0.0", "numpy==2.3.5"} <= set(pins) and pins[1].endswith("/whl/cu130")
    assert len(kit.load(sorted(folder.glob("*.log")))) == 3, "its logs add up where they are now"


def test_record_says_what_speaks_against_it(tmp_path):
    changes = dict(caveats=["preset smoke"], hardware="1 x CPU x86_64")
    run = write_run(tmp_path / "run", result_of_seed(0) | changes)
    assert make_record.main(["X", str(run), "--out", str(tmp_path), "--title", "A title"]) == 0
    readme = (tmp_path / "X/README.md").read_text()
    assert readme.startswith("# A title\n") and "**Not a record run**" in readme and "preset smoke" in readme
    assert "**no**: eight_gpus" in readme and "nproc_per_node=1" in readme and "(one seed)" in readme


def test_record_takes_the_packed_script_from_train_gpt(tmp_path):
    """Runs whose packed script is not at hand: what train_gpt.py packs to is taken if it has the hash."""
    packed, source = tg.pack_script(), (ROOT / "train_gpt.py").read_text()
    r = result_of_seed(0) | dict(packed_sha256=sha256(packed), code_bytes=len(packed), total_bytes=len(packed) + 100,
                                 model_bytes=100)
    for name, text in (("plain", source), ("packed", "import minified\n")):  # which is what the packed script logs
        log = write_run(tmp_path / name, r | dict(code_sha256=sha256(text.encode())), text) / "log.txt"
        assert make_record.main([f"of-{name}", str(log), "--out", str(tmp_path)]) == 0
        assert (tmp_path / f"of-{name}/train_gpt.py").read_bytes() == packed
        assert (tmp_path / f"of-{name}/train_gpt_readable.py").read_text() == source


def test_record_refuses(runs, tmp_path, refused, monkeypatch):
    out = tmp_path / "records"
    main = lambda *arguments: refused(make_record.main, *arguments, "--out", out)
    assert "does not pack to the bytes" in main("X", tmp_path / "seed0/log.txt"), "no packed script with that hash"
    assert "seed 0 is that of" in main("X", runs[1], runs[1])
    assert "is no name for a folder" in main("../X", *runs) and "is no name for a folder" in main(".X", *runs)
    wrong = write_run(tmp_path / "w", result_of_seed(0) | dict(code_bytes=14, total_bytes=15_999_014))
    assert "code_bytes are 14, but the packed script has 13" in main("X", wrong)
    minified = write_run(tmp_path / "m", result_of_seed(0) | dict(code_sha256=sha256(b"x\n")), "x\n")
    assert "not what that was packed from" in main("X", minified)
    assert not out.exists()
    (out / "X").mkdir(parents=True)
    assert "X is there already" in main("X", *runs)

    def full(*_):
        raise OSError(28, "No space left")
    monkeypatch.setattr("pathlib.Path.rename", full)
    assert "No space left" in main("Y", *runs)
    assert [path.name for path in out.iterdir()] == ["X"], "not even half a folder is left"


# The packed script

def test_pack_writes_and_checks(tmp_path, refused, capsys):
    file = tmp_path / "packed.py"
    assert pack.main(["-o", str(file)]) == 0 and file.read_bytes() == tg.pack_script()
    out = capsys.readouterr().out
    assert sha256(file.read_bytes()) in out and f"{file.stat().st_size:,} bytes" in out
    assert sha256((ROOT / "train_gpt.py").read_bytes()) in out
    assert pack.main(["--check", str(file)]) == 0 and f"{file} is what train_gpt.py packs to" in capsys.readouterr().out
    file.write_bytes(file.read_bytes() + b"#\n")
    assert pack.main(["--check", str(file)]) == 1 and "is not what train_gpt.py packs to" in capsys.readouterr().out
    assert "cannot read" in refused(pack.main, "--check", tmp_path / "none")
    assert "cannot write" in refused(pack.main, "-o", tmp_path / "none" / "x.py")
