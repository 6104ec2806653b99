#!/usr/bin/env python3
"""Where test-time training gains: bits per byte by position in the document and by its length.

    SAVE_SCORES=base.npz TTT_LORA_LR=0 EVAL_ONLY_PATH=runs/x/final_model.int6.ptz python train_gpt.py
    python tools/plot_ttt.py scores.npz base.npz -o ttt.png    # the gain of the first over the second
    python tools/plot_ttt.py scores.npz                        # its bits per byte alone

Reads what SAVE_SCORES wrote. The first command saves scores of the same windows without learning; for the
gain over plain scores, save those with TTT_ENABLED=0. Prints a table, in which +- is the standard error over
documents, and draws it, without bins of fewer than 5 documents.
"""
import argparse
import zipfile
from pathlib import Path
from typing import NamedTuple

import command

with command.imports("requirements-dev.txt"):
    import numpy as np
from plot_run import save

FEW = 5  # documents: a bin of fewer is in the table, but not in the picture
FIRST_END = 48  # of the first bin; each further one ends at twice the end of the one before


class Scores(NamedTuple):
    """What SAVE_SCORES writes."""
    nll: np.ndarray  # (targets,) nats
    token_bytes: np.ndarray  # (targets,)
    starts: np.ndarray  # (documents,) first target of each


class Row(NamedTuple):
    """Targets of one bin, or all."""
    name: str
    documents: int
    targets: int
    share: float  # of all bytes
    bpb: float
    value: float  # the gain, or bpb where there is no base
    error: float  # its standard error


def read_scores(path: Path) -> Scores:
    """Read saved scores; ends in one line if the file is not what SAVE_SCORES writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
        with np.load(path) as file:
            nll, token_bytes = (file[name].astype(np.float64) for name in ("nll", "token_bytes"))
            scores = Scores(nll, token_bytes, file["document_starts"].astype(np.int64))
        check_scores(scores)
    except Exception as error:  # whatever a foreign file provokes
        reason = f"{type(error).__name__}: {error}"
        raise SystemExit(command.report(f"{path}: not what SAVE_SCORES writes ({reason})")) from error
    return scores


def check_scores(scores: Scores) -> None:
    """ValueError if these are not losses, bytes and documents that belong together."""
    nll, token_bytes, starts = scores
    if not nll.ndim == token_bytes.ndim == starts.ndim == 1 or not len(nll) == len(token_bytes) > 0:
        raise ValueError("its arrays are not of one length")
    if not np.isfinite(nll).all() or not (token_bytes >= 0).all() or not token_bytes.sum():
        raise ValueError("its losses are not finite, or it is of no text")
    if not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] > len(nll):
        raise ValueError("its documents are not in order")


def ratio(bits: np.ndarray, size: np.ndarray) -> tuple[float, float]:
    """Sum of bits over sum of bytes, of documents' sums of either, and its standard error over documents."""
    total = size.sum()
    if not total:
        return float("nan"), float("nan")
    value = bits.sum() / total
    count = len(bits)
    if count == 1:
        return value, float("nan")
    variance = np.square(bits - value * size).sum() * count / (count - 1)
    return value, np.sqrt(variance) / total


def make_row(name: str, scores: Scores, base: Scores | None, chosen: np.ndarray) -> Row:
    """The row of the chosen targets, (targets,) bool."""
    lengths = np.diff(scores.starts, append=len(scores.nll))
    document = np.repeat(np.arange(len(lengths)), lengths)[chosen]
    present = np.unique(document)

    def by_document(values: np.ndarray) -> np.ndarray:
        """Sums over the chosen targets of each document that has any."""
        return np.bincount(document, values[chosen], len(lengths))[present]

    size = by_document(scores.token_bytes)
    bits = by_document(scores.nll) / np.log(2)
    bpb, _ = ratio(bits, size)
    gained = bits if base is None else by_document(base.nll) / np.log(2) - bits
    value, error = ratio(gained, size)
    share = size.sum() / scores.token_bytes.sum()
    return Row(name, len(present), int(chosen.sum()), share, bpb, value, error)


def make_table(scores: Scores, base: Scores | None, of_targets: np.ndarray) -> list[Row]:
    """A row for every bin of `of_targets`, a number for each target, that has any targets."""
    rows = []
    lo, hi = 0, FIRST_END
    while lo <= of_targets.max():
        chosen = (of_targets >= lo) & (of_targets < hi)
        if chosen.any():
            rows.append(make_row(f"{lo}-{hi}", scores, base, chosen))
        lo, hi = hi, 2 * hi
    return rows


def tables(scores: Scores, base: Scores | None) -> dict[str, list[Row]]:
    """The tables that are drawn, and that of everything, by title."""
    lengths = np.diff(scores.starts, append=len(scores.nll))
    positions = np.arange(len(scores.nll)) - np.repeat(scores.starts, lengths)
    everything = np.ones(len(scores.nll), dtype=bool)
    return {"position in the document": make_table(scores, base, positions),
            "length of the document": make_table(scores, base, np.repeat(lengths, lengths)),
            "everything": [make_row("all", scores, base, everything)]}


def show(rows: list[Row], title: str, gain: bool) -> None:
    """Print a table; with a column for the gain, if there is one."""
    gain_title = f"{'gain':>11}" if gain else ""
    command.say(f"{title:<26}{'documents':>10}{'targets':>10}{'bytes':>8}{'bpb':>9}{gain_title}{'+-':>10}")
    for row in rows:
        gained = f"{row.value:>+11.6f}" if gain else ""
        command.say(f"{row.name:<26}{row.documents:>10}{row.targets:>10}{row.share:>8.1%}{row.bpb:>9.5f}"
                    f"{gained}{row.error:>10.6f}")
    command.say("")


def draw(results: dict[str, list[Row]], gain: bool, out: Path) -> None:
    """Draw the tables with their error bars."""
    with command.imports("requirements-dev.txt"):
        import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, constrained_layout=True)
    total = results["everything"][0]
    for axis, (title, rows) in zip(axes, results.items()):
        well_filled = [row for row in rows if row.documents >= FEW]
        drawn = well_filled if well_filled else rows
        names, values, errors = zip(*((row.name, row.value, row.error) for row in drawn))
        axis.errorbar(names, values, errors, fmt="o", capsize=3)
        axis.axhline(total.value, color="gray", linestyle=":",
                     label=f"all: {total.value:.5f} +- {total.error:.5f}")
        if gain:
            axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel=f"{title}, targets", title=f"by {title}")
        axis.tick_params(axis="x", rotation=45)
    axes[0].set_ylabel("gain, bits per byte (up is better)" if gain else "bits per byte (down is better)")
    axes[0].legend()
    save(figure, out)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="written by SAVE_SCORES")
    parser.add_argument("base", type=Path, nargs="?", help="another of the same documents, to compare with")
    parser.add_argument("-o", "--out", type=Path, default=Path("ttt.png"), help="PNG to write (ttt.png)")
    args = parser.parse_args(argv)
    scores = read_scores(args.scores)
    base = read_scores(args.base) if args.base else None
    if base:
        same_bytes = np.array_equal(scores.token_bytes, base.token_bytes)
        same_starts = np.array_equal(scores.starts, base.starts)
        if not (same_bytes and same_starts):
            return command.report(f"{args.scores} and {args.base} are scores of different documents")
    results = tables(scores, base)
    for title, rows in results.items():
        show(rows, title, bool(base))
    draw(results, bool(base), args.out)
    command.say(args.out)
    return 0


if __name__ == "__main__":
    command.run(main)
