"""Read finished runs of train_gpt.py and check that they add up. Other tools import this module.

A run is a folder that train_gpt.py left (its ARTIFACT_DIR), or its log alone. A run that does not add up is
Refused with one line that names the first fault. That finds mistakes; only another run can tell a log that
was forged as a whole.
"""
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CAP_BYTES, CLOCK_SECONDS = 16_000_000, 600  # the challenge's
BAR = "=" * 100 + "\n"  # before and after the source in a log
OWN_SETTINGS = "seed run_id artifact_dir data_dir save_scores train_log_every".split()  # may differ
STAGES = "", "_quantized", "_unquantized"  # ends of the names of scores; the first is the headline's
SHARED = """code_sha256 packed_sha256 code_bytes hardware versions tokenizer_sha256 val_sha256
    documents tokens bytes""".split()  # what is the same in all runs of a submission
NEEDED = SHARED + """seed settings mode steps model_bytes total_bytes unadapted_tokens clocks seconds
    caveats""".split()
NEEDED += [f"val_{unit}{stage}" for unit in ("loss", "bpb") for stage in STAGES]


class Refused(Exception):
    """Runs that do not add up, or cannot be read. Its text is one line that says which file and why."""


class Run(NamedTuple):
    """A finished run."""
    log: Path
    text: str  # of the log
    source: str  # of the script, from the log
    result: dict[str, Any]  # what the RESULT line holds
    packed: bytes | None  # the packed script, if it is beside the log


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
    copies = result_copies(folder) if folder else {}
    for file, copy in copies.items():
        other = [key for key in {**result, **copy} if result.get(key) != copy.get(key)]
        if other:
            raise Refused(f"{file}: {', '.join(other)} not as in the RESULT line of {log}")
    lacking = [key for key in NEEDED if key not in result]
    if lacking:
        raise Refused(f"{log}: its RESULT lacks {', '.join(lacking)}: not a run that trained, "
                      "or one of another script")

    # 3) Check that it fits the log, the scripts, the artifact and itself.
    run = Run(log, text, source, result, read_if_there(folder, "train_gpt_packed.py"))
    artifact = read_if_there(folder, "final_model.int6.ptz")
    try:
        check_adds_up(run, artifact)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise Refused(f"{log}: its RESULT holds values of another kind than a run's "
                      f"({error!r:.120})") from error
    return run


def result_copies(folder: Path) -> dict[Path, dict]:
    """What result.json holds, and the last row of metrics.jsonl if there is one."""
    file = folder / "result.json"
    copies = {file: parse_object(file, read(file))}
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        last_row = read(metrics).decode(errors="replace").rstrip("\n").rsplit("\n", 1)[-1]
        copies[metrics] = parse_object(metrics, last_row)
        copies[metrics].pop("kind", None)
    return copies


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error


def read_if_there(folder: Path | None, name: str) -> bytes | None:
    return read(folder / name) if folder and (folder / name).exists() else None


def parse_object(path: Path, text: str | bytes) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise Refused(f"{path}: not the result of a run ({error})") from error


# ---- Checks ------------------------------------------------------------------------------------------------

def check_adds_up(run: Run, artifact: bytes | None) -> None:
    """Refused if the run's numbers do not follow from each other, or the challenge's limits exclude it."""
    faults = itertools.chain(file_faults(run, artifact), log_faults(run), result_faults(run.result))
    first = next(faults, None)
    if first:
        raise Refused(f"{run.log}: {first}")


def file_faults(run: Run, artifact: bytes | None) -> Iterator[str]:
    """Where scripts and artifact are not those that the result is of."""
    r = run.result
    if sha256(run.source.encode()) != r["code_sha256"]:
        yield "the source in it does not have the code_sha256 of its RESULT"
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
    seed = run.result["seed"]
    head, *_, tail = run.text.split(BAR)
    expected = [(head, line) for line in lines_before_source(run.result)]
    expected += [(tail, line) for line in lines_after_source(run.result)]
    for part, line in expected:
        if not (part.startswith(line) or f"\n{line}" in part):
            yield f"it has no line `{line.strip()}`, as its RESULT has it"
    if not re.search(rf"^all settings: .*\bseed:{seed:d} ", head, flags=re.M):
        yield f"seed {seed} of its RESULT is not the one in its line `all settings`"


def lines_before_source(r: dict) -> list[str]:
    """Lines, or beginnings of lines, that a log with this result has before the source."""
    gpus, device = r["hardware"].split(" x ", 1)
    return [f"versions: {key_values(r['versions'])}\n",
            f"settings other than the record's: {key_values(r['settings'])}\n",
            f"device:{device} world_size:{int(gpus)} "]


def lines_after_source(r: dict) -> list[str]:
    """Lines, or beginnings of lines, that a log with this result has after the source."""
    lines = [f"train: steps:{r['steps']:d} tokens:",
             f"bytes: code:{r['code_bytes']:d} model:{r['model_bytes']:d} total:{r['total_bytes']:d} cap:",
             f"validation: documents:{r['documents']:d} tokens:{r['tokens']:d} bytes:{r['bytes']:d} ",
             f"caveats: {'; '.join(r['caveats']) or 'none'}\n"]
    for name, stage in (("final", ""), ("quantized", "_quantized"), ("unquantized", "_unquantized")):
        loss, bpb = r[f"val_loss{stage}"], r[f"val_bpb{stage}"]
        lines.append(f"{name} val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n")
    for name, clock in r["clocks"].items():
        lines.append(f"clock {name:20}{clock['seconds']:9.1f} s")
    return lines


def result_faults(r: dict) -> Iterator[str]:
    """Where a result contradicts itself or passes a limit."""
    nats_a_bit = nats_per_bpb(r)
    if not all(math.isclose(r[f"val_loss{s}"], r[f"val_bpb{s}"] * nats_a_bit, rel_tol=1e-9) for s in STAGES):
        yield "val_loss, val_bpb, tokens and bytes of its RESULT contradict each other"
    if r["mode"] != "train" or r["settings"].get("eval_only_path"):
        yield f"mode {r['mode']}: its model was not trained by it"
    if r["settings"].get("val_doc_fraction", 1) < 1:
        yield "VAL_DOC_FRACTION: not all documents were scored"
    if r["unadapted_tokens"]:
        yield f"{r['unadapted_tokens']} targets were not adapted"
    if r["total_bytes"] != r["code_bytes"] + r["model_bytes"]:
        yield "total_bytes are not code_bytes + model_bytes"
    if r["total_bytes"] > CAP_BYTES:
        yield f"{r['total_bytes']} bytes of {CAP_BYTES}"
    for name, clock in r["clocks"].items():
        limit = min(CLOCK_SECONDS, clock["budget"] or CLOCK_SECONDS)  # a budget of 0 is none
        if clock["seconds"] > limit:
            yield f"{name} took {clock['seconds']} s of {limit:g}"
    if not {"training", "scoring"} <= set(r["clocks"]):
        yield "its RESULT lacks a clock"


def check_belongs_with(first: Run, run: Run) -> None:
    """Refused if two runs are not of one script, machine, data and settings."""
    theirs, ours = shared_facts(first.result), shared_facts(run.result)
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            a, b = ours.get(name, "the default"), theirs.get(name, "the default")
            raise Refused(f"{run.log}: {name} is {a}, but {b} in {first.log}")


def shared_facts(r: dict) -> dict[str, Any]:
    """What has to be the same in all runs of a submission."""
    facts = {f"setting {name}": value for name, value in r["settings"].items() if name not in OWN_SETTINGS}
    facts |= {name: r[name] for name in SHARED}
    facts["train_sha256"] = r.get("train_sha256")  # older runs lack it
    return facts


def nats_per_bpb(r: dict) -> float:
    """Nats a token that are one bit a byte, on the validation set of this result."""
    return r["bytes"] * math.log(2) / r["tokens"]


def key_values(values: dict) -> str:
    return " ".join(f"{name}:{value}" for name, value in values.items()) or "none"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
