"""tools/plot_ttt.py: figures by hand, tables, drawing, mistakes."""
import sys

import numpy as np
import pytest

import train_gpt as tg
from conftest import ROOT, SHALLOW, TINY, as_environment

sys.path.insert(0, str(ROOT / "tools"))
import plot_ttt


def draw_scores(lengths) -> plot_ttt.Scores:
    """Random losses of documents with so many targets."""
    rng = np.random.default_rng(0)
    targets = sum(lengths)
    nll = rng.uniform(1, 5, targets).astype(np.float32)
    token_bytes = rng.integers(0, 9, targets)
    return plot_ttt.Scores(nll, token_bytes, np.cumsum(lengths) - lengths)


def save(path, scores):
    """Write scores as SAVE_SCORES does."""
    np.savez(path, nll=np.float32(scores.nll), token_bytes=np.uint16(scores.token_bytes),
             document_starts=scores.starts)
    return path


def test_a_ratio_and_its_error_by_hand():
    value, error = plot_ttt.ratio(np.array([2.0, 1.0]), np.array([1.0, 2.0]))
    assert value == 1 and error == pytest.approx(np.sqrt((1 + 1) * 2) / 3)
    value, error = plot_ttt.ratio(np.array([3.0]), np.array([2.0]))
    assert value == 1.5 and np.isnan(error), "one document says nothing about others"
    assert np.isnan(plot_ttt.ratio(np.ones(1), np.zeros(1))).all()


def test_the_error_is_that_of_other_draws_of_documents():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(400):
        size = rng.integers(50, 500, 100)
        bits = size * rng.normal(1, 0.2, 100)
        ratios.append(plot_ttt.ratio(bits, size))
    values, errors = np.array(ratios).T
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.15)


def test_gains_are_found_where_they_are():
    """A gain of a tenth of a nat from position 96 on, of documents longer than 192 only."""
    lengths = (30, 100, 150, 300, 400, 500)
    base = draw_scores(lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    in_long_document = np.repeat(np.array(lengths) >= 192, lengths)
    nll = base.nll - np.float32(0.1) * ((position >= 96) & in_long_document)
    size = base.token_bytes.astype(float)
    base = base._replace(nll=base.nll.astype(float), token_bytes=size)
    scores = base._replace(nll=nll.astype(float))

    by_position, by_length, (total,) = plot_ttt.tables(scores, base).values()
    assert [row.name for row in by_position] == ["0-48", "48-96", "96-192", "192-384", "384-768"]
    assert [row.documents for row in by_position] == [6, 5, 5, 3, 2]
    assert [row.name for row in by_length] == ["0-48", "96-192", "192-384", "384-768"], "no empty rows"
    assert [row.documents for row in by_length] == [1, 2, 1, 2]
    for row in (*by_position[:2], *by_length[:2]):
        assert row.documents == 1 or row.value == row.error == 0
    assert all(row.value > 0 for row in (*by_position[2:], *by_length[2:]))
    in_bin = (position >= 192) & (position < 384)
    gained_bits = 0.1 * in_bin.sum() / np.log(2)
    assert by_position[3].value == pytest.approx(gained_bits / size[in_bin].sum(), rel=1e-4)
    for rows in (by_position, by_length):
        assert sum(row.targets for row in rows) == total.targets == sum(lengths)
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert sum(row.share * row.value for row in rows) == pytest.approx(total.value)
    assert total.bpb == pytest.approx(scores.nll.sum() / np.log(2) / size.sum())


def test_table_and_drawing(tmp_path, capsys):
    base = draw_scores((30, 100, 300))
    scores = save(tmp_path / "a.npz", base._replace(nll=base.nll - 0.05))
    base = save(tmp_path / "b.npz", base)
    for files, title in (([scores, base], "gain"), ([scores], "bpb")):
        out = tmp_path / f"{title}.png"
        assert plot_ttt.main([*map(str, files), "-o", str(out)]) == 0
        printed = capsys.readouterr().out
        assert title in printed and "192-384" in printed and printed.splitlines()[-1] == str(out)
        assert ("gain" in printed) == (title == "gain")
        assert out.read_bytes().startswith(b"\x89PNG")


def test_mistakes_end_in_one_line(tmp_path):
    scores = draw_scores((30, 100))
    good = save(tmp_path / "a.npz", scores)
    other = save(tmp_path / "b.npz", scores._replace(starts=scores.starts + [0, 1]))
    (tmp_path / "no.npz").write_text("text")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    for name in ("no.npz", "foreign.npz", "missing.npz"):
        with pytest.raises(SystemExit, match=f"error: .*{name}: not what SAVE_SCORES writes"):
            plot_ttt.main([str(tmp_path / name)])
    with pytest.raises(SystemExit, match="error: .* different documents"):
        plot_ttt.main([str(good), str(other)])


def test_scores_of_a_run(tiny_data, tmp_path, capfd):
    """What a run saves is what this reads, and the total is the run's."""
    scores = tmp_path / "scores.npz"
    places = dict(DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "run", SAVE_SCORES=scores)
    assert tg.main(as_environment({**TINY, **SHALLOW, "ITERATIONS": 2, **places})) == 0
    (final,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("final ")]
    *_, (total,) = plot_ttt.tables(plot_ttt.read_scores(scores), None).values()
    assert f"val_bpb:{total.bpb:.8f}" in final and total.value == total.bpb and total.documents == 5
