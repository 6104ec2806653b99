"""tools/compare.py, and what it shares with tools/sweep.py: error bars, tables. Runs here are fabricated."""
import itertools
import math
import os
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from experiment_runs import result_of, write_run
from scipy import stats

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import compare
import error_bars
import measures
from error_bars import Sums, bootstrap, difference
from measures import by_card, differences, tables

from finished_runs import read_finished

pytestmark = pytest.mark.check
H100, H200 = "1 x NVIDIA H100 80GB HBM3", "1 x NVIDIA H200"
BASE = [1.100, 1.107, 1.103, 1.095]
NEW = [1.098, 1.106, 1.1005, 1.0925]  # 0.002, 0.001, 0.0025 and 0.0025 lower


@pytest.fixture
def run(tmp_path):
    """run(seed, average, last=..., ...): a finished run."""
    numbers = itertools.count()

    def write(seed: int, average: float, last=None, **options):
        result = result_of(seed, average, **options)
        return read_finished(write_run(tmp_path / str(next(numbers)), result, last))
    return write


@pytest.fixture
def refused(capsys):
    """refused(arguments): the one line that compare.py ends with."""
    def call(*arguments) -> str:
        try:
            status = compare.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
        return err
    return call


# Error bars


def test_pairs_are_of_one_seed():
    """The spread between seeds is not in the error, whatever their order; a seed without its pair is out."""
    new = dict(zip((3, 2, 1, 0, 7), [*reversed(NEW), 5.0]))
    found = difference(new, dict(enumerate(BASE)))
    gains = [a - b for a, b in zip(NEW, BASE)]
    assert found.pairs == 4 and found.value == pytest.approx(statistics.fmean(gains))
    assert found.error == pytest.approx(statistics.stdev(gains) / 2)
    assert found.p == pytest.approx(stats.ttest_rel(NEW, BASE).pvalue) and found.p < 0.05
    mixed = difference(dict(enumerate(NEW[1:] + NEW[:1])), dict(enumerate(BASE)))
    assert mixed.value == pytest.approx(found.value) and mixed.p > 0.05 and mixed.error > 4 * found.error


def test_without_a_seed_in_common_means_are_compared():
    found = difference(dict(enumerate(NEW, 10)), dict(enumerate(BASE)))
    assert found.pairs == 0 and found.value == pytest.approx(statistics.fmean(NEW) - statistics.fmean(BASE))
    assert found.error == pytest.approx(math.sqrt((statistics.variance(NEW) + statistics.variance(BASE)) / 4))
    one_sided = error_bars.welch(NEW, BASE)[2]
    assert found.p == pytest.approx(2 * one_sided)


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_known_is_nan():
    alone = difference({0: 1.0}, {0: 1.5})
    assert alone.value == -0.5 and math.isnan(alone.error) and math.isnan(alone.p)
    equal = difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert equal[:2] == (0, 0) and math.isnan(equal.p)
    assert math.isnan(difference({0: 1.0}, {1: 1.5, 2: 1.25}).error)


def made_up(documents: int, seeds: int, of_seeds: float, of_documents: float) -> tuple[Sums, Sums]:
    """Sums whose differences spread so much over seeds, and over documents."""
    rng = np.random.default_rng(5)
    size = rng.integers(50, 5000, (1, documents)).astype(float)
    base = rng.normal(1.1, 0.3, (1, 1, documents)) + rng.normal(0, 0.1, (1, seeds, 1))
    by_seed = stats.zscore(rng.normal(size=seeds), ddof=1) if seeds > 1 else np.zeros(1)
    gains = rng.normal(0, of_documents, (1, 1, documents)) + of_seeds * by_seed[:, None]
    return Sums((base + gains) * size[:, None], size), Sums(base * size[:, None], size)


def test_documents_drawn_again_give_the_error_of_a_ratio():
    """As scipy's bootstrap and the formula of the ratio of two sums do."""
    new, base = made_up(300, 1, 0.0, 0.02)
    gained, size = (new.bits - base.bits)[0, 0], new.size[0]
    errors = bootstrap(new, base)
    assert errors[0] == errors[1]  # a single seed
    ratio = gained.sum() / size.sum()
    formula = math.sqrt(np.square(gained - ratio * size).sum() * 300 / 299) / size.sum()
    again = stats.bootstrap((gained, size), lambda bits, sizes: bits.sum() / sizes.sum(), paired=True,
                            vectorized=False, n_resamples=1000, method="percentile", rng=1).standard_error
    assert errors[0] == pytest.approx(formula, rel=0.06) and errors[0] == pytest.approx(again, rel=0.1)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_seeds_are_the_groups_that_are_drawn(seeds):
    """Where only seeds spread, the error is that of their mean. To draw S of S would make it smaller."""
    new, base = made_up(200, seeds, 0.01, 1e-6)
    over_documents, over_both = bootstrap(new, base)
    assert over_documents[0] < 1e-5
    assert over_both[0] == pytest.approx(0.01 / math.sqrt(seeds), rel=0.05)
    assert math.sqrt((seeds - 1) / seeds) < 0.95  # which is how much smaller


def test_the_errors_of_documents_and_seeds_add_up_as_squares():
    new, base = made_up(200, 3, 0.003, 0.03)
    over_documents, over_both = bootstrap(new, base)
    assert over_both[0] == pytest.approx(math.hypot(over_documents[0], 0.003 / math.sqrt(3)), rel=0.06)


# Measures and tables


def test_measures_are_those_of_the_run(run):
    found = measures.measure(run(0, 1.25, last=1.5, quantized=1.375, adapted=1.125, ms=80.0))
    assert found == {"last weights": 1.5, "average": 1.25, "quantized": 1.375, "adapted": 1.125, "gap": 0.125,
                     "score": 1.125, "ms a step": 80.0, "bytes": 900_000, "budget": 0.0}
    plain = measures.measure(run(1, 1.25, quantized=1.375))
    assert plain["score"] == 1.375 and math.isnan(plain["adapted"]) and math.isnan(plain["last weights"])
    early = run(2, 1.25, last=1.5, steps=20)
    early.rows[2]["step"] = 10  # the last weights were not validated
    assert math.isnan(measures.measure(early)["last weights"])


def test_time_is_bits_per_byte(run):
    """1 % of a step's time is 0.0003 bits per byte, and is added to the last score of the run."""
    ours = by_card([run(seed, 1.1, adapted=1.0, ms=103.0) for seed in (0, 1)])
    theirs = by_card([run(seed, 1.1, adapted=1.002, ms=ms) for seed, ms in ((0, 99.0), (1, 101.0))])
    (ours,), (theirs,) = ours.values(), theirs.values()
    found = differences(ours, theirs)
    assert found["time"].value == pytest.approx(3 * 0.0003)
    assert found["time"].error == pytest.approx(0.0003)  # 4 and 2 %: over seeds
    assert found["adapted"].value == pytest.approx(-0.002)
    assert found["score + time"].value == pytest.approx(-0.002 + 3 * 0.0003)
    clocks = {"training": {"seconds": 600.0, "budget": 600.0}}  # by the clock: the score has the time in it
    (timed,) = by_card([run(seed, 1.1, ms=103.0, clocks=clocks) for seed in (0, 1)]).values()
    assert not {"time", "score + time"} & set(differences(timed, theirs))


def cells(lines: list[str], start: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"| {start} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_have_means_and_paired_differences(run):
    groups = {"base": [run(seed, bpb, last=bpb + 0.1) for seed, bpb in enumerate(BASE)],
              "new": [run(seed, bpb, last=bpb + 0.1, ms=101) for seed, bpb in reversed([*enumerate(NEW)])]}
    lines = tables(groups)
    first, second = lines[: lines.index("")], lines[lines.index(""):]
    row = cells(first, "new")
    assert row[:2] == ["new", "4"] and row[-2:] == ["900,003", "1 x CPU x86_64"]
    assert row[3] == f"{statistics.fmean(NEW):.5f} +- {statistics.stdev(NEW):.5f}" and row[5] == "-"
    assert row[6:8] == ["0.00100 +- 0.00000", "101.0 +- 0.0"]
    row = cells(second, "new")
    gains = [a - b for a, b in zip(NEW, BASE)]
    expected = f"{statistics.fmean(gains):+.5f} +- {statistics.stdev(gains) / 2:.5f} *"
    assert row == ["new", "4", expected, expected, expected, "-", row[6], row[7],
                   f"{statistics.fmean(gains) + 0.0003:+.5f} +- {statistics.stdev(gains) / 2:.5f} *"]
    assert row[7].startswith("+0.00030 +- 0.00000")


def test_runs_on_another_card_are_not_compared(run):
    groups = {"base": [run(0, 1.0, card=H100), run(1, 1.1, card=H200), run(2, 1.2, card=H100)],
              "new": [run(0, 0.9, card=H100), run(1, 3.0, card=H100), run(2, 1.11, card=H100)],
              "far": [run(0, 0.5, card=H200)], "lost": [run(0, 0.5)]}
    lines = tables(groups)
    second = lines[lines.index(""):]
    assert cells(second, "new")[:4] == ["new", "2", "-", "-0.09500 +- 0.00500 *"]  # not of seed 1
    assert cells(second, "far")[1] == "none"
    assert "lost is not compared: base has no run on 1 x CPU x86_64" in lines
    assert sum(line.startswith("| base ") for line in lines) == 2  # a row for each card


def test_variants_without_a_run_cost_no_table(run):
    assert "not compared" in "".join(tables({"base": [], "new": [run(0, 1.0)]}))
    assert not any("against" in line for line in tables({"base": [run(0, 1.0)], "new": []}))


# By document


def save_scores(folder, pieces: list[list[tuple[float, int]]]):
    """Write scores.npz of documents of (nats, bytes) a target."""
    targets = [target for document in pieces for target in document]
    nll, token_bytes = np.array(targets).T
    starts = np.cumsum([0] + [len(document) for document in pieces[:-1]])
    np.savez(folder / "scores.npz", nll=nll.astype(np.float32), token_bytes=token_bytes.astype(np.uint16),
             document_starts=starts)
    return nll.astype(np.float32).astype(float).sum() / math.log(2) / token_bytes.sum()


def scored_run(folder, seed: int, pieces):
    """A run with these scores beside it."""
    folder.mkdir(parents=True)
    bpb = save_scores(folder, pieces)
    return write_run(folder, result_of(seed, 1.0, quantized=1.1, adapted=bpb))


def random_pieces(rng, documents: int) -> list[list[tuple[float, int]]]:
    lengths = rng.integers(1, 400, documents)
    return [[(rng.exponential(2.0), int(rng.integers(0, 9))) for _ in range(length)] + [(1.0, 3)]
            for length in lengths]


def test_sums_are_those_of_a_loop(tmp_path):
    rng = np.random.default_rng(1)
    all_pieces = [random_pieces(rng, 12)]
    all_pieces.append([[(nll + 0.1, size) for nll, size in document] for document in all_pieces[0]])
    folders = [scored_run(tmp_path / str(i), i, pieces) for i, pieces in enumerate(all_pieces)]
    found = compare.sum_up([read_finished(folder) for folder in folders],
                           [folder / "scores.npz" for folder in folders])
    ends = [256 * 2**i for i in range(20)]
    bits = np.zeros_like(found.bits)
    size = np.zeros_like(found.size)
    for seed, pieces in enumerate(all_pieces):
        for d, document in enumerate(pieces):
            before = 0
            whole = sum(target[1] for target in document)
            for nll, target_bytes in document:
                groups = (0, 1 + sum(before >= end for end in ends), 22 + sum(whole >= end for end in ends))
                before += target_bytes
                for group in groups:
                    bits[group, seed, d] += nll / math.log(2)
                    size[group, d] += target_bytes * (seed == 0)
    np.testing.assert_allclose(found.bits, bits, rtol=1e-5)
    np.testing.assert_array_equal(found.size, size)


def lines_of(capsys, *arguments) -> list[str]:
    assert compare.main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out.splitlines()


def test_a_gain_planted_in_a_bin_is_found_there(tmp_path, capsys):
    """Also by scores that are elsewhere; and between tokenizers that cut the same text otherwise."""
    rng = np.random.default_rng(2)
    pieces = [[(rng.exponential(2.0), 4) for _ in range(4 * int(rng.integers(40, 300)))] for _ in range(30)]
    folders = {}
    for side, gain in (("base", 0.0), ("new", 0.2)):
        for seed in (0, 1, 2):
            shifted = [[(nll + 0.01 * seed - gain * (64 <= i < 128), size)
                        for i, (nll, size) in enumerate(document)] for document in pieces]
            merged = [[(sum(nll for nll, _ in document[i : i + 4]), 16) for i in range(0, len(document), 4)]
                      for document in shifted]
            cut = merged if side == "new" else shifted
            folders[side, seed] = scored_run(tmp_path / f"{side}{seed}", seed, cut)
    out = tmp_path / "a.png"
    new, base = ([folders[side, seed] for seed in (2, 0, 1)] for side in ("new", "base"))
    lines = lines_of(capsys, *new, "--against", *base, "-o", out)
    assert out.read_bytes().startswith(b"\x89PNG") and lines[-1] == str(out)
    gain = 0.2 / math.log(2) / 4
    assert cells(lines, "position 256-512")[1:] == ["30", cells(lines, "position 256-512")[2],
                                                    f"{-gain:+.5f} +- 0.00000"]
    assert cells(lines, "position 0-256")[3].startswith(("+0.00000", "-0.00000"))
    share = 30 * 256 / sum(4 * len(document) for document in pieces)
    whole, error = map(float, cells(lines, "all")[3].split(" +- "))
    assert whole == pytest.approx(-gain * share, abs=2e-5) and 0 < error < 0.2 * gain
    files = [tmp_path / f"{i}.npz" for i in range(6)]
    for folder, file in zip([*new, *base], files):
        (folder / "scores.npz").rename(file)
    assert lines_of(capsys, *new, "--against", *base, "-o", out, "--scores", *files) == lines
    plain = lines_of(capsys, *new, "--against", *base, "-o", out)
    assert plain == [line for line in lines[: len(plain) - 1]] + [str(out)]


def test_what_differs_is_said(tmp_path, capsys):
    base = write_run(tmp_path / "a", result_of(0, 1.0))
    other = result_of(0, 1.1, settings={"seed": 0, "min_lr": 0.0}, val_sha256="d" * 64)
    lines = lines_of(capsys, write_run(tmp_path / "b", other), "--against", base, "-o", tmp_path / "x.png")
    assert lines[0] == ("differs, besides seeds: setting min_lr 0.0, not the default; "
                        "val_sha256 dddddddddddd, not cccccccccccc")
    shorter = write_run(tmp_path / "c", result_of(0, 1.1, documents=other["documents"] - 1))
    lines = lines_of(capsys, shorter, "--against", base, "-o", tmp_path / "x.png")
    assert "NOT THE SAME VALIDATION TEXT" in lines[0] and lines[1].startswith("differs, besides seeds")


def test_runs_in_logs_can_be_compared(tmp_path, capsys):
    logs = ROOT / "logs"
    lines = lines_of(capsys, logs / "2026-11-27_cpu_smoke-seed7", logs / "2026-11-27_cpu_smoke-seed42",
                     "--against", logs / "2026-11-27_cpu_smoke-seed1337/log.txt", "-o", tmp_path / "x.png")
    assert cells(lines[lines.index("", 2):], "runs")[1] == "none" and lines[0].endswith("nothing")


# Mistakes


def test_what_cannot_be_compared_is_refused(tmp_path, refused):
    a = write_run(tmp_path / "a", result_of(0, 1.0))
    b = write_run(tmp_path / "b", result_of(0, 1.1))
    other = write_run(tmp_path / "other", result_of(1, 1.0, settings={"seed": 1, "min_lr": 0.0}))
    gpu = write_run(tmp_path / "gpu", result_of(0, 1.0, card=H100))
    assert "seed 0 is that of another of these runs" in refused(a, b, "--against", a)
    assert "min_lr is 0.0, but the default" in refused(a, other, "--against", b)
    assert f"{H100}, and on 1 x CPU" in refused(gpu, "--against", a)
    assert f"cannot read {tmp_path}/none" in refused(a, "--against", tmp_path / "none")
    assert "not the log of a finished run" in refused(a, "--against", ROOT / "README.md")
    assert "1 files for 2 runs" in refused(a, "--against", b, "--scores", "x.npz")
    wrong = write_run(tmp_path / "wrong", result_of(0, 1.0, total_bytes="y"))
    assert "another kind" in refused(a, "--against", wrong)
    assert not list(tmp_path.glob("*.png"))


def test_scores_of_something_else_are_refused(tmp_path, refused, capsys):
    rng = np.random.default_rng(3)
    pieces = random_pieces(rng, 8)
    a = scored_run(tmp_path / "a", 0, pieces)
    fewer = scored_run(tmp_path / "fewer", 0, pieces[:7])
    unlike = scored_run(tmp_path / "unlike", 0, pieces[::-1])
    out = "-o", tmp_path / "x.png"
    for other in (fewer, unlike):
        assert "of different documents" in refused(a, "--against", other, *out)
    files = a / "scores.npz", fewer / "scores.npz"
    assert "which is not the val_bpb" in refused(fewer, "--against", a, *out, "--scores", *files)
    (a / "scores.npz").write_bytes(b"no scores")
    assert "not what SAVE_SCORES writes" in refused(a, "--against", unlike, *out)
    (a / "scores.npz").unlink()
    assert compare.main([str(x) for x in (a, "--against", unlike, *out)]) == 0
    assert f"not compared by document: {a}" in capsys.readouterr().err


def test_seeds_without_scores_are_left_out_by_document(tmp_path, capsys):
    pieces = random_pieces(np.random.default_rng(4), 8)
    folders = {(side, seed): scored_run(tmp_path / f"{side}{seed}", seed, pieces)
               for side in ("new", "base") for seed in (0, 1, 2)}
    (folders["new", 1] / "scores.npz").unlink()
    sides = ([folders[side, seed] for seed in (0, 1, 2)] for side in ("new", "base"))
    new, base = sides
    assert compare.main([*map(str, new), "--against", *map(str, base), "-o", str(tmp_path / "x.png")]) == 0
    out, err = capsys.readouterr()
    assert err == f"no scores.npz beside, and so not compared by document: {folders['new', 1]}\n"
    lines = out.splitlines()
    assert "of documents and the 2 seeds" in out and cells(lines[lines.index("", 2) :], "runs")[1] == "3"


def test_without_matplotlib_there_is_no_picture(tmp_path, capsys, monkeypatch):
    a, b = (write_run(tmp_path / name, result_of(0, 1.0)) for name in "ab")
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert compare.main([str(a), "--against", str(b), "-o", str(tmp_path / "x.png")]) == 0
    out, err = capsys.readouterr()
    assert "| runs " in out and err.startswith("no picture") and not (tmp_path / "x.png").exists()


def test_a_picture_that_cannot_be_written_costs_no_table(tmp_path, capsys):
    a, b = (write_run(tmp_path / name, result_of(0, 1.0)) for name in "ab")
    with pytest.raises(SystemExit):
        compare.main([str(a), "--against", str(b), "-o", str(tmp_path / "none/x.png")])
    out, err = capsys.readouterr()
    assert "| runs " in out and "cannot write" in err and err.count("\n") == 1


def test_the_folder_of_a_variant_is_none_of_a_run(tmp_path, refused):
    run = write_run(tmp_path / "low/seed0", result_of(0, 1.0))
    assert f"name them, {tmp_path / 'low'}/seed*" in refused(tmp_path / "low", "--against", run)


def test_only_a_baseline_needs_scipy(tmp_path):
    """tools/submission.py does without until it is to test something."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['scipy'] = None\n")
    run = ROOT / "logs/2026-11-27_cpu_smoke-seed7"
    for baseline, status in (([], 0), (["--baseline", "1.1,1.2"], 2)):
        done = subprocess.run([sys.executable, ROOT / "tools/submission.py", "table", run, *baseline],
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode == status, done.stderr
    assert re.fullmatch(r"error: .*scipy.*: pip install -r requirements.txt\n", done.stderr)
