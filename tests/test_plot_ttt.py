"""tools/plot_ttt.py: figures by hand, tables, drawing, mistakes."""
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import plot_ttt  # noqa: E402


def save(path, nll, size, starts):
    np.savez(path, nll=np.float32(nll), token_bytes=np.uint16(size), document_starts=starts)
    return path


def made_up(lengths, seed=0):
    """(base nll, token bytes, document starts)."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    return rng.uniform(1, 5, n).astype(np.float32), rng.integers(0, 9, n), np.cumsum([0, *lengths[:-1]])


def test_a_ratio_and_its_error_by_hand():
    value, error = plot_ttt.ratio(np.array([2.0, 1.0]), np.array([1.0, 2.0]))
    assert value == 1 and error == pytest.approx(np.sqrt((1 + 1) * 2) / 3)
    value, error = plot_ttt.ratio(np.array([3.0]), np.array([2.0]))
    assert value == 1.5 and np.isnan(error), "one document says nothing about others"
    assert np.isnan(plot_ttt.ratio(np.ones(1), np.zeros(1))).all()


def test_the_error_is_that_of_other_draws_of_documents():
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(400):
        size = rng.integers(50, 500, 100)
        draws.append(plot_ttt.ratio(size * rng.normal(1, 0.2, 100), size))
    values, errors = np.array(draws).T
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.15)


def test_gains_are_found_where_they_are():
    """A gain of a tenth of a nat from position 96 on, of documents longer than 192 only."""
    lengths = (30, 100, 150, 300, 400, 500)
    base, size, starts = made_up(lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    long = np.repeat(np.array(lengths) >= 192, lengths)
    nll = base - np.float32(0.1) * ((position >= 96) & long)
    scores, before = (plot_ttt.Scores(x.astype(float), size.astype(float), starts) for x in (nll, base))
    by_position, by_length, (total,) = plot_ttt.tables(scores, before).values()
    assert [row.name for row in by_position] == ["0-48", "48-96", "96-192", "192-384", "384-768"]
    assert [row.documents for row in by_position] == [6, 5, 5, 3, 2]
    assert [row.name for row in by_length] == ["0-48", "96-192", "192-384", "384-768"], "no row without documents"
    assert [row.documents for row in by_length] == [1, 2, 1, 2]
    assert all(row.value == row.error == 0 for row in (*by_position[:2], *by_length[:2]) if row.documents > 1)
    assert all(row.value > 0 for row in (*by_position[2:], *by_length[2:]))
    chosen = (position >= 192) & (position < 384)
    assert by_position[3].value == pytest.approx(0.1 * chosen.sum() / np.log(2) / size[chosen].sum(), rel=1e-4)
    for rows in (by_position, by_length):
        assert sum(row.targets for row in rows) == total.targets == sum(lengths)
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert sum(row.share * row.value for row in rows) == pytest.approx(total.value)
    assert total.bpb == pytest.approx(nll.astype(float).sum() / np.log(2) / size.sum())


def test_table_and_drawing(tmp_path, capsys):
    base, size, starts = made_up((30, 100, 300))
    a, b = save(tmp_path / "a.npz", base - 0.05, size, starts), save(tmp_path / "b.npz", base, size, starts)
    for arguments, words in (([a, b], "gain"), ([a], "bpb")):
        out = tmp_path / f"{words}.png"
        assert plot_ttt.main([*map(str, arguments), "-o", str(out)]) == 0
        printed = capsys.readouterr().out
        assert words in printed and "192-384" in printed and printed.splitlines()[-1] == str(out)
        assert ("gain" in printed) == (words == "gain")
        assert out.read_bytes().startswith(b"\x89PNG")


def test_mistakes_end_in_one_line(tmp_path):
    base, size, starts = made_up((30, 100))
    good, other = save(tmp_path / "a.npz", base, size, starts), save(tmp_path / "b.npz", base, size, starts + [0, 1])
    (tmp_path / "no.npz").write_text("text")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    for name in ("no.npz", "foreign.npz", "missing.npz"):
        with pytest.raises(SystemExit, match=f"error: .*{name}: not what SAVE_SCORES writes"):
            plot_ttt.main([str(tmp_path / name)])
    with pytest.raises(SystemExit, match="error: .* different documents"):
        plot_ttt.main([str(good), str(other)])


def test_scores_of_a_run(tiny_data, tmp_path, capfd):
    """What a run saves is what this reads, and the total is the run's."""
    settings = {**TINY, "NUM_LAYERS": 2, "PARALLEL_START_LAYER": 1, "NUM_LOOPS": 0, "ITERATIONS": 2,
                "DATA_DIR": tiny_data, "ARTIFACT_DIR": tmp_path / "run", "SAVE_SCORES": tmp_path / "scores.npz"}
    assert tg.main({name: str(value) for name, value in settings.items()}) == 0
    final = [line for line in capfd.readouterr().out.splitlines() if line.startswith("final ")][0]
    *_, (total,) = plot_ttt.tables(plot_ttt.read_scores(tmp_path / "scores.npz"), None).values()
    assert f"val_bpb:{total.bpb:.8f}" in final and total.value == total.bpb and total.documents == 5
