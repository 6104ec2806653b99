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


def test_a_last_document_without_text_is_read(tmp_path):
    """A BOS alone at the end of validation begins a document that has no target."""
    scores = draw_scores((30, 100))
    path = save(tmp_path / "a.npz", scores._replace(starts=np.append(scores.starts, 130)))
    *_, (total,) = plot_ttt.tables(plot_ttt.read_scores(path), None).values()
    assert total.targets == 130 and total.documents == 2


FOREIGN = {
    "is no archive": lambda scores: b"text",
    "holds other arrays": lambda scores: {"x": np.zeros(3)},
    "holds objects": lambda scores: {**scores, "nll": np.array([{}] * 130)},
    "has a loss too few": lambda scores: {**scores, "nll": scores["nll"][:-1]},
    "has a loss that is none": lambda scores: {**scores, "nll": np.full(130, np.nan)},
    "has losses in rows": lambda scores: {name: value[None] for name, value in scores.items()},
    "has no text": lambda scores: {**scores, "token_bytes": np.zeros(130)},
    "has no documents": lambda scores: {**scores, "document_starts": np.zeros(0, int)},
    "begins in a document": lambda scores: {**scores, "document_starts": np.array([1, 30])},
    "has documents out of order": lambda scores: {**scores, "document_starts": np.array([0, 50, 30])},
    "has documents past its end": lambda scores: {**scores, "document_starts": np.array([0, 131])},
    "has nothing": lambda scores: {name: value[:0] for name, value in scores.items()},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_end_in_one_line(tmp_path, capsys, kind):
    path = tmp_path / "a.npz"
    nll, token_bytes, starts = draw_scores((30, 100))
    made = FOREIGN[kind](dict(nll=nll, token_bytes=token_bytes, document_starts=starts))
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        np.savez(path, **made)
    with pytest.raises(SystemExit) as ended:
        plot_ttt.main([str(path)])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith(f"error: {path}: not what SAVE_SCORES writes")
    assert err.count("\n") == 1


def test_what_would_unpack_to_more_than_it_is_is_refused(tmp_path, capsys):
    """SAVE_SCORES does not compress, so that no small file takes all memory."""
    scores = draw_scores((30, 100))
    np.savez_compressed(tmp_path / "a.npz", nll=np.zeros(10**6), token_bytes=np.ones(10**6),
                        document_starts=scores.starts)
    with pytest.raises(SystemExit):
        plot_ttt.main([str(tmp_path / "a.npz")])
    assert "it is compressed" in capsys.readouterr().err


def test_mistakes_end_in_one_line(tmp_path, capsys):
    scores = draw_scores((30, 100))
    good = str(save(tmp_path / "a.npz", scores))
    other = str(save(tmp_path / "b.npz", scores._replace(starts=scores.starts + [0, 1])))
    assert plot_ttt.main([good, other]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {good} and {other} are scores of different documents\n"
    for missing in ("missing.npz", "\udcff\n.npz"):
        with pytest.raises(SystemExit):
            plot_ttt.main([str(tmp_path / missing)])
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "No such file" in err


def test_scores_of_a_run(tiny_data, tmp_path, capfd):
    """What a run saves is what this reads, and the total is the run's."""
    scores = tmp_path / "scores.npz"
    places = dict(DATA_DIR=tiny_data, ARTIFACT_DIR=tmp_path / "run", SAVE_SCORES=scores)
    assert tg.main(as_environment({**TINY, **SHALLOW, "ITERATIONS": 2, **places})) == 0
    (final,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("final ")]
    *_, (total,) = plot_ttt.tables(plot_ttt.read_scores(scores), None).values()
    assert f"val_bpb:{total.bpb:.8f}" in final and total.value == total.bpb and total.documents == 5
