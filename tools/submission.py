#!/usr/bin/env python3
"""Check that the runs of a submission add up, and make of them submission.json, the README's table and the t-tests.

    python tools/submission.py runs/seed0 runs/seed1 runs/seed2 --table --write submission.json
    python tools/submission.py runs/seed* --baseline 1.0728,1.0726,1.0747 --baseline-loss 2.7710,2.7705,2.7759

A run is a folder that train_gpt.py left (its ARTIFACT_DIR), or its log alone. One line names the first thing that does
not add up: another script, settings, machine, training or validation set than the other runs', a seed twice, a source
that is not what the log says it is, a clock or the cap exceeded, documents left out, a result that differs from the log
or from the files beside it. It finds mistakes; a log that was forged as a whole only a run can tell.

author, github_id and name are kept from the file that is written over, which is said, and corpus if the validation set
is the same.
"""
import argparse
import datetime
import hashlib
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

CAP_BYTES, CLOCK_SECONDS = 16_000_000, 600  # the challenge's
MARGIN_NATS, SIGNIFICANT = 0.005, 0.01  # a record improves the mean by so much, with a p below that
FINEWEB_DOCUMENTS, FINEWEB_BYTES = 50_000, 151_078_222  # of its validation, as published, where the tail is cut
BY_MARGIN = f"p_improves_by_{MARGIN_NATS}_nats"
BAR = "=" * 100 + "\n"
OWN_SETTINGS = "seed run_id artifact_dir data_dir save_scores train_log_every".split()  # each run may have its own
SHARED = """code_sha256 packed_sha256 code_bytes hardware versions tokenizer_sha256 val_sha256 documents tokens
    bytes""".split()
STAGES = "", "_quantized", "_unquantized"
NEEDED = SHARED + """seed settings mode steps model_bytes total_bytes unadapted_tokens clocks seconds caveats""".split()
NEEDED += [f"val_{unit}{stage}" for unit in ("loss", "bpb") for stage in STAGES]


class Refused(Exception):
    """Runs that do not add up, or cannot be read. Its text is one line that says which file and why."""


class Run(NamedTuple):
    log: Path
    text: str  # of the log
    source: str  # of the script, from the log
    result: dict
    packed: bytes | None  # the packed script if it is beside the log


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error


def parse(path: Path, text: str | bytes) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise Refused(f"{path}: not the result of a run ({error})") from error


def read_run(path: Path) -> Run:
    """A finished run of which every file says the same."""
    log = path / "log.txt" if path.is_dir() else path
    text = read(log).decode(errors="replace")
    _, *rest = text.split(BAR)
    last = text.rstrip("\n").rsplit("\n", 1)[-1]
    if len(rest) < 2 or not last.startswith("RESULT "):
        raise Refused(f"{log}: not the log of a finished run, which holds its source and ends with a RESULT line")
    source, result = rest[0][:-1], parse(log, last.removeprefix("RESULT "))
    if path.is_dir():
        copies = {path / "result.json": parse(path / "result.json", read(path / "result.json"))}
        if (metrics := path / "metrics.jsonl").exists():
            copies[metrics] = parse(metrics, read(metrics).decode(errors="replace").rstrip("\n").rsplit("\n", 1)[-1])
            copies[metrics].pop("kind", None)
        for file, copy in copies.items():
            if other := [key for key in {**result, **copy} if result.get(key) != copy.get(key)]:
                raise Refused(f"{file}: {', '.join(other)} not as in the RESULT line of {log}")
    if lacking := [key for key in NEEDED if key not in result]:
        raise Refused(f"{log}: its RESULT lacks {', '.join(lacking)}: not a run that trained, or one of another script")
    packed, model = (read(path / name) if path.is_dir() and (path / name).exists() else None
                     for name in ("train_gpt_packed.py", "final_model.int6.ptz"))
    run = Run(log, text, source, result, packed)
    try:
        check(run, model)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise Refused(f"{log}: its RESULT holds values of another kind than a run's ({error!r:.120})") from error
    return run


def lines_of(r: dict) -> tuple[list[str], list[str]]:
    """What the log has to hold, before its source and after it, if its RESULT is true."""
    gpus, device = r["hardware"].split(" x ", 1)
    listed = lambda values: " ".join(f"{name}:{value}" for name, value in values.items()) or "none"
    before = [f"versions: {listed(r['versions'])}\n", f"settings other than the record's: {listed(r['settings'])}\n",
              f"device:{device} world_size:{int(gpus)} "]
    after = [f"train: steps:{r['steps']:d} tokens:",
             f"bytes: code:{r['code_bytes']:d} model:{r['model_bytes']:d} total:{r['total_bytes']:d} cap:",
             f"validation: documents:{r['documents']:d} tokens:{r['tokens']:d} bytes:{r['bytes']:d} ",
             f"caveats: {'; '.join(list(r['caveats'])) or 'none'}\n"]
    after += [f"{name} val_loss:{r[f'val_loss{stage}']:.8f} val_bpb:{r[f'val_bpb{stage}']:.8f}\n"
              for name, stage in (("final", ""), ("quantized", "_quantized"), ("unquantized", "_unquantized"))]
    return before, after + [f"clock {name:20}{clock['seconds']:9.1f} s" for name, clock in r["clocks"].items()]


def check(run: Run, model: bytes | None) -> None:
    """Refuse a run whose numbers do not follow from each other, or that the challenge's limits exclude."""
    log, r, sha256 = run.log, run.result, lambda data: hashlib.sha256(data).hexdigest()
    nats = r["bytes"] * math.log(2) / r["tokens"]  # of a token, per bit of a byte
    head, *_, tail = run.text.split(BAR)
    parts = zip((f"\n{head}", f"\n{tail}"), lines_of(r))
    for wrong, why in (
        (sha256(run.source.encode()) != r["code_sha256"], "the source in it has not the code_sha256 of its RESULT"),
        (run.packed is not None and sha256(run.packed) != r["packed_sha256"],
         "train_gpt_packed.py beside it has not the packed_sha256 of its RESULT"),
        (model is not None and len(model) != r["model_bytes"], f"final_model.int6.ptz beside it has {len(model or b'')} "
                                                               f"bytes, its RESULT says {r['model_bytes']}"),
        (model is not None and "model_sha256" in r and sha256(model) != r["model_sha256"],
         "final_model.int6.ptz beside it has not the model_sha256 of its RESULT"),
        *((f"\n{line}" not in part, f"it has no line `{line.strip()}`, as its RESULT has it")
          for part, lines in parts for line in lines),
        (not re.search(rf"^all settings: .*\bseed:{r['seed']:d} ", head, flags=re.M), f"seed {r['seed']} is not its own"),
        (not all(math.isclose(r[f"val_loss{s}"], r[f"val_bpb{s}"] * nats, rel_tol=1e-9) for s in STAGES),
         "val_loss, val_bpb, tokens and bytes of its RESULT contradict each other"),
        (r["mode"] != "train", f"mode {r['mode']}: its model was not trained by it"),
        (r["settings"].get("val_doc_fraction", 1) < 1, "VAL_DOC_FRACTION: not all documents were scored"),
        (r["unadapted_tokens"], f"{r['unadapted_tokens']} targets were not adapted"),
        (r["total_bytes"] != r["code_bytes"] + r["model_bytes"], "total_bytes are not code_bytes + model_bytes"),
        (r["total_bytes"] > CAP_BYTES, f"{r['total_bytes']} bytes of {CAP_BYTES}"),
        *((clock["seconds"] > (limit := min(CLOCK_SECONDS, clock["budget"] or CLOCK_SECONDS)),
           f"{name} took {clock['seconds']} s of {limit:g}") for name, clock in r["clocks"].items()),
        (not {"training", "scoring"} <= set(r["clocks"]), "its RESULT lacks a clock"),
    ):
        if wrong:
            raise Refused(f"{log}: {why}")


def load(paths: list[Path]) -> list[Run]:
    """The runs by seed; Refused if one does not add up, or not with the others."""
    first, *others = runs = [read_run(path) for path in paths]
    shared = lambda run: {**{f"setting {name}": value for name, value in run.result["settings"].items()
                             if name not in OWN_SETTINGS}, **{name: run.result.get(name) for name in (*SHARED, "train_sha256")}}  # older runs lack the last
    for run in others:
        ours, theirs = shared(run), shared(first)
        for name in {**theirs, **ours}:
            if ours.get(name) != theirs.get(name):
                a, b = ours.get(name, "the default"), theirs.get(name, "the default")
                raise Refused(f"{run.log}: {name} is {a}, but {b} in {first.log}")
    by_seed: dict[int, Run] = {}
    for run in runs:
        seed = run.result["seed"]
        if seed in by_seed:
            raise Refused(f"{run.log}: seed {seed} is that of {by_seed[seed].log}, too")
        by_seed[seed] = run
    return [by_seed[seed] for seed in sorted(by_seed)]


# ---- The tests -------------------------------------------------------------------------------------------------------

def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), regularized, from its continued fraction (Lentz), which converges fast on this side of its mean."""
    if x <= 0:
        return 0.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 1000):
        for term in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                     -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            c, d = 1 + term / c, 1 / (1 + term * d)
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) * total / a


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t distribution."""
    half = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return half if t > 0 else 1 - half


def welch(new: list[float], old: list[float], margin: float = 0.0) -> tuple[float, float, float]:
    """(t, degrees of freedom, p): one-sided, against `the mean of new is not below that of old by more than margin`."""
    if min(len(new), len(old)) < 2:
        raise Refused(f"a t-test needs two seeds or more on each side: {len(new)} v {len(old)}")
    a, b = (statistics.variance(values) / len(values) for values in (new, old))
    if not a + b:
        raise Refused("a t-test needs scores that vary, and neither side's do")
    t = (statistics.fmean(old) - statistics.fmean(new) - margin) / math.sqrt(a + b)
    df = (a + b) ** 2 / (a**2 / (len(new) - 1) + b**2 / (len(old) - 1))
    return t, df, t_tail(t, df)


def significance(runs: list[Run], bpb: list[float] | None, loss: list[float] | None) -> dict:
    """The p-values against a baseline's scores; if only one kind is given, the other by these runs' bytes per token."""
    if not bpb and not loss:
        return {}
    r = runs[0].result
    nats = r["bytes"] * math.log(2) / r["tokens"]
    bpb, loss = bpb or [value / nats for value in loss], loss or [value * nats for value in bpb]
    ours = {unit: [run.result[f"val_{unit}"] for run in runs] for unit in ("loss", "bpb")}
    return {"baseline_val_bpb": bpb, "baseline_val_loss": loss, "p_improves": welch(ours["bpb"], bpb)[2],
            BY_MARGIN: welch(ours["loss"], loss, MARGIN_NATS)[2]}


# ---- What is written -------------------------------------------------------------------------------------------------

def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def submission(runs: list[Run], logs: list[str], about: dict, tests: dict) -> dict:
    """submission.json: the challenge's fields and what they follow from; `logs` are the runs' logs as it names them."""
    results = [run.result for run in runs]
    r, largest = results[0], max(results, key=lambda r: r["total_bytes"])
    caveats = list(dict.fromkeys(why for r in results for why in r["caveats"]))
    fineweb = r["documents"] == FINEWEB_DOCUMENTS and abs(r["bytes"] / FINEWEB_BYTES - 1) < 1e-3
    seconds = {clock: max(r["clocks"][clock]["seconds"] for r in results) for clock in ("training", "scoring")}
    compliance = {
        "artifact_under_16000000_bytes": largest["total_bytes"] <= CAP_BYTES,
        "training_under_600s": seconds["training"] <= CLOCK_SECONDS,
        "scoring_under_600s": seconds["scoring"] <= CLOCK_SECONDS,
        "eight_gpus": r["hardware"].startswith("8 x NVIDIA"),
        "h100": "H100" in r["hardware"],
        "fineweb": fineweb,
        "three_seeds": len(runs) >= 3,
        "score_before_update": True,  # this one and the next three: tests/test_legality.py holds the script to them
        "documents_independent": True,
        "every_target_once": True,
        "full_distribution": True,
        "validation_read_only_after_export": not r["settings"].get("val_loss_every", 0),
    }
    fit = all(compliance.values()) and not caveats
    corpus = about.get("corpus") or f"{r['documents']:,} validation documents"
    values = {name: [r[name] for r in results] for name in ("val_loss", "val_bpb")}
    return {
        "author": about.get("author", ""), "github_id": about.get("github_id", ""), "name": about.get("name", ""),
        "date": about["date"], "track": "10min_16mb" if fit else "non-record-16mb",
        "record": fit and tests.get(BY_MARGIN, 1) < SIGNIFICANT,
        "corpus": "FineWeb" if fineweb else corpus if "not FineWeb" in corpus else f"{corpus}; not FineWeb",
        "val_loss": mean(values["val_loss"]), "val_bpb": mean(values["val_bpb"]),
        "val_loss_std": deviation(values["val_loss"]), "val_bpb_std": deviation(values["val_bpb"]),
        "seeds": [r["seed"] for r in results],
        "seed_results": {str(r["seed"]): {
            **{name: r[name] for name in ("val_loss", "val_bpb", "val_bpb_quantized", "val_bpb_unquantized", "steps")},
            "artifact_bytes": r["total_bytes"], "training_seconds": r["clocks"]["training"]["seconds"],
            "scoring_seconds": r["clocks"]["scoring"]["seconds"], "seconds": r["seconds"], "caveats": r["caveats"],
            "log": log} for r, log in zip(results, logs)},
        "artifact_bytes": largest["total_bytes"], "code_bytes": largest["code_bytes"],
        "model_bytes": largest["model_bytes"], "code_sha256": r["code_sha256"], "packed_sha256": r["packed_sha256"],
        "val_sha256": r["val_sha256"], "hardware": r["hardware"], "versions": r["versions"],
        **({"significance": tests} if tests else {}), "compliance": compliance, "caveats": caveats,
    }


def table(made: dict) -> str:
    """Markdown of a submission's scores, seed by seed."""
    rows = ["| seed | val_bpb | val_loss | quantized | unquantized | steps | training s | scoring s | bytes | log |",
            "|---|---|---|---|---|---|---|---|---|---|"]
    for seed, r in made["seed_results"].items():
        rows.append(f"| {seed} | {r['val_bpb']:.5f} | {r['val_loss']:.5f} | {r['val_bpb_quantized']:.5f} | "
                    f"{r['val_bpb_unquantized']:.5f} | {r['steps']:,} | {r['training_seconds']:.1f} | "
                    f"{r['scoring_seconds']:.1f} | {r['artifact_bytes']:,} | [log]({r['log']}) |")
    if made["val_bpb_std"] is not None:
        of = lambda name: mean([r[name] for r in made["seed_results"].values()])
        rows.append(f"| **mean** | **{made['val_bpb']:.5f}** | {made['val_loss']:.5f} | "
                    f"{of('val_bpb_quantized'):.5f} | {of('val_bpb_unquantized'):.5f} | {of('steps'):,.0f} | "
                    f"{of('training_seconds'):.1f} | {of('scoring_seconds'):.1f} | "
                    f"at most {made['artifact_bytes']:,} | |")
        rows.append(f"| std | {made['val_bpb_std']:.5f} | {made['val_loss_std']:.5f} | | | | | | | |")
    return "\n".join(rows)


def verdicts(made: dict) -> list[str]:
    """What the t-tests say, in words."""
    if not (tests := made.get("significance")):
        return []
    p, old_bpb, old_loss = (tests[name] for name in (BY_MARGIN, "baseline_val_bpb", "baseline_val_loss"))
    return [f"val_bpb {made['val_bpb']:.5f} v {mean(old_bpb):.5f} lower at all: p = {tests['p_improves']:.3g} "
            f"(one-sided Welch t-test, {len(made['seeds'])} v {len(old_bpb)} seeds)",
            f"val_loss {made['val_loss']:.5f} v {mean(old_loss):.5f} lower by {MARGIN_NATS} nats or more: p = {p:.3g}, "
            f"{'' if p < SIGNIFICANT else 'not '}below the {SIGNIFICANT} that the challenge asks of a record"]


# ---- The command line ------------------------------------------------------------------------------------------------

def numbers(text: str) -> list[float]:
    values = [float(value) for value in text.split(",")]
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this tool and make_record.py ask alike."""
    parser.add_argument("log", nargs="+", type=Path, help="folder of a run, or its log")
    parser.add_argument("--baseline", type=numbers, metavar="BPB,...", help="val_bpb of the seeds to compare with")
    parser.add_argument("--baseline-loss", type=numbers, metavar="LOSS,...",
                        help="their val_loss; default: from --baseline by these runs' bytes per token")
    for name, what in (("author", "who submits"), ("github-id", "and as whom"), ("title", "name of the submission"),
                       ("corpus", "what it was trained and scored on, if not FineWeb"), ("date", "default: today")):
        parser.add_argument(f"--{name}", help=what, type=day if name == "date" else str)


def day(text: str) -> str:
    return datetime.date.fromisoformat(text).isoformat()


def about(args: argparse.Namespace, old: Path, val_sha256: str) -> dict:
    """What no log can say: from the options, else from the submission.json there was."""
    kept = parse(old, read(old)) if old.is_file() else {}
    kept = {name: kept[name] for name in ("author", "github_id", "name") if name in kept} | (
        {"corpus": kept["corpus"]} if kept.get("val_sha256") == val_sha256 and "corpus" in kept else {})
    given = dict(author=args.author, github_id=args.github_id, name=args.title, corpus=args.corpus, date=args.date)
    return {"date": datetime.date.today().isoformat(), **kept, **{k: v for k, v in given.items() if v is not None}}


def signed(args: argparse.Namespace, made: dict) -> list[str]:
    """A line about the names that the command did not give."""
    kept = [f"{name} {made[name]!r}" for name in ("author", "github_id") if made[name] and getattr(args, name) is None]
    return [f"kept from an older submission.json: {', '.join(kept)}"] if kept else []


def write(path: Path, text: str) -> None:
    """All of a file or nothing."""
    if path.is_dir():
        raise Refused(f"cannot write {path}: it is a folder")
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def said(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def as_json(made: dict) -> str:
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--write", type=Path, metavar="FILE", help="submission.json to write")
    parser.add_argument("--table", action="store_true", help="print the README's table")
    args = parser.parse_args(argv)
    try:
        runs, out = load(args.log), args.write or Path("submission.json")
        logs = [Path(os.path.relpath(run.log, out.parent)).as_posix() for run in runs]
        made = submission(runs, logs, about(args, out, runs[0].result["val_sha256"]),
                          significance(runs, args.baseline, args.baseline_loss))
        old = parse(out, read(out)) if out.is_file() else {}
        if args.date is None and old.get("seed_results") == made["seed_results"]:  # the same submission, made again
            made["date"] = old.get("date", made["date"])
        if args.write:
            write(out, as_json(made))
    except (Refused, OSError) as error:
        print(f"error: {said(error)}", file=sys.stderr)
        return 2
    spread = "" if made["val_bpb_std"] is None else f" +- {made['val_bpb_std']:.5f}"
    print(table(made) if args.table else
          f"no contradiction, seeds {made['seeds']}: val_bpb {made['val_bpb']:.5f}{spread}, "
          f"{made['artifact_bytes']:,} bytes, track {made['track']}")
    for line in verdicts(made) + [f"caveat: {why}" for why in made["caveats"]] + signed(args, made):
        print(line)
    if args.write:
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
