"""Read finished runs of train_gpt.py and check that they add up. Other tools import this module.

A run is a folder that train_gpt.py left (its ARTIFACT_DIR), or its log alone. A run that does not add up is
Refused with one line that names the first fault. That finds mistakes; only another run can tell a log that
was forged as a whole.

What a run writes has grown. Runs whose `phases` have no `report` are older: some fields, the phases of a few
seconds and the times in metrics.jsonl are not asked of them.
"""
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import command

CAP_BYTES, CLOCK_SECONDS = 16_000_000, 600  # the challenge's
BAR = "=" * 100 + "\n"  # before and after the source in a log
RAW_CUT = 47_851_520  # its bytes are of the raw text
FINEWEB_BYTES = {40_540_160: 151_078_222, RAW_CUT: 151_074_499}  # of so many first targets, as published
FINEWEB_DOCUMENTS = 50_000  # of its validation
SEQUENCE = 2048  # tokens; the challenge's reference scores whole ones only
OWN_SETTINGS = "seed run_id artifact_dir data_dir save_scores train_log_every".split()  # may differ
STAGES = "", "_quantized", "_unquantized"  # ends of the names of scores; the first is the headline's
SHARED = """code_sha256 packed_sha256 code_bytes hardware versions tokenizer_sha256 val_sha256
    documents tokens bytes""".split()  # what is the same in all runs of a submission
NEEDED = SHARED + """seed settings mode steps model_bytes total_bytes unadapted_tokens clocks seconds
    caveats""".split()
NEEDED += [f"val_{unit}{stage}" for unit in ("loss", "bpb") for stage in STAGES]
# What older runs may lack:
NEEDED_NOW = "cap_bytes run_id targets_left_out model_sha256 train_sha256 train_data_sha256".split()
ON_CLOCK = {"train": "training", "calibrate": "training", "open artifact": "scoring",
            "score quantized": "scoring", "count n-grams": "scoring",
            "adapt": "scoring"}  # phases that a clock has to count
VERDICTS = "pass", "FAIL", "NOT CHECKED"  # that an audit.json has, by rule
AUDITED_VALUES = "code_sha256", "packed_sha256", "val_sha256", "val_loss", "val_bpb"  # that it repeats


class Refused(Exception):
    """Runs that do not add up, or cannot be read. Its text is one line that says which file and why."""


class Run(NamedTuple):
    """A finished run."""
    log: Path
    text: str  # of the log
    source: str  # of the script, from the log
    result: dict[str, Any]  # what the RESULT line holds
    packed: bytes | None  # the packed script, if it is beside the log
    rows: list[dict[str, Any]]  # of metrics.jsonl, if that is beside the log
    verdicts: dict[str, str]  # of an audit of this run, by rule, if its audit.json is beside the log


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError if it has a name twice, of which readers would see different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice")
    return found


# ---- Reading -----------------------------------------------------------------------------------------------

def load(paths: list[Path]) -> list[Run]:
    """Read runs and order them by seed; Refused if one does not add up, or not with the others."""
    runs = [read_run(path) for path in paths]
    for run in runs[1:]:
        check_belongs_with(runs[0], run)
    by_seed: dict[int, Run] = {}
    for run in runs:
        seed = run.result["seed"]
        if seed in by_seed:
            raise Refused(f"{run.log}: seed {seed} is that of {by_seed[seed].log}, too")
        by_seed[seed] = run
    return [by_seed[seed] for seed in sorted(by_seed)]


def read_run(path: Path) -> Run:
    """Read a finished run and check that all its files say the same."""
    run = read_finished(path)
    folder = path if path.is_dir() else None
    artifact = read_if_there(folder, "final_model.int6.ptz")
    run = run._replace(packed=read_if_there(folder, "train_gpt_packed.py"))
    try:
        if folder:
            run = run._replace(verdicts=read_verdicts(folder, run.result, artifact))
        check_adds_up(run, artifact)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise Refused(other_kind(run, error)) from error
    return run


def read_finished(path: Path) -> Run:
    """What a finished run says of itself, in its log and in the copies of its result, which have to agree.

    It may break the challenge's limits, as experiments do: `read_run` checks them.
    """
    folder = path if path.is_dir() else None
    # 1) Take source and result from the log.
    log = folder / "log.txt" if folder else path
    text = read(log).decode(errors="replace")
    _, *after_bars = text.split(BAR)
    last_line = text.rstrip("\n").rsplit("\n", 1)[-1]
    if len(after_bars) < 2 or not last_line.startswith("RESULT "):
        raise Refused(f"{log}: not the log of a finished run, which holds its source and ends with a "
                      "RESULT line")
    source = after_bars[0][:-1]
    result = parse_object(log, last_line.removeprefix("RESULT "))

    # 2) Compare the result with its copies beside the log; only the order of the values may differ.
    metrics = folder / "metrics.jsonl" if folder else None
    rows = read_rows(metrics) if metrics and metrics.exists() else []
    copies = {folder / "result.json": read_object(folder / "result.json")} if folder else {}
    if rows:
        copies[metrics] = {key: value for key, value in rows[-1].items() if key not in ("kind", "time")}
    for file, copy in copies.items():
        other = [key for key in {**result, **copy} if result.get(key) != copy.get(key)]
        if other:
            raise Refused(f"{file}: {', '.join(other)} not as in the RESULT line of {log}")
    lacking = [key for key in NEEDED if key not in result]
    if lacking:
        raise Refused(f"{log}: its RESULT lacks {', '.join(lacking)}: not a run that trained, "
                      "or one of another script")
    return Run(log, text, source, result, packed=None, rows=rows, verdicts={})


def other_kind(run: Run, error: Exception) -> str:
    """The line about a result whose values are of other kinds than a run's."""
    return f"{run.log}: its RESULT or metrics.jsonl hold values of another kind than a run's ({error!r:.120})"


def read_verdicts(folder: Path, result: dict, artifact: bytes | None) -> dict[str, str]:
    """The verdicts, by rule, of the audit.json that tools/audit.py left in the folder; none without one.

    Refused if it is not of this run: of another artifact, of a script that is neither the run's source nor
    its packed form, or of a result that said something else.
    """
    file = folder / "audit.json"
    if not file.exists():
        return {}
    audit = read_object(file)
    model_sha256 = result.get("model_sha256")
    if artifact is not None and model_sha256 is None:  # older runs lack it
        model_sha256 = sha256(artifact)
    if model_sha256 is None or audit.get("model_sha256") != model_sha256:
        raise Refused(f"{file}: not an audit of this run's final_model.int6.ptz: remove it, or audit again")
    if audit.get("script_sha256") not in (result["code_sha256"], result["packed_sha256"]):
        raise Refused(f"{file}: not an audit with this run's script: remove it, or audit again")
    other = [name for name in AUDITED_VALUES if name not in audit or audit[name] != result[name]]
    if other:
        raise Refused(f"{file}: {', '.join(other)} not as in this run's RESULT: remove it, or audit again")
    verdicts = audit.get("rules")
    if not isinstance(verdicts, dict) or not all(verdict in VERDICTS for verdict in verdicts.values()):
        raise Refused(f"{file}: its rules have to be an object of {', '.join(VERDICTS)}")
    return verdicts


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error


def read_if_there(folder: Path | None, name: str) -> bytes | None:
    return read(folder / name) if folder and (folder / name).exists() else None


def read_object(path: Path) -> dict[str, Any]:
    return parse_object(path, read(path))


def read_rows(path: Path, unfinished: bool = False) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; their kinds may be any.

    Those of an unfinished run may have losses that are no numbers, and a torn last line is left out, with a
    word.
    """
    text = read(path).decode(errors="replace")
    lines = text.rstrip("\n").split("\n") if text or not unfinished else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_object(f"{path}, line {number}", line, float if unfinished else finite))
        except Refused:
            if not unfinished or text.endswith("\n") or not 1 < number == len(lines):
                raise
            command.note(f"{path}: its last line is torn and left out")
    return rows


def parse_object(where: Path | str, text: str | bytes, number: Callable | None = None) -> dict[str, Any]:
    """The JSON object that a file, or a line of it, holds; its numbers have to be finite unless told."""
    number = number or finite
    try:
        parsed = json.loads(text, parse_float=number, parse_constant=number, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where}: damaged, no JSON object ({error})") from error
    if not isinstance(parsed, dict):
        raise Refused(f"{where}: no JSON object, but {str(parsed):.40}")
    return parsed


def finite(text: str) -> float:
    """A number. ValueError for NaN and infinity, which pass every comparison with a limit."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


# ---- Checks ------------------------------------------------------------------------------------------------

def check_adds_up(run: Run, artifact: bytes | None) -> None:
    """Refused if the run's numbers do not follow from each other, or the challenge's limits exclude it."""
    faults = itertools.chain(file_faults(run, artifact), log_faults(run), result_faults(run.result),
                             caveat_faults(run), phase_faults(run), metrics_faults(run), wall_faults(run))
    first = next(faults, None)
    if first:
        raise Refused(f"{run.log}: {first}")


def file_faults(run: Run, artifact: bytes | None) -> Iterator[str]:
    """Where scripts and artifact are not those that the result is of."""
    r = run.result
    if sha256(run.source.encode()) != r["code_sha256"]:
        yield "the source in it does not have the code_sha256 of its RESULT"
    if re.search(r"""\.phase\((["'])report\1\)""", run.source) and not has_report(r):
        yield "its script writes a phase `report`, and its RESULT has none"
    if run.packed is not None and sha256(run.packed) != r["packed_sha256"]:
        yield "train_gpt_packed.py beside it does not have the packed_sha256 of its RESULT"
    if artifact is None:
        return
    if len(artifact) != r["model_bytes"]:
        yield f"final_model.int6.ptz beside it has {len(artifact)} bytes, its RESULT says {r['model_bytes']}"
    if "model_sha256" in r and sha256(artifact) != r["model_sha256"]:  # older runs lack it
        yield "final_model.int6.ptz beside it does not have the model_sha256 of its RESULT"


def log_faults(run: Run) -> Iterator[str]:
    """Where the lines of the log do not say what its result says."""
    r = run.result
    head, *_, tail = run.text.split(BAR)
    for part, expected in ((head, lines_before_source(r)), (tail, lines_after_source(r))):
        lines = [f"{line}\n" for line in part.split("\n")]
        for start, rest in expected.items():
            found = [line for line in lines if line.startswith(start)]
            if not any(line.startswith(start + rest) for line in found):
                yield f"it has no line `{(start + rest).strip()}`, as its RESULT has it"
            if len(found) > 1:
                yield f"it has {len(found)} lines that begin with `{start.strip()}`"
    logged_seconds = seconds_in_log(run)
    for name, seconds in seconds_in_result(r):
        found = [logged for line, logged, _ in logged_seconds if line == name]
        if not found or abs(sum(found) - seconds) > 0.051 * len(found):  # each is rounded to one decimal
            yield f"it has no line `{name} {seconds:.1f} s`, as its RESULT has it"
    left_out = r.get("targets_left_out")
    if left_out is not None and f" targets_left_out:{left_out:d}\n" not in tail:
        yield f"it has no line that ends with `targets_left_out:{left_out}`, as its RESULT has it"
    for name, value in {**r["settings"], "seed": r["seed"]}.items():
        if f" {name}:{value} " not in settings_line(run):
            yield f"{name} {value} of its RESULT is not the one in its line `all settings`"


def settings_line(run: Run) -> str:
    """The names and values of all settings, from the log, with spaces around each."""
    line = re.search(r"^all settings:(.*)", run.text, flags=re.M)
    return f"{line[1]} " if line else ""


def setting(run: Run, name: str, default: Any) -> Any:
    """A setting of default's type: from the log's line of all, as a copy may have other defaults."""
    values = re.findall(rf" {name}:(\S*)", settings_line(run))
    return type(default)(values[-1]) if values else run.result["settings"].get(name, default)


def lines_before_source(r: dict) -> dict[str, str]:
    """Lines, or beginnings of lines, that a log with this result has before the source, once each.

    They are in two parts: one that no other line begins with, and what follows from the result.
    """
    gpus, device = r["hardware"].split(" x ", 1)
    lines = {"versions: ": f"{key_values(r['versions'])}\n",
             "settings other than the record's: ": f"{key_values(r['settings'])}\n",
             "all settings: ": "",
             "device:": f"{device} world_size:{int(gpus)} "}
    return lines | ({"run_id:": f"{r['run_id']} "} if "run_id" in r else {})


def lines_after_source(r: dict) -> dict[str, str]:
    """Lines, or beginnings of lines, that a log with this result has after the source, once each."""
    code, model, total = r["code_bytes"], r["model_bytes"], r["total_bytes"]
    lines = {"train: steps:": f"{r['steps']:d} tokens:",
             "bytes: code:": f"{code:d} model:{model:d} total:{total:d} cap:",
             "validation: documents:": f"{r['documents']:d} tokens:{r['tokens']:d} bytes:{r['bytes']:d} ",
             "caveats: ": f"{'; '.join(r['caveats']) or 'none'}\n",
             "RESULT ": ""}
    for name, stage in (("final", ""), ("quantized", "_quantized"), ("unquantized", "_unquantized")):
        lines[f"{name} val_loss:"] = f"{r[f'val_loss{stage}']:.8f} val_bpb:{r[f'val_bpb{stage}']:.8f}\n"
    if "recompilations" in r:
        lines["recompilations on the clocks:"] = f"{r['recompilations']:d}\n"
    if has_report(r):
        lines["tokenizer: sha256:"] = f"{r['tokenizer_sha256']} "
    if "case_ops" in r:
        lines["case operations: "] = f"{r['case_ops']} sidecars:"
    return lines


def seconds_in_log(run: Run) -> list[tuple[str, float, str]]:
    """(name, seconds, what follows) of the lines `phase NAME` and `clock NAME` in the log.

    What follows the seconds of a phase is the clock that it is on, if it is on one. A phase that comes more
    than once has as many lines, and the sum in the result.
    """
    after_source = run.text.split(BAR)[-1]
    lines = re.findall(r"^((?:phase|clock) .*?) +([\d.]+) s(?:  (.+))?$", after_source, flags=re.M)
    return [(name, float(seconds), rest) for name, seconds, rest in lines]


def seconds_in_result(r: dict) -> list[tuple[str, float]]:
    """The names and seconds of phases and clocks, named as in the log."""
    phases = [(f"phase {name}", seconds) for name, seconds in r.get("phases", {}).items()]
    return phases + [(f"clock {name}", clock["seconds"]) for name, clock in r["clocks"].items()]


def result_faults(r: dict) -> Iterator[str]:
    """Where a result contradicts itself or passes a limit."""
    nats_a_bit = nats_per_bpb(r)
    if not all(math.isclose(r[f"val_loss{s}"], r[f"val_bpb{s}"] * nats_a_bit, rel_tol=1e-9) for s in STAGES):
        yield "val_loss, val_bpb, tokens and bytes of its RESULT contradict each other"
    if r["mode"] != "train" or r["settings"].get("eval_only_path"):
        yield f"mode {r['mode']}: its model was not trained by it"
    if r["unadapted_tokens"]:
        yield f"{r['unadapted_tokens']} targets were not adapted"
    if r["total_bytes"] != r["code_bytes"] + r["model_bytes"]:
        yield "total_bytes are not code_bytes + model_bytes"
    if r["total_bytes"] > CAP_BYTES:
        yield f"{r['total_bytes']} bytes of {CAP_BYTES}"
    if r.get("cap_bytes", CAP_BYTES) != CAP_BYTES:
        yield f"its cap is {r['cap_bytes']} bytes, the challenge's {CAP_BYTES}"
    for name, clock in r["clocks"].items():
        limit = min(CLOCK_SECONDS, clock["budget"] or CLOCK_SECONDS)  # a budget of 0 is none
        if clock["seconds"] > limit:
            yield f"{name} took {clock['seconds']} s of {limit:g}"
    if not {"training", "scoring"} <= set(r["clocks"]):
        yield "its RESULT lacks a clock"
    for name in r:
        if name.endswith("_sha256") and not re.fullmatch("[0-9a-f]{64}", r[name]):
            yield f"{name} of its RESULT is no SHA-256"
    if has_report(r):
        yield from newer_faults(r)


def newer_faults(r: dict) -> Iterator[str]:
    """Where a result contradicts itself in what older ones lack."""
    lacking = [key for key in NEEDED_NOW if key not in r]
    if lacking:
        yield f"its RESULT lacks {', '.join(lacking)}"
    if r["targets_left_out"] < 0:
        yield f"targets_left_out are {r['targets_left_out']}"
    cut = fineweb_cut(r["tokens"])
    counted = r.get("bytes_at_cut")
    if (cut == 0) != (counted is None):
        yield f"bytes_at_cut are {counted}, of {r['tokens']} tokens"
    elif cut and (counted > r["bytes"] or (counted < r["bytes"] and cut == r["tokens"])):
        yield f"bytes_at_cut are {counted} of {cut} tokens, bytes {r['bytes']} of {r['tokens']}"


def caveat_faults(run: Run) -> Iterator[str]:
    """Caveats that follow from the result and are not in it. Limits that are passed are faults anyway."""
    r = run.result
    gpus, device = r["hardware"].split(" x ", 1)
    if setting(run, "val_doc_fraction", 1.0) < 1:
        yield "VAL_DOC_FRACTION: not all documents were scored"
    preset = setting(run, "preset", "")
    val_loss_every = setting(run, "val_loss_every", 0)
    recompilations = r.get("recompilations", 0)
    unknown = has_report(r) and not has_fineweb_bytes(r["documents"], r["tokens"], r["bytes"],
                                                      r.get("bytes_at_cut"))
    for why, holds in (
            (f"preset {preset}", preset),
            (f"recompilations on the clocks: {recompilations}", recompilations),
            ("unknown validation set", unknown),
            (f"VAL_LOSS_EVERY={val_loss_every}: validation was read during training", val_loss_every),
            ("not on 8 GPUs", int(gpus) != 8 or device.startswith("CPU"))):
        if holds and why not in r["caveats"]:
            yield f"its RESULT lacks the caveat `{why}`"


def phase_faults(run: Run) -> Iterator[str]:
    """Where the seconds of phases, of clocks and of the whole run contradict each other."""
    r = run.result
    phases = r.get("phases", {})
    if not phases:
        return
    # 1) Clocks and their phases.
    clock_of = {name.removeprefix("phase "): clock for name, _, clock in seconds_in_log(run)}
    for name, clock in ON_CLOCK.items():
        if name in phases and clock_of.get(name) != clock:
            yield f"its phase `{name}` is not on the clock `{clock}`"
    for name, budget in (("training", "max_wallclock_seconds"), ("scoring", "eval_max_seconds")):
        seconds = r["clocks"][name]["budget"]
        if setting(run, budget, float(seconds)) != seconds:
            yield f"the clock `{name}` has a budget of {seconds} s, which is not its {budget.upper()}"
    for name, clock in r["clocks"].items():
        total = sum(seconds for phase, seconds in phases.items() if clock_of.get(phase) == name)
        if abs(clock["seconds"] - total) > 0.01:
            yield f"the clock `{name}` has {clock['seconds']} s, its phases {total:.3f}"
    # 2) The whole run and all phases.
    if not has_report(r):
        return
    beyond = r["seconds"] - sum(phases.values())
    if beyond > slack(r["seconds"]):
        yield f"{beyond:.1f} of its {r['seconds']} s belong to no phase"
    if beyond < -slack(r["seconds"]):
        yield f"its phases have {-beyond:.1f} s more than its {r['seconds']} s"


def metrics_faults(run: Run) -> Iterator[str]:
    """Where metrics.jsonl does not have the run's settings, its steps or its result."""
    if not run.rows:
        return
    r = run.result
    kinds = [row.get("kind") for row in run.rows]
    if kinds[0] != "settings" or kinds[-1] != "result" or kinds.count("result") > 1:
        yield "metrics.jsonl beside it has to begin with the settings and end with the only result"
    settings = dict(run.rows[0])
    gpus = int(r["hardware"].split()[0])
    if settings.pop("world_size", gpus) != gpus:
        yield f"metrics.jsonl beside it is not of {gpus} processes, as its RESULT"
    for name, value in settings.items():
        if name not in ("kind", "time") and f" {name}:{value} " not in settings_line(run):
            yield f"{name} {value} in metrics.jsonl is not the one in its line `all settings`"
    steps = [row["step"] for row in run.rows if row.get("kind") == "step"]
    if steps != list(range(1, r["steps"] + 1)):
        yield f"metrics.jsonl beside it has not the {r['steps']} steps of its RESULT, one after the other"


def wall_faults(run: Run) -> Iterator[str]:
    """Where the clocks of the run are slower or faster than the time of day in metrics.jsonl."""
    r = run.result
    if not run.rows or not has_report(r):
        return
    if not all("time" in row for row in run.rows):
        yield "metrics.jsonl beside it has rows without `time`"
        return
    # 1) The whole run. The first row is written during setup.
    phases = r["phases"]
    wall = run.rows[-1]["time"] - run.rows[0]["time"]
    least = wall + phases.get("imports", 0) + phases.get("join", 0)
    most = least + phases.get("setup", 0)
    if not least - slack(r["seconds"]) <= r["seconds"] <= most + slack(r["seconds"]):
        yield (f"the run took {r['seconds']} s by its own clock, {least:.1f} to {most:.1f} by the times in "
               "metrics.jsonl")
    # 2) Training, at each report from the first one on; to read validation stops its clock.
    if setting(run, "val_loss_every", 0):
        return
    reports = step_reports(run)
    for report in reports[1:]:
        wall = report.time - reports[0].time
        least = report.least - reports[0].most
        most = report.most - reports[0].least
        if not least - slack(report.most) <= wall <= most + slack(report.most):
            yield (f"up to step {report.step}, training took {least:.1f} to {most:.1f} s by its own clock, "
                   f"{wall:.1f} by the times in metrics.jsonl")
            return
    # 3) Every phase after the first whose end was written; one begins where the one before has ended.
    ends = [row for row in run.rows if row.get("kind") == "phase"]
    for before, row in zip(ends, ends[1:]):
        wall = row["time"] - before["time"]
        if abs(wall - row["seconds"]) > slack(wall) or round(row["seconds"], 3) != phases[row["name"]]:
            yield (f"phase {row['name']} took {phases[row['name']]} s by its RESULT, {row['seconds']:.3f} by "
                   f"its row in metrics.jsonl, {wall:.1f} by the times there")
            return


class StepReport(NamedTuple):
    """When steps were written to metrics.jsonl."""
    step: int
    time: float
    least: float  # seconds that the training clock showed then, at least
    most: float


def step_reports(run: Run) -> list[StepReport]:
    """The reports of a run. A step has the seconds at its start, and is written with the next report.

    That comes between the end of a step and the start of the next but one. (The seconds of the next are
    taken before the report is written, and that may have to wait for the GPU.)
    """
    steps = [row for row in run.rows if row.get("kind") == "step"]
    every = setting(run, "train_log_every", 1)
    reports = []
    for i, row in enumerate(steps):
        if row["step"] <= 3 or row["step"] % every == 0 or i == len(steps) - 1:
            most = steps[i + 2]["seconds"] if i + 2 < len(steps) else run.result["phases"]["train"]
            reports.append(StepReport(row["step"], row["time"], row["seconds"], most))
    return reports


def has_report(r: dict) -> bool:
    """Whether a result is of a script that knows all fields, and a phase for every second."""
    return "report" in r.get("phases", {})


def slack(seconds: float) -> float:
    """By how much two accounts of so many seconds may differ."""
    return 2 + 0.01 * seconds


def fineweb_cut(targets: int) -> int:
    """How many first targets of a validation set of so many are compared with FineWeb's; 0: it is another."""
    return next((cut for cut in FINEWEB_BYTES if 0 <= targets - cut < SEQUENCE), 0)


def has_fineweb_bytes(documents: int, targets: int, text_bytes: int, at_cut: int | None) -> bool:
    """Whether the bytes of a validation set are those of FineWeb's.

    By a published tokenizer those up to its cut are known; less than one sequence follows, and 4 bytes a
    token, about what English has, bound its text. By another tokenizer, its documents have as many.
    """
    cut = fineweb_cut(targets)
    counted = FINEWEB_BYTES[cut or RAW_CUT]
    known = at_cut == counted if cut else documents == FINEWEB_DOCUMENTS
    return known and 0 <= text_bytes - counted < 4 * SEQUENCE


def check_belongs_with(first: Run, run: Run) -> None:
    """Refused unless two runs share one script, machine, data and settings."""
    theirs, ours = shared_facts(first.result), shared_facts(run.result)
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            a, b = ours.get(name, "the default"), theirs.get(name, "the default")
            raise Refused(f"{run.log}: {name} is {a}, but {b} in {first.log}")


def adapts(r: dict) -> bool:
    """Whether adapters scored any target; a result that does not count targets is taken for one of such."""
    return r.get("unadapted_tokens", 0) != r.get("tokens")


def shared_facts(r: dict) -> dict[str, Any]:
    """What has to be the same in all runs of a submission."""
    facts = {f"setting {name}": value for name, value in r["settings"].items() if name not in OWN_SETTINGS}
    facts |= {name: r[name] for name in SHARED}
    # Older runs lack some of these, and plain text the last.
    sometimes = "train_sha256", "bytes_at_cut", "kernels", "case_ops"
    facts |= {name: r.get(name) for name in sometimes}
    return facts


def nats_per_bpb(r: dict) -> float:
    """Nats a token that are one bit a byte, on the validation set of this result."""
    return r["bytes"] * math.log(2) / r["tokens"]


def key_values(values: dict) -> str:
    return " ".join(f"{name}:{value}" for name, value in values.items()) or "none"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
