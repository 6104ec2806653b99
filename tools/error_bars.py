"""Error bars, by scipy: of paired differences, of Welch's t-test, of documents and seeds drawn again."""
import contextlib
import math
import warnings
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import command

with command.imports():
    import numpy as np
    from scipy import stats

from finished_runs import Refused

RESAMPLES = 2000  # by which a standard error is known to 2 %


class Difference(NamedTuple):
    """A mean difference between runs."""
    value: float
    error: float  # its standard error; NaN if a single pair, or run, cannot tell
    p: float  # two-sided: how often chance alone would give one as large
    pairs: int  # of one seed; 0: the two sides share no seed, and their means are compared


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Of too few values, or equal ones, scipy warns: here the answer, NaN or 0, says as much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@without_warnings()
def difference(new: dict[Hashable, float], base: dict[Hashable, float]) -> Difference:
    """The values of new less those of base, both by seed: paired if they share seeds, else by Welch."""
    shared = [key for key in new if key in base]
    if shared:
        differences = np.array([new[key] - base[key] for key in shared])
        p = stats.ttest_1samp(differences, 0.0).pvalue
        return Difference(differences.mean(), stats.sem(differences), p, len(shared))
    ours, theirs = list(new.values()), list(base.values())
    error = math.hypot(stats.sem(ours), stats.sem(theirs))
    p = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    return Difference(np.mean(ours) - np.mean(theirs), error, p, 0)


@without_warnings()
def welch(new: list[float], old: list[float], margin: float = 0.0) -> tuple[float, float, float]:
    """(t, degrees of freedom, p), one-sided: is the mean of new lower than old's by more than margin?"""
    if min(len(new), len(old)) < 2:
        raise Refused(f"a t-test needs two seeds or more on each side: {len(new)} v {len(old)}")
    if len(set(new)) == len(set(old)) == 1:
        raise Refused("a t-test needs scores that vary, and neither side's do")
    test = stats.ttest_ind(np.subtract(old, margin), new, equal_var=False, alternative="greater")
    return float(test.statistic), float(test.df), float(test.pvalue)


class Sums(NamedTuple):
    """What the documents of a validation set, or parts of them, come to. A group is any choice of targets."""
    bits: np.ndarray  # (groups, seeds, documents)
    size: np.ndarray  # (groups, documents) bytes

    def bpb(self, counts: np.ndarray) -> np.ndarray:
        """Bits per byte if document d is there counts[..., d] times: (..., groups, seeds)."""
        bits = np.tensordot(counts, self.bits, axes=(-1, -1))
        size = np.tensordot(counts, self.size, axes=(-1, -1))
        with np.errstate(invalid="ignore"):  # of a group without text
            return bits / size[..., None]


def bootstrap(new: Sums, base: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors, (groups,) each, of new's bits per byte less base's: over documents, and over both.

    The same documents are drawn for all runs, with replacement. Seeds are the groups of the second: of S
    pairs, S - 1 are drawn, as the variance of S would come out too small by this ratio.
    """
    documents = new.size.shape[-1]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES // 50):
        picks = rng.integers(documents, size=(50, documents))
        counts = np.stack([np.bincount(pick, minlength=documents) for pick in picks]).astype(np.float64)
        drawn.append(new.bpb(counts) - base.bpb(counts))
    differences = np.concatenate(drawn)  # (resamples, groups, seeds)
    over_documents = np.nanstd(differences.mean(-1), axis=0)
    seeds = differences.shape[-1]
    if seeds == 1:
        return over_documents, over_documents
    chosen = rng.integers(seeds, size=(len(differences), 1, seeds - 1))
    return over_documents, np.nanstd(np.take_along_axis(differences, chosen, -1).mean(-1), axis=0)
