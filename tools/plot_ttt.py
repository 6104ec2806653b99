#!/usr/bin/env python3
"""Where test-time training gains: bits per byte by position in the document and by its length, of saved scores.

    SAVE_SCORES=base.npz TTT_LORA_LR=0 EVAL_ONLY_PATH=runs/x/final_model.int6.ptz python train_gpt.py  # same windows
    python tools/plot_ttt.py scores.npz base.npz -o ttt.png    # the gain of the first over the second
    python tools/plot_ttt.py scores.npz                        # its bits per byte alone

Prints a table, in which +- is the standard error over documents, and draws it, without bins of fewer than 5 documents. For
the gain over plain scores, save those with TTT_ENABLED=0.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from plot_run import save

FEW = 5  # documents: a bin of fewer is in the table, but not in the picture
FIRST = 48  # the first bin ends here, each further one at twice the end of the one before


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
    """SystemExit if it is not what SAVE_SCORES writes."""
    try:
        with np.load(path) as file:
            nll, token_bytes = (file[name].astype(np.float64) for name in ("nll", "token_bytes"))
            scores = Scores(nll, token_bytes, file["document_starts"])
        assert scores.nll.shape == scores.token_bytes.shape and scores.starts[0] == 0 < len(scores.nll)
    except Exception as error:  # whatever a foreign file provokes
        raise SystemExit(f"error: {path}: not what SAVE_SCORES writes ({type(error).__name__}: {error})") from error
    return scores


def ratio(bits: np.ndarray, size: np.ndarray) -> tuple[float, float]:
    """Sum of bits over sum of bytes, of documents' sums of either, and its standard error over documents."""
    if not size.sum():
        return float("nan"), float("nan")
    value, n = bits.sum() / size.sum(), len(bits)
    spread = np.square(bits - value * size).sum() * n / (n - 1) if n > 1 else float("nan")
    return value, np.sqrt(spread) / size.sum()


def row(name: str, scores: Scores, base: Scores | None, chosen: np.ndarray) -> Row:
    """The row of the chosen targets."""
    document = np.repeat(np.arange(len(scores.starts)), np.diff(scores.starts, append=len(scores.nll)))[chosen]
    present = np.unique(document)
    by_document = lambda values: np.bincount(document, values[chosen], len(scores.starts))[present]
    size, bits = by_document(scores.token_bytes), by_document(scores.nll) / np.log(2)
    gained = bits if base is None else by_document(base.nll) / np.log(2) - bits
    return Row(name, len(present), int(chosen.sum()), size.sum() / scores.token_bytes.sum(), ratio(bits, size)[0],
               *ratio(gained, size))


def table(scores: Scores, base: Scores | None, of_targets: np.ndarray) -> list[Row]:
    """A row for every bin of what `of_targets` says of each target that has any."""
    rows, lo, hi = [], 0, FIRST
    while lo <= of_targets.max():
        chosen = (of_targets >= lo) & (of_targets < hi)
        if chosen.any():
            rows.append(row(f"{lo}-{hi}", scores, base, chosen))
        lo, hi = hi, 2 * hi
    return rows


def tables(scores: Scores, base: Scores | None) -> dict[str, list[Row]]:
    """Of what is drawn, and of everything."""
    lengths = np.diff(scores.starts, append=len(scores.nll))
    positions = np.arange(len(scores.nll)) - np.repeat(scores.starts, lengths)
    return {"position in the document": table(scores, base, positions),
            "length of the document": table(scores, base, np.repeat(lengths, lengths)),
            "everything": [row("all", scores, base, np.ones(len(scores.nll), dtype=bool))]}


def show(rows: list[Row], title: str, gain: bool) -> None:
    print(f"{title:<26}{'documents':>10}{'targets':>10}{'bytes':>8}{'bpb':>9}" + f"{'gain':>11}" * gain + f"{'+-':>10}")
    for r in rows:
        print(f"{r.name:<26}{r.documents:>10}{r.targets:>10}{r.share:>8.1%}{r.bpb:>9.5f}" + f"{r.value:>+11.6f}" * gain
              + f"{r.error:>10.6f}")
    print()


def draw(results: dict[str, list[Row]], gain: bool, out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: drawing needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, constrained_layout=True)
    total = results["everything"][0]
    for axis, (title, rows) in zip(axes, results.items()):
        rows = [r for r in rows if r.documents >= FEW] or rows
        axis.errorbar([r.name for r in rows], [r.value for r in rows], [r.error for r in rows], fmt="o", capsize=3)
        axis.axhline(total.value, color="gray", linestyle=":", label=f"all: {total.value:.5f} +- {total.error:.5f}")
        if gain:
            axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel=f"{title}, targets", title=f"by {title}")
        axis.tick_params(axis="x", rotation=45)
    axes[0].set_ylabel("gain, bits per byte (up is better)" if gain else "bits per byte (down is better)")
    axes[0].legend()
    save(figure, out)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="written by SAVE_SCORES")
    parser.add_argument("base", type=Path, nargs="?", help="another of the same documents, to compare with")
    parser.add_argument("-o", "--out", type=Path, default=Path("ttt.png"), help="PNG to write (ttt.png)")
    args = parser.parse_args(argv)
    scores, base = read_scores(args.scores), read_scores(args.base) if args.base else None
    if base and not all(np.array_equal(a, b) for a, b in zip(scores[1:], base[1:])):
        raise SystemExit(f"error: {args.scores} and {args.base} are scores of different documents")
    results = tables(scores, base)
    for title, rows in results.items():
        show(rows, title, bool(base))
    draw(results, bool(base), args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
