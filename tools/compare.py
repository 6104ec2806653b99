#!/usr/bin/env python3
"""Compare finished runs with others: scores, gap, time and bytes, paired by seed, by document, by position.

    python tools/compare.py runs/floor/none/seed* --against runs/floor/floor/seed*
    python tools/compare.py runs/b0 runs/b1 --against runs/a0 runs/a1 --scores b0.npz b1.npz a0.npz a1.npz

A run is a folder that train_gpt.py left (its ARTIFACT_DIR), what tools/sweep.py kept of one, or its log
alone. Runs of one side differ in nothing but their seed. Differences are those of runs on one card, seed by
seed; if the sides share no seed, of their means. Scores that SAVE_SCORES saved, beside each run as scores.npz
or given by --scores, tell more: how sure the difference is beyond these documents, and where it arises.

Time counts as well: what is slower takes fewer steps in 600 s, and 1 % is worth about 0.0003 bits per byte
at the record's length. `score + time` is the difference of the score that the run ends with (adapted, or
quantized if nothing adapts) with that added.
"""
import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any, NamedTuple

import command
from error_bars import Difference, Sums, bootstrap
from measures import by_card, differences, key_of, markdown, measure, tables

from finished_runs import Refused, Run, check_belongs_with, read_finished, shared_facts
from plot_run import save
from plot_ttt import FEW, read_scores

with command.imports():
    import numpy as np

FIRST_END = 256  # bytes, of the first bin; each further one ends at twice the end of the one before
ENDS = FIRST_END << np.arange(20)  # the last bin, after these, has no end
BINS = [f"{end // 2 * (end > FIRST_END)}-{end}" for end in ENDS.tolist()] + [f"{ENDS[-1]}-"]


class Row(NamedTuple):
    """A difference in bits per byte, of all targets or of those in a bin."""
    name: str
    documents: int
    share: float  # of all bytes
    value: float
    over_documents: float  # its standard error, if documents are drawn again
    error: float  # the same if documents and seeds are


# ---- By document -------------------------------------------------------------------------------------------

def sum_up(runs: list[Run], files: list[Path]) -> Sums:
    """Bits and bytes of every document by saved scores: of all, by bins of position, by bins of its length.

    Bins are of bytes of text, so that tokenizers may differ.
    """
    bits, sizes = [], []
    for run, file in zip(runs, files):
        nll, token_bytes, starts = read_scores(file)
        bpb = nll.sum() / math.log(2) / token_bytes.sum()
        if not math.isclose(bpb, measure(run)["score"], rel_tol=1e-5):
            raise Refused(f"{file}: its scores come to {bpb:.6f} bits per byte, which is not the val_bpb of "
                          f"{run.log}")
        # 1) Every target is in three groups.
        lengths = np.diff(starts, append=len(nll))
        document = np.repeat(np.arange(len(lengths)), lengths)
        size = np.bincount(document, token_bytes, len(lengths))
        position = np.cumsum(token_bytes) - token_bytes - (np.cumsum(size) - size)[document]
        groups = (np.zeros(len(nll), dtype=int), 1 + np.searchsorted(ENDS, position, side="right"),
                  1 + len(BINS) + np.searchsorted(ENDS, size, side="right")[document])
        # 2) Add up what is of one group and one document.
        shape = 1 + 2 * len(BINS), len(lengths)
        for sums, values in ((bits, nll / math.log(2)), (sizes, token_bytes)):
            cells = (np.ravel_multi_index((group, document), shape) for group in groups)
            sums.append(sum(np.bincount(cell, values, math.prod(shape)) for cell in cells).reshape(shape))
        if sizes[-1].shape != sizes[0].shape or (sizes[-1] != sizes[0]).any():
            raise Refused(f"{file}: its documents are not those of {files[0]}")
    return Sums(np.stack(bits, axis=1), sizes[0])


def document_rows(new: Sums, base: Sums) -> list[Row]:
    """The difference over all targets, and in each bin that has any, in the order of `sum_up`."""
    if new.size.shape != base.size.shape or not np.allclose(new.size[0], base.size[0], rtol=0.02, atol=8):
        raise Refused("the scores of the two sides are of different documents")
    there = np.flatnonzero(new.size.any(1) & base.size.any(1))
    new, base = (Sums(side.bits[there], side.size[there]) for side in (new, base))
    once = np.ones(new.size.shape[1])
    columns = ((new.size > 0).sum(1), new.size.sum(1) / new.size[0].sum(),
               (new.bpb(once) - base.bpb(once)).mean(-1), *bootstrap(new, base))
    names = ["all", *(f"position {name}" for name in BINS), *(f"length {name}" for name in BINS)]
    return [Row(names[group], *numbers) for group, *numbers in zip(there, *columns)]


def document_lines(rows: list[Row], seeds: int) -> list[str]:
    everything = rows[0]
    cells = [[row.name, f"{row.documents}", f"{row.share:.1%}", f"{row.value:+.5f} +- {row.error:.5f}"]
             for row in rows]
    return [*markdown([["bytes", "documents", "of all bytes", "difference"], *cells]),
            f"+-: standard error, of documents and the {seeds} seeds drawn again; of documents alone "
            f"{everything.over_documents:.5f} for all of them."]


# ---- Picture, command --------------------------------------------------------------------------------------

def draw(by_seed: dict[str, Difference], rows: list[Row], out: Path) -> None:
    """Draw differences with their standard errors: by kind of score, by position, by length."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"all documents": [(name, found.value, found.error) for name, found in by_seed.items()]}
    for kind in ("position", "length"):
        panels[f"by {kind} in bytes"] = [(row.name.removeprefix(kind), row.value, row.error) for row in rows
                                         if row.name.startswith(kind) and row.documents >= FEW]
    panels = {title: points for title, points in panels.items() if points}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), squeeze=False,
                                constrained_layout=True)
    for axis, (title, points) in zip(axes[0], panels.items()):
        names, values, errors = zip(*points)
        axis.errorbar(names, values, errors, fmt="o", capsize=3)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=title)
        axis.tick_params(axis="x", rotation=45)
    axes[0, 0].set_ylabel("difference in bits per byte (below 0 is better)")
    save(figure, out)
    plt.close(figure)


def read_side(paths: list[Path]) -> list[Run]:
    """Finished runs that differ in nothing but their seed."""
    for path in paths:
        if any(path.glob("seed*/log.txt")):
            raise Refused(f"{path} holds several runs: name them, {path}/seed*")
    runs = [read_finished(path) for path in paths]
    for run in runs[1:]:
        check_belongs_with(runs[0], run)
    return runs


def what_differs(new: Run, base: Run) -> str:
    """The settings, data, versions and so on in which two runs differ, besides the seed."""
    ours, theirs = shared_facts(new.result), shared_facts(base.result)

    def shown(facts: dict[str, Any], name: str) -> str:
        return f"{facts.get(name, 'the default')!s:.12}"

    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name} {shown(ours, name)}, not {shown(theirs, name)}" for name in names) or "nothing"


def files_of_scores(args: argparse.Namespace) -> dict[Path, Path]:
    """The saved scores of each run that has some."""
    paths = [*args.runs, *args.against]
    if args.scores:
        if len(args.scores) != len(paths):
            raise Refused(f"--scores: {len(args.scores)} files for {len(paths)} runs: name one for each, "
                          "those of --against last")
        return dict(zip(paths, args.scores))
    beside = {path: path / "scores.npz" for path in paths if (path / "scores.npz").is_file()}
    without = [str(path) for path in paths if path not in beside]
    if beside and without:
        command.note(f"no scores.npz beside, and so not compared by document: {' '.join(without)}")
    return beside


def compare(args: argparse.Namespace) -> tuple[list[str], dict[str, Difference], list[Row]]:
    """(the lines to print, and what the picture shows: differences by kind of score, and by document)."""
    # 1) By seed.
    new, base = read_side(args.runs), read_side(args.against)
    (card, ours), = by_card(new).items()
    (their_card, theirs), = by_card(base).items()
    if card != their_card:
        raise Refused(f"no comparison: runs on {card}, and on {their_card}")
    lines = []
    if any(new[0].result[name] != base[0].result[name] for name in ("documents", "bytes")):
        lines = ["NOT THE SAME VALIDATION TEXT: documents or bytes differ, and scores do not compare"]
    lines += [f"differs, besides seeds: {what_differs(new[0], base[0])}", ""]
    lines += tables({"base": base, "runs": new})
    # 2) By document.
    files = files_of_scores(args)
    sides = [{key_of(run): (run, files[path]) for run, path in zip(runs, paths) if path in files}
             for runs, paths in ((new, args.runs), (base, args.against))]
    pairs = sorted(set(sides[0]) & set(sides[1]))
    rows = []
    if pairs:
        rows = document_rows(*(sum_up(*zip(*(side[key] for key in pairs))) for side in sides))
        lines += ["", *document_lines(rows, len(pairs))]
    elif files:
        command.note("no seed of both sides has scores, on one machine: nothing is compared by document")
    return lines, differences(ours, theirs), rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log")
    add("--against", nargs="+", type=Path, metavar="RUN", required=True, help="runs to compare them with")
    add("--scores", nargs="+", type=Path, metavar="FILE",
        help="what SAVE_SCORES saved of each run, in this order (default: scores.npz in its folder)")
    add("-o", "--out", type=Path, default=Path("compare.png"), help="PNG to write (compare.png)")
    args = parser.parse_args(argv)
    try:
        lines, by_seed, rows = compare(args)
        print("\n".join(lines))
        if importlib.util.find_spec("matplotlib"):
            draw(by_seed, rows, args.out)
            print(args.out)
        else:
            command.note("no picture: that needs pip install -r requirements-dev.txt")
    except (Refused, OSError) as error:
        return command.report(error)
    return 0


if __name__ == "__main__":
    command.run(main)
