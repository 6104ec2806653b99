"""What runs of an experiment come to and how they differ: the tables of sweep.py and compare.py."""
import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from error_bars import Difference, difference

from finished_runs import Refused, Run, adapts, other_kind

BITS_A_PERCENT = 0.0003  # of time, in bits per byte at the record's length: what is slower takes fewer steps
SIGNIFICANT = 0.05
SCORES = "last weights", "average", "quantized", "adapted"
COMPARED = *SCORES, "gap", "time", "score + time"
LEGEND = ["+-: standard error of the mean difference, over pairs of one seed on one machine (pairs none: of "
          f"the difference of means). *: p < {SIGNIFICANT}, two-sided t-test.",
          f"time: 1 % = {BITS_A_PERCENT} bits per byte, if steps are fixed. gap: quantized - average. score: "
          "adapted or, if nothing adapts, quantized."]
MACHINE = "machine.txt"  # beside a run's log: where sweep.py ran it
Measures = dict[str, float]  # of a run, by name; NaN where it does not tell


class Key(NamedTuple):
    """What makes runs of two variants a pair."""
    seed: int
    machine: str  # nothing, if it is not known


def measure(run: Run) -> Measures:
    r = run.result
    try:
        last = [row["val_bpb"] for row in run.rows
                if row.get("kind") == "validation" and row["step"] == r["steps"]]
        measures = {"last weights": last[-1] if last else math.nan,
                    "average": r["val_bpb_unquantized"],
                    "quantized": r["val_bpb_quantized"],
                    "adapted": r["val_bpb"] if adapts(r) else math.nan,
                    "gap": r["val_bpb_quantized"] - r["val_bpb_unquantized"],
                    "score": r["val_bpb"],
                    "ms a step": 1000 * r.get("phases", {}).get("train", math.nan) / r["steps"],
                    "budget": r["clocks"]["training"]["budget"],
                    "bytes": r["total_bytes"]}
        return {name: float(value) for name, value in measures.items()}
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise Refused(other_kind(run, error)) from error


def key_of(run: Run) -> Key:
    file = run.log.parent / MACHINE
    machine = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return Key(run.result["seed"], machine.strip())


def by_card(runs: list[Run]) -> dict[str, dict[Key, Measures]]:
    """The measures of a group of runs, by card and then by seed."""
    cards: dict[str, dict[Key, Measures]] = {}
    for run in sorted(runs, key=lambda run: run.result["seed"]):
        key = key_of(run)
        of_card = cards.setdefault(run.result["hardware"], {})
        if key.seed in seeds_of(of_card):
            raise Refused(f"{run.log}: seed {key.seed} is that of another of these runs, too")
        of_card[key] = measure(run)
    return cards


def seeds_of(runs: Iterable[Key]) -> set[int]:
    return {key.seed for key in runs}


def differences(new: dict[Key, Measures], base: dict[Key, Measures]) -> dict[str, Difference]:
    """How runs on one card differ, in what both sides tell; time is in bits per byte."""
    usual = statistics.fmean(measures["ms a step"] for measures in base.values())
    sides = [{seed: with_time(measures, usual) for seed, measures in side.items()} for side in (new, base)]
    found = {}
    for name in COMPARED:
        ours, theirs = ({seed: measures[name] for seed, measures in side.items()
                         if not math.isnan(measures[name])} for side in sides)
        if ours and theirs:
            found[name] = difference(ours, theirs)
    return found


def with_time(measures: Measures, usual: float) -> Measures:
    """The measures, and what the time of a step is worth against the usual one.

    The score of a run that trained by the clock has the time in it.
    """
    time = math.nan if measures["budget"] else 100 * BITS_A_PERCENT * (measures["ms a step"] / usual - 1)
    return {**measures, "time": time, "score + time": measures["score"] + time}


def tables(groups: dict[str, list[Run]]) -> list[str]:
    """Two tables in Markdown: what named groups of runs come to, and how they differ from the first group.

    Runs on another card are a group of their own.
    """
    base, *_ = groups
    cards = {name: by_card(runs) for name, runs in groups.items()}
    # 1) What they come to.
    rows = [["variant", "seeds", *SCORES, "gap", "ms a step", "bytes", "card"]]
    for name in cards:
        for card, runs in cards[name].items():
            means = [mean_cell(runs, column, 5) for column in (*SCORES, "gap")]
            most = max(measures["bytes"] for measures in runs.values())
            rows.append([name, f"{len(runs)}", *means, mean_cell(runs, "ms a step", 1), f"{most:,.0f}", card])
    lines = [*markdown(rows), "+-: standard deviation over seeds. bytes: the most of any seed.", ""]
    # 2) How they differ.
    rows = [[f"against {base}", "pairs", *COMPARED]]
    for name in [*cards][1:]:
        for card in cards[name]:
            if card not in cards[base]:
                lines.append(f"{name} is not compared: {base} has no run on {card}")
                continue
            ours, theirs = cards[name][card], cards[base][card]
            apart = seeds_of(ours) & seeds_of(theirs) - seeds_of(set(ours) & set(theirs))
            if apart:
                lines.append(f"{name} and {base} are no pair of seed {', '.join(map(str, sorted(apart)))}: "
                             "they ran on two machines")
            found = differences(ours, theirs)
            cells = [difference_cell(found.get(column)) for column in COMPARED]
            rows.append([name, f"{found['quantized'].pairs or 'none'}", *cells])
    return lines + [*markdown(rows), *LEGEND] if len(rows) > 1 else lines


def mean_cell(runs: dict[Key, Measures], name: str, digits: int) -> str:
    values = [measures[name] for measures in runs.values() if not math.isnan(measures[name])]
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def difference_cell(found: Difference | None) -> str:
    if found is None:
        return "-"
    error = "" if math.isnan(found.error) else f" +- {found.error:.5f}"
    return f"{found.value:+.5f}{error}{' *' if found.p < SIGNIFICANT else ''}"


def markdown(rows: list[list[str]]) -> list[str]:
    """A table with aligned columns; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
