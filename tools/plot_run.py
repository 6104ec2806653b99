#!/usr/bin/env python3
"""Draw runs: loss, learning rate, speed and bits per byte of one or several, from their metrics.jsonl.

    python tools/plot_run.py runs/a runs/b/metrics.jsonl -o runs.png

A run is a folder that train_gpt.py left (its ARTIFACT_DIR) or a metrics.jsonl from one. What a run that was
killed left of its last line is left out, and so are rows of kinds that this does not draw.
"""
import argparse
import io
import itertools
import math
import pathlib
from collections import Counter

import command

import finished_runs

BPB = {"val_bpb_unquantized": "unquantized", "val_bpb_quantized": "quantized", "val_bpb": "adapted"}
NUMBERS = {  # that rows must have, by their kind
    "settings": ("train_batch_tokens",), "step": ("step", "loss", "seconds", "lr", "looped"),
    "validation": ("step", "val_loss"), "phase": (), "result": ()}


def read_run(path: pathlib.Path) -> dict:
    """{"name", "settings", "steps", "validations", "result"} of a run; an unfinished one has no result."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    rows = read_rows(file)
    in_folder_of_run = path.is_dir() or file.name == "metrics.jsonl"
    run = {"name": file.absolute().parent.name if in_folder_of_run else file.stem,
           "settings": (rows["settings"] or [{}])[0],
           "steps": rows["step"],
           "validations": rows["validation"],
           "result": rows["result"][-1] if rows["result"] else None}
    if not run["steps"] and not run["result"]:
        raise SystemExit(command.report(f"{file} has neither steps nor a result"))
    return run


def read_rows(file: pathlib.Path) -> dict[str, list[dict]]:
    """The rows of every kind that is drawn."""
    rows = {kind: [] for kind in NUMBERS}
    others = Counter()
    try:
        for number, row in enumerate(finished_runs.read_rows(file, unfinished=True), 1):
            check_row(row, f"{file}, line {number}")
            rows.get(row["kind"], []).append(row)
            others[row["kind"]] += row["kind"] not in rows
    except finished_runs.Refused as error:
        raise SystemExit(command.report(error)) from error
    for kind, count in (+others).items():
        command.note(f"{file}: rows of kind {kind} are left out: {count}")
    return rows


def check_row(row: dict, where: str) -> None:
    """Refused if a row has no kind, or of a kind that is drawn lacks a number."""
    try:
        for name in NUMBERS.get(row["kind"], ()):
            math.isfinite(row[name])  # TypeError if it is no number
        math.isfinite(row.get("tokens", 0))
    except (KeyError, TypeError, OverflowError) as error:
        raise finished_runs.Refused(f"{where}: no row of a run's metrics ({error!r:.120})") from error


def scores_of(run: dict) -> dict[str, float]:
    """The scores that the result of a run has, by what they are of."""
    result = run["result"]
    adapts = finished_runs.adapts(result)
    return {label: result[key] for key, label in BPB.items()
            if isinstance(result.get(key), int | float) and (adapts or label != "adapted")}


def speeds(run: dict) -> tuple[list[int], list[float]]:
    """(steps, tokens a second between each and the next), smoothed over 1/50 of the run."""
    rows = run["steps"]
    of_all = run["settings"].get("train_batch_tokens", 0)  # in earlier runs steps were alike
    done = [0, *itertools.accumulate(row.get("tokens", of_all) for row in rows)]
    width = max(1, len(rows) // 50)
    steps, tokens_per_second = [], []
    for n, (before, after) in enumerate(zip(rows, rows[width:])):
        seconds = after["seconds"] - before["seconds"]  # at which either is launched
        if seconds > 0:
            steps.append(after["step"])
            tokens_per_second.append((done[n + width] - done[n]) / seconds)
    return steps, tokens_per_second


def label(run: dict) -> str:
    """A run's name for a legend, which takes dollars for mathematics and hides names that begin with _."""
    name = command.one_line(run["name"]).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def draw(runs: list[dict], out: pathlib.Path) -> None:
    """Draw all runs into one picture of four parts."""
    with command.imports("requirements-dev.txt"):
        import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((loss, rate), (speed, bpb)) = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    colors = plt.cm.tab10.colors * len(runs)
    for color, run in zip(colors, runs):
        draw_training(run, color, loss, rate, speed)
    loss.set(title="train loss (dots: validation; dotted line: loops begin)", xlabel="step",
             ylabel="nats a token")
    losses = sorted(row["loss"] for run in runs for row in run["steps"] if math.isfinite(row["loss"]))
    if losses:
        loss.set_ylim(losses[0] - 0.1, losses[int(0.98 * (len(losses) - 1))] + 0.3)
        loss.legend()
    rate.set(title="learning rate", xlabel="step", ylabel="of its peak", ylim=(0, 1.05))
    speed.set(title="speed", xlabel="step", ylabel="tokens a second", ylim=(0, None))
    draw_scores([run for run in runs if run["result"]], bpb)
    save(figure, out)


def draw_training(run: dict, color, loss, rate, speed) -> None:
    """Draw the steps of a run into three axes."""
    rows = run["steps"]
    steps = [row["step"] for row in rows]
    loss.plot(steps, [row["loss"] for row in rows], color=color, linewidth=0.8, label=label(run))
    validations = run["validations"]
    if validations:
        loss.plot([row["step"] for row in validations], [row["val_loss"] for row in validations], "o",
                  color=color)
    rate.plot(steps, [row["lr"] for row in rows], color=color)
    speed.plot(*speeds(run), color=color)
    loops_begin = next((row["step"] for row in rows if row["looped"]), None)
    if loops_begin and loops_begin > 1:
        for axis in (loss, speed):
            axis.axvline(loops_begin, color=color, linestyle=":", linewidth=0.8)


def draw_scores(runs: list[dict], bpb) -> None:
    """Draw the scores of finished runs side by side."""
    for i, run in enumerate(runs):
        scores = scores_of(run)
        width = 0.8 / len(runs)
        places = [place + i * 0.8 / len(runs) for place in range(len(scores))]
        bars = bpb.bar(places, list(scores.values()), width=width, label=label(run))
        bpb.bar_label(bars, fmt="%.4f", fontsize=8)
        middles = [place + 0.4 - 0.4 / len(runs) for place in range(len(scores))]
        bpb.set_xticks(middles, list(scores))
    every_score = [score for run in runs for score in scores_of(run).values()]
    if every_score:
        margin = 0.4 * (max(every_score) - min(every_score)) + 0.002
        bpb.set_ylim(min(every_score) - margin, max(every_score) + margin)
    bpb.set(title="validation", ylabel="bits per byte (axis does not begin at 0)")


def save(figure, out: pathlib.Path) -> None:
    """Write a picture, whole or not at all; what cannot be written ends in one line."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=110, format=out.suffix[1:] or "png")
        command.write_whole(out, picture.getvalue())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SystemExit(command.report(f"cannot write {out}: {reason}")) from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=pathlib.Path, help="folder of a run, or its metrics.jsonl")
    parser.add_argument("-o", "--out", type=pathlib.Path, default=pathlib.Path("run.png"),
                        help="PNG to write (run.png)")
    args = parser.parse_args(argv)
    draw([read_run(path) for path in args.run], args.out)
    command.say(args.out)
    return 0


if __name__ == "__main__":
    command.run(main)
