#!/usr/bin/env python3
"""Check finished runs, print their scores as a table, and make of them what is submitted to the challenge.

    python tools/submission.py check runs/seed0 runs/seed1 runs/seed2
    python tools/submission.py check runs/seed* --baseline 1.0728,1.0726,1.0747 --write submission.json
    python tools/submission.py table runs/seed*
    python tools/submission.py record 2026-11-21_Name runs/seed* --author Me --github-id me

A run is a folder that train_gpt.py left (its ARTIFACT_DIR), or its log alone. Every command checks the runs
first. If they do not add up, it makes nothing and ends with status 2 and one line that names the first
fault: another script, settings, machine, training or validation set than the other runs'; a seed twice; a
source that is not what the log says it is; a clock or the cap exceeded; documents left out; seconds that are
in no phase or differ from the time of day; a caveat that is missing; a result that differs from the log or
from the files beside it. That finds mistakes; only another run can tell a log that was forged as a whole.
"""
import argparse
import ast
import base64
import datetime
import inspect
import json
import lzma
import math
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command

from finished_runs import (
    CAP_BYTES,
    CLOCK_SECONDS,
    FINEWEB_DOCUMENTS,
    OWN_SETTINGS,
    Refused,
    Run,
    fineweb_cut,
    has_fineweb_bytes,
    has_report,
    load,
    nats_per_bpb,
    read,
    read_object,
    setting,
    sha256,
)

ROOT = Path(__file__).resolve().parents[1]
MARGIN_NATS, SIGNIFICANT = 0.005, 0.01  # a record improves the mean by so much, with a p below that
HOLDS = {True: "yes", False: "**no**", None: "**not established**"}  # whether a rule does
BY_MARGIN = f"p_improves_by_{MARGIN_NATS}_nats"
AUDITED = {  # what an audit has to find for a rule
    "artifact_under_16000000_bytes": ["size"],
    "training_under_600s": ["clocks"],
    "scoring_under_600s": ["clocks"],
    "score_before_update": ["score before update", "causal"],
    "documents_independent": ["documents independent"],
    "every_target_once": ["every target once", "all documents", "headline"],
    "full_distribution": ["full distribution"],
    "validation_read_only_after_export": [],  # whoever scores again cannot see that
}
ASSURING = "size", "no drift", "confined", "as this script"  # rules of which an audit has to be sure as well


# ---- Significance ------------------------------------------------------------------------------------------

def significance(runs: list[Run], bpb: list[float] | None, loss: list[float] | None) -> dict[str, Any]:
    """The p-values against a baseline's scores.

    If only one kind of score is given, these runs' bytes per token give the other.
    """
    if not bpb and not loss:
        return {}
    from error_bars import welch  # which needs scipy: only a baseline asks for it

    nats_a_bit = nats_per_bpb(runs[0].result)
    bpb = bpb or [value / nats_a_bit for value in loss]
    loss = loss or [value * nats_a_bit for value in bpb]
    our_bpb = [run.result["val_bpb"] for run in runs]
    our_loss = [run.result["val_loss"] for run in runs]
    return {"baseline_val_bpb": bpb, "baseline_val_loss": loss,
            "p_improves": welch(our_bpb, bpb)[2],
            BY_MARGIN: welch(our_loss, loss, MARGIN_NATS)[2]}


# ---- submission.json ---------------------------------------------------------------------------------------

def make_submission(runs: list[Run], logs: list[str], described: dict, compared: dict) -> dict[str, Any]:
    """What submission.json holds: the challenge's fields and what they follow from.

    `logs` are the runs' logs as it names them, `described` is what no log can say, `compared` the
    significance.
    """
    results = [run.result for run in runs]
    first = results[0]
    largest = max(results, key=lambda r: r["total_bytes"])
    # 1) Is it a record?
    caveats = list(dict.fromkeys(why for r in results for why in r["caveats"]))
    caveats += [f"audit of seed {run.result['seed']}: FAIL {rule}"
                for run in runs for rule, verdict in run.verdicts.items() if verdict == "FAIL"]
    rules = compliance(runs)
    fit = all(rules.values()) and not caveats
    better = compared.get(BY_MARGIN, 1) < SIGNIFICANT

    # 2) Who and what.
    submission = {name: described.get(name, "") for name in ("author", "github_id", "name")}
    submission["date"] = described["date"]
    submission["track"] = "10min_16mb" if fit else "non-record-16mb"
    submission["record"] = fit and better
    submission["corpus"] = corpus_of(first, described.get("corpus"))

    # 3) Scores.
    losses = [r["val_loss"] for r in results]
    bpbs = [r["val_bpb"] for r in results]
    submission |= {"val_loss": mean(losses), "val_bpb": mean(bpbs),
                   "val_loss_std": deviation(losses), "val_bpb_std": deviation(bpbs)}
    submission["seeds"] = [r["seed"] for r in results]
    submission["seed_results"] = {str(r["seed"]): seed_row(r, log) for r, log in zip(results, logs)}

    # 4) What ran, and what holds.
    submission["artifact_bytes"] = largest["total_bytes"]
    submission["code_bytes"] = largest["code_bytes"]
    submission["model_bytes"] = largest["model_bytes"]
    for name in ("code_sha256", "packed_sha256", "val_sha256", "hardware", "versions"):
        submission[name] = first[name]
    if compared:
        submission["significance"] = compared
    return submission | {"compliance": rules, "caveats": caveats}


def compliance(runs: list[Run]) -> dict[str, bool | None]:
    """The challenge's rules, and whether these runs keep them; None if that is not established."""
    results = [run.result for run in runs]
    first = results[0]
    training_seconds = max(r["clocks"]["training"]["seconds"] for r in results)
    scoring_seconds = max(r["clocks"]["scoring"]["seconds"] for r in results)
    by_logs = {
        "artifact_under_16000000_bytes": max(r["total_bytes"] for r in results) <= CAP_BYTES,
        "training_under_600s": training_seconds <= CLOCK_SECONDS,
        "scoring_under_600s": scoring_seconds <= CLOCK_SECONDS,
        "eight_gpus": first["hardware"].startswith("8 x NVIDIA"),
        "h100": "H100" in first["hardware"],
        "fineweb": is_fineweb(first),
        "three_seeds": len(results) >= 3,
        # no log can show the next four, nor what else than VAL_LOSS_EVERY might read validation early
        "score_before_update": None,
        "documents_independent": None,
        "every_target_once": None,
        "full_distribution": None,
        "validation_read_only_after_export": False if setting(runs[0], "val_loss_every", 0) else None,
    }
    own = [is_own(run) for run in runs]
    return {rule: judged(rule, by_log, runs, own) for rule, by_log in by_logs.items()}


def judged(rule: str, by_logs: bool | None, runs: list[Run], own: list[bool]) -> bool | None:
    """Whether a rule holds, by what logs say of it and by the audits of the runs.

    Where logs say nothing, it has to hold for each run: because that is of this repository's script (`own`),
    which the tests hold to the rules, or because its audit has found so.
    """
    found = [[run.verdicts.get(name) for name in AUDITED.get(rule, [])] for run in runs]
    if by_logs is False or any("FAIL" in verdicts for verdicts in found):
        return False
    if by_logs or rule not in AUDITED:
        return by_logs
    for run, its_own, verdicts in zip(runs, own, found):
        assured = [run.verdicts.get(name) for name in ASSURING]
        audited = bool(verdicts) and set(verdicts + assured) == {"pass"}
        if not (its_own or audited):
            return None
    return True


def is_own(run: Run) -> bool:
    """Whether a run is of this repository's train_gpt.py, as it is or packed, and ships what that packs to.

    The same source may pack to other bytes with another Python: then the packed script beside the log tells.
    """
    own = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    if run.source.startswith('"""') and run.source != own:
        return False
    try:
        own_packed = pack_own_script()[0]
    except Refused:
        return False
    ran_packed = run.source != own
    if sha256(own_packed) == run.result["packed_sha256"]:
        return not ran_packed or unpack(own_packed) == run.source
    minified = unpack(run.packed or b"", own_packed)
    return same_code(minified, unpack(own_packed)) and (not ran_packed or run.source == minified)


def unpack(packed: bytes, like: bytes = b"") -> str:
    """The source in a packed script; nothing if it is not packed as train_gpt.py packs.

    With `like`, a packed script, nothing either if what unpacks and runs that source is not the same in both.
    """
    payload = re.compile(rb'b85decode\("([^"]+)"\)')
    try:
        (text,) = payload.findall(packed)
        if like and packed != like.replace(*payload.findall(like), text):
            return ""
        return lzma.LZMADecompressor().decompress(base64.b85decode(text), 10_000_000).decode()
    except (TypeError, ValueError, lzma.LZMAError):
        return ""


def same_code(source: str, other: str) -> bool:
    """Whether two sources, neither of them empty, differ in nothing but the way that they are written."""
    try:
        return bool(source) and ast.dump(ast.parse(source)) == ast.dump(ast.parse(other))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def seed_row(r: dict, log: str) -> dict[str, Any]:
    """What submission.json holds of one run."""
    names = "val_loss", "val_bpb", "val_bpb_quantized", "val_bpb_unquantized", "steps"
    row = {name: r[name] for name in names}
    row["artifact_bytes"] = r["total_bytes"]
    row["training_seconds"] = r["clocks"]["training"]["seconds"]
    row["scoring_seconds"] = r["clocks"]["scoring"]["seconds"]
    row["seconds"] = r["seconds"]
    row["caveats"] = r["caveats"]
    row["log"] = log
    return row


def corpus_of(r: dict, described: str | None) -> str:
    if is_fineweb(r):
        return "FineWeb"
    corpus = described or f"{r['documents']:,} validation documents"
    is_said = "not FineWeb" in corpus or "unknown validation set" in corpus
    return corpus if is_said else f"{corpus}; unknown validation set"


def is_fineweb(r: dict) -> bool | None:
    """Whether the validation set is FineWeb's, as published: by its documents and its first targets' bytes.

    None of a result by an older script, which might be: it does not count these bytes.
    """
    if r["documents"] != FINEWEB_DOCUMENTS:
        return False
    if not has_report(r):
        return None if fineweb_cut(r["tokens"]) else False
    return has_fineweb_bytes(r["documents"], r["tokens"], r["bytes"], r.get("bytes_at_cut"))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def as_json(submission: dict) -> str:
    return json.dumps(submission, indent=1, ensure_ascii=False) + "\n"


# ---- Table and verdicts ------------------------------------------------------------------------------------

def table(submission: dict) -> str:
    """Markdown table of a submission's scores, seed by seed."""
    seeds = submission["seed_results"]
    rows = ["| seed | val_bpb | val_loss | quantized | unquantized | steps "
            "| training s | scoring s | bytes | log |",
            "|---|---|---|---|---|---|---|---|---|---|"]
    for seed, r in seeds.items():
        rows.append(f"| {seed} | {r['val_bpb']:.5f} | {middle_cells(r)} "
                    f"| {r['artifact_bytes']:,} | [log]({r['log']}) |")
    if submission["val_bpb_std"] is not None:
        names = ("val_loss", "val_bpb_quantized", "val_bpb_unquantized", "steps", "training_seconds",
                 "scoring_seconds")
        means = {name: mean([r[name] for r in seeds.values()]) for name in names}
        rows.append(f"| **mean** | **{submission['val_bpb']:.5f}** | {middle_cells(means)} "
                    f"| at most {submission['artifact_bytes']:,} | |")
        rows.append(f"| std | {submission['val_bpb_std']:.5f} | {submission['val_loss_std']:.5f} "
                    "| | | | | | | |")
    return "\n".join(rows)


def middle_cells(r: dict) -> str:
    """The columns from val_loss to the scoring clock."""
    return (f"{r['val_loss']:.5f} | {r['val_bpb_quantized']:.5f} | {r['val_bpb_unquantized']:.5f} "
            f"| {r['steps']:,.0f} | {r['training_seconds']:.1f} | {r['scoring_seconds']:.1f}")


def verdicts(submission: dict) -> list[str]:
    """What the t-tests say, in words; nothing without a baseline."""
    if "significance" not in submission:
        return []
    compared = submission["significance"]
    their_bpb, their_loss = compared["baseline_val_bpb"], compared["baseline_val_loss"]
    p = compared[BY_MARGIN]
    below = "below" if p < SIGNIFICANT else "not below"
    seeds = f"{len(submission['seeds'])} v {len(their_bpb)} seeds"
    return [f"val_bpb {submission['val_bpb']:.5f} v {mean(their_bpb):.5f} lower at all: "
            f"p = {compared['p_improves']:.3g} (one-sided Welch t-test, {seeds})",
            f"val_loss {submission['val_loss']:.5f} v {mean(their_loss):.5f} lower by {MARGIN_NATS} nats "
            f"or more: p = {p:.3g}, {below} the {SIGNIFICANT} that the challenge asks of a record"]


# ---- The folder of a record --------------------------------------------------------------------------------

README = """\
# {title}

val_bpb **{score}**{spread}, val_loss {loss}, at most {artifact_bytes:,} bytes of code and model,
on {hardware}. {verdict}

`train_gpt.py` trains a small GPT, quantizes and compresses it, reads the artifact back and scores the
validation documents with it, in bits per byte. While it scores, adapters learn from each document: every
token is scored before anything learns from it, and nothing is shared between documents.
`train_gpt_readable.py` is the source that it was packed from, and begins with an overview. Bytes in the
table are those of code and model.

{table}

{verdicts}## Run it again

    pip install -r requirements.txt
    {command}

Data are looked for in `DATA_DIR`, by default `./data`, from the working directory and then beside the script:
shards in `datasets/fineweb10B_sp{vocab_size}/`, the tokenizer in `tokenizers/`. The last line of the log is
`RESULT` with every number above. `EVAL_ONLY_PATH=final_model.int6.ptz` before the same command scores a run's
artifact again. Corpus: {corpus}.

| file | what it is |
|---|---|
| `train_gpt.py` | the script as it runs and is counted, {code_bytes:,} bytes; sha256 `{packed_sha256}` |
| `train_gpt_readable.py` | what it was packed from; only to be read |
| `train_seed*.log` | of every run: settings, versions, source (sha256 `{code_sha256}`), all lines, RESULT |
| `submission.json` | what follows from the logs |
| `requirements.txt` | the versions that ran |
{audits}
## What holds, and what does not

{rules}

Limits, machine and data follow from the logs. No log can show the last five rules. They hold (`true` in
`submission.json`) for a run of the script that its repository's tests hold to them, by its hash; the first
four of them also where an audit of the run's artifact has found so, and that the script scores as the
repository's does. They do not (`false`) if an audit or the
log says so. Else it is not established (`null`) whether they do, and the runs are no record.

Caveats: {caveats}.
"""


def write_record(name: str, runs: list[Run], out: Path, args: argparse.Namespace) -> tuple[Path, dict]:
    """Write the folder out/name; returns its path and what its submission.json holds."""
    # 1) Check the name.
    if not name or Path(name).name != name or name.startswith("."):
        raise Refused(f"{name!r} is no name for a folder")
    target = out / name
    if target.exists():
        raise Refused(f"{target} is there already: remove it or take another name")

    # 2) Make all files.
    first = runs[0]
    packed, source = scripts_of(runs)
    logs = {f"train_seed{run.result['seed']}.log": read(run.log) for run in runs}
    older = read_older(ROOT / "submission.json")
    described = describe(args, older, first.result["val_sha256"]) | {"name": args.title or name}
    compared = significance(runs, args.baseline, args.baseline_loss)
    submission = make_submission(runs, list(logs), described, compared)
    texts = {"train_gpt_readable.py": source,
             "README.md": record_readme(name, submission, runs),
             "requirements.txt": requirements(submission["versions"], first.text),
             "submission.json": as_json(submission)}
    files = {file: as_utf8(text) for file, text in texts.items()}
    audits = {audit_name(run): read(run.log.parent / "audit.json") for run in runs if run.verdicts}

    # 3) Write them.
    write_folder(target, {"train_gpt.py": packed, **files, **logs, **audits})
    return target, submission


def write_folder(target: Path, files: dict[str, bytes]) -> None:
    """Write a folder under another name and rename it, so that it appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for file, content in files.items():
            (part / file).write_bytes(content)
        part.chmod(0o755)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def scripts_of(runs: list[Run]) -> tuple[bytes, str]:
    """(packed, source) of the runs: the bytes that their logs counted, and what these were packed from."""
    log, source, result = runs[0].log, runs[0].source, runs[0].result
    packed = next((run.packed for run in runs if run.packed), None) or pack_own_script()[0]
    if sha256(packed) != result["packed_sha256"]:
        raise Refused(f"{log}: train_gpt_packed.py is not beside it, and train_gpt.py does not pack to "
                      f"the bytes of its packed_sha256, {result['packed_sha256']}")
    if len(packed) != result["code_bytes"]:
        raise Refused(f"{log}: code_bytes are {result['code_bytes']}, but the packed script "
                      f"has {len(packed)}")
    if not source.startswith('"""'):  # minified: it was the packed script that ran
        own_packed, source = pack_own_script()
        if own_packed != packed:
            raise Refused(f"{log}: the packed script ran, and train_gpt.py is not what that was "
                          "packed from")
    return packed, source


def pack_own_script() -> tuple[bytes, str]:
    """(packed, source) of this repository's train_gpt.py, which needs PyTorch to be imported."""
    try:
        sys.path.insert(0, str(ROOT))
        import train_gpt as tg
    except ImportError as error:
        raise Refused(f"train_gpt.py has to be packed and cannot be imported: {error}") from error
    try:
        return tg.pack_script(), read(ROOT / "train_gpt.py").decode()
    except tg.UserError as error:
        raise Refused(str(error)) from error


def audit_name(run: Run) -> str:
    return f"audit_seed{run.result['seed']}.json"


def record_readme(name: str, submission: dict, runs: list[Run]) -> str:
    """README.md of a record's folder."""
    result = runs[0].result
    audits = "".join(f"| `{audit_name(run)}` | what `tools/audit.py` found on this run's artifact |\n"
                     for run in runs if run.verdicts)
    spread = " (one seed)"
    if submission["val_bpb_std"] is not None:
        spread = (f" (mean of {len(submission['seeds'])} seeds, "
                  f"standard deviation {submission['val_bpb_std']:.5f})")
    fit = submission["track"] == "10min_16mb"
    rules = submission["compliance"].items()
    texts = {
        "title": submission["name"] or name,
        "score": f"{submission['val_bpb']:.5f}",
        "spread": spread,
        "loss": f"{submission['val_loss']:.5f}",
        "verdict": "" if fit else "**Not a record run**: the end of this file says why.",
        "table": table(submission),
        "verdicts": "".join(f"{line}.\n\n" for line in verdicts(submission)),
        "command": launch_command(result),
        "vocab_size": result["settings"].get("vocab_size", 8192),
        "audits": audits,
        "rules": "\n".join(f"- {HOLDS[holds]}: {rule}" for rule, holds in rules),
        "caveats": "; ".join(submission["caveats"]) or "none",
    }
    return README.format(**{**submission, **texts})


def launch_command(result: dict) -> str:
    """How to start such a run: the settings that are not the script's defaults, and as many processes."""
    settings = {"seed": result["seed"]}
    settings |= {name: value for name, value in result["settings"].items() if name not in OWN_SETTINGS}
    variables = []
    for name, value in settings.items():
        shown = int(value) if isinstance(value, bool) else value
        variables.append(f"{name.upper()}={shlex.quote(str(shown))}")
    processes = result["hardware"].split()[0]
    line = f"{' '.join(variables)} torchrun --standalone --nproc_per_node={processes} train_gpt.py"
    return " \\\n      ".join(textwrap.wrap(line, 110, break_long_words=False, break_on_hyphens=False))


def requirements(versions: dict[str, str], log: str) -> str:
    """The versions that ran, for pip; builds for the same CUDA come from PyTorch's index."""
    of_cuda = versions.get("cuda", "None")
    cuda = "cpu" if of_cuda == "None" else "cu" + of_cuda.replace(".", "")
    lines = [f"# What the logged runs had, with Python {versions.get('python')} and CUDA {of_cuda}.",
             f"--extra-index-url https://download.pytorch.org/whl/{cuda}"]
    for name, version in versions.items():
        if name not in ("python", "cuda"):
            lines.append(f"{name.replace('_', '-')}=={version.partition('+')[0]}")
    if "attention:flash3_attention" in log and "flash_attn_3" not in versions:
        lines.append("flash-attn-3  # ran from a copy that does not tell its version")
    return "\n".join(lines) + "\n"


# ---- What no log can say -----------------------------------------------------------------------------------

def read_older(path: Path) -> dict[str, Any]:
    """What a submission.json holds, if there is one."""
    return read_object(path) if path.is_file() else {}


def describe(args: argparse.Namespace, older: dict, val_sha256: str) -> dict[str, str]:
    """Author, names, corpus and date: from the options, else from an older submission.json."""
    described = {"date": datetime.date.today().isoformat()}
    described |= {name: older[name] for name in ("author", "github_id", "name") if name in older}
    if older.get("val_sha256") == val_sha256 and "corpus" in older:
        described["corpus"] = older["corpus"]
    given = {"author": args.author, "github_id": args.github_id, "name": args.title, "corpus": args.corpus,
             "date": args.date}
    return described | {name: value for name, value in given.items() if value is not None}


def kept_names(args: argparse.Namespace, submission: dict) -> list[str]:
    """A line about the names that the command did not give, as they could be somebody else's."""
    given = {"author": args.author, "github_id": args.github_id}
    kept = [f"{name} {submission[name]!r}" for name in given if submission[name] and given[name] is None]
    return [f"kept from an older submission.json: {', '.join(kept)}"] if kept else []


# ---- Commands: each returns the lines to print; its docstring is its --help --------------------------------

def check_command(args: argparse.Namespace) -> list[str]:
    """Say whether runs add up; if so, their mean, what t-tests against --baseline say, and the runs' caveats.

    With --write FILE, also write the submission.json of these runs; without it, nothing is written. If FILE
    is there, author, github_id and title that the command does not give are kept from it, and the first two
    are named; the corpus is kept if the validation set is the same, and the date if the runs are.
    """
    # 1) Make the submission.
    runs = load(args.runs)
    file = args.write or Path("submission.json")
    older = read_older(file)
    described = describe(args, older, runs[0].result["val_sha256"])
    compared = significance(runs, args.baseline, args.baseline_loss)
    submission = make_submission(runs, links_from(file.parent, runs), described, compared)
    if args.date is None and older.get("seed_results") == submission["seed_results"]:
        submission["date"] = older.get("date", submission["date"])  # the same submission, made again

    # 2) Write it, and say what it comes to.
    if args.write:
        command.write_whole(file, as_utf8(as_json(submission)))
    std = submission["val_bpb_std"]
    spread = "" if std is None else f" +- {std:.5f}"
    summary = (f"no contradiction, seeds {submission['seeds']}: val_bpb {submission['val_bpb']:.5f}{spread}, "
               f"{submission['artifact_bytes']:,} bytes, track {submission['track']}")
    written = [str(file)] if args.write else []
    return [summary] + remarks(submission) + kept_names(args, submission) + written


def table_command(args: argparse.Namespace) -> list[str]:
    """Print the runs' scores as a table in Markdown, and below it what `check` says of tests and caveats.

    Links to the logs start from the working directory. To have them in a submission.json: `check --write`.
    """
    runs = load(args.runs)
    compared = significance(runs, args.baseline, args.baseline_loss)
    submission = make_submission(runs, links_from(Path(), runs), {"date": ""}, compared)
    return [table(submission)] + remarks(submission)


def record_command(args: argparse.Namespace) -> list[str]:
    """Make a folder to add to a fork of the challenge.

    It holds scripts, logs, README.md, requirements.txt and submission.json. Its train_gpt.py is the packed
    script, byte for byte the one that the logs counted: that beside a log, else what this repository's
    train_gpt.py packs to. An author and a github_id that the command does not give are kept from this
    repository's submission.json, which is said, and so is the corpus if the validation set is the same. The
    folder appears whole or not at all, and none is written over.
    """
    target, submission = write_record(args.name, load(args.runs), args.out, args)
    sizes = [f"{file.stat().st_size:>10,} {file}" for file in sorted(target.iterdir())]
    return sizes + kept_names(args, submission)


def links_from(folder: Path, runs: list[Run]) -> list[str]:
    """The runs' logs as a file in this folder names them."""
    return [Path(os.path.relpath(run.log, folder)).as_posix() for run in runs]


def remarks(submission: dict) -> list[str]:
    """What is said of a submission below its score or its table."""
    lines = verdicts(submission) + [f"caveat: {why}" for why in submission["caveats"]]
    unknown = [rule for rule, holds in submission["compliance"].items() if holds is None]
    if unknown:
        lines.append(f"not established, see docs/submitting.md: {', '.join(unknown)}")
    return lines


def as_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        broken = " ".join(text[:error.end].split()[-1:])
        raise Refused(f"{broken!a}: a name that is not UTF-8 cannot be written: rename it") from error


# ---- The command line --------------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def add_command(name: str, run: Callable, summary: str) -> argparse.ArgumentParser:
        description = inspect.getdoc(run)
        added = commands.add_parser(name, help=summary, description=description, formatter_class=raw)
        added.set_defaults(run=run)
        return added

    check = add_command("check", check_command, "say whether runs add up; --write makes submission.json")
    add_runs(check)
    check.add_argument("--write", type=Path, metavar="FILE", help="submission.json to write (default: none)")
    add_baseline(check)
    add_description(check)

    table_parser = add_command("table", table_command, "print their scores as a table in Markdown")
    add_runs(table_parser)
    add_baseline(table_parser)

    record = add_command("record", record_command, "make a folder to add to a fork of the challenge")
    record.add_argument("name", metavar="NAME", help="name of the folder, by custom DATE_NAME")
    add_runs(record)
    record.add_argument("--out", type=Path, default=Path("records"), metavar="FOLDER",
                        help="folder to put it in (default: records)")
    add_baseline(record)
    add_description(record)
    return parser


def add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log")


def add_baseline(parser: argparse.ArgumentParser) -> None:
    """What the runs are compared with."""
    group = parser.add_argument_group("comparison with a baseline, by Welch's t-test")
    group.add_argument("--baseline", type=numbers, metavar="BPB,...", help="val_bpb of its seeds")
    group.add_argument("--baseline-loss", type=numbers, metavar="LOSS,...",
                       help="val_loss of its seeds (default: from --baseline by these runs' bytes per token)")


def add_description(parser: argparse.ArgumentParser) -> None:
    """What no log can say."""
    group = parser.add_argument_group("what no log can say")
    group.add_argument("--author", help="who submits")
    group.add_argument("--github-id", metavar="ID", help="and as whom on GitHub")
    group.add_argument("--title", help="name of the submission")
    group.add_argument("--corpus", help="what it was trained and scored on, if not FineWeb")
    group.add_argument("--date", type=day, help="of the submission, as 2026-11-21 (default: today)")


def numbers(text: str) -> list[float]:
    values = [float(value) for value in text.split(",")]
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values


def day(text: str) -> str:
    return datetime.date.fromisoformat(text).isoformat()


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        lines = args.run(args)
    except (Refused, OSError) as error:
        return command.report(error)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    command.run(main)
