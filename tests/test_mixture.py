"""The mixture of models and n-grams against a naive count, token by token."""
import collections
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_legality import validation_of

import train_gpt as tg

BOS, PIECES = 1, 5  # so few that long contexts come again


def votes_of(document):
    """The votes for every piece, (PIECES,), before each target of a document is looked at; then it counts."""
    followers = {k: collections.defaultdict(lambda: np.zeros(PIECES)) for k in tg.CACHE}
    for end in range(1, len(document)):
        counts = {k: followers[k][tuple(document[end - k : end])] for k in tg.CACHE if k <= end}
        weights = {k: tg.CACHE[k] for k in counts}
        yield sum(w * counts[k] / max(counts[k].sum() + c, 1) for k, (w, c) in weights.items())
        for h in counts.values():
            h[document[end]] += 1


def mixed(documents, adapted, plain):
    val = validation_of([np.array(document) for document in documents])
    adapted, plain = (torch.from_numpy(nll.astype(np.float32)) for nll in (adapted, plain))
    return tg.final_losses(adapted, plain, tg.count_votes(val, PIECES, torch.device("cpu"))).numpy()


def check_mixture(documents):
    """Against a mixture that is made before each target is looked at, and adds up to 1 over all pieces."""
    rng = np.random.default_rng(0)
    models = rng.dirichlet(np.ones(PIECES), (sum(map(len, documents)) - 1, 2))
    targets, expected = [], []
    for number, document in enumerate(documents):
        followed = document + [BOS] if number < len(documents) - 1 else document
        for target, votes in zip(followed[1:], votes_of(followed)):
            adapted, plain = models[len(targets)]
            pieces = (0.7 * adapted + 0.3 * plain + votes) / (1 + votes.sum())
            assert pieces.sum() == pytest.approx(1)
            targets.append(target)
            expected.append(-math.log(pieces[target]))
    nll = -np.log(models[np.arange(len(targets)), :, targets])
    assert np.allclose(mixed(documents, *nll.T), expected, rtol=0, atol=2e-6)


tokens = st.lists(st.sampled_from([0, 2, 3, 4]), max_size=60)
repeats = st.tuples(st.lists(st.sampled_from([0, 2, 3, 4]), min_size=1, max_size=20), st.integers(1, 4))
documents = st.one_of(tokens, repeats.map(lambda drawn: drawn[0] * drawn[1])).map(lambda text: [BOS, *text])


@given(st.lists(documents, min_size=1, max_size=5).filter(lambda drawn: sum(map(len, drawn)) > 1))
@example([[BOS, 2, 3], [BOS], [BOS, 2, 3, 2, 3], [BOS]])
@example([[BOS, *[2, 3, 4] * 20]])
@settings(max_examples=150, deadline=None)
def test_the_mixture_is_what_a_naive_count_gives(documents):
    check_mixture(documents)


def test_it_is_no_other_in_long_documents_and_in_many_that_share_passages():
    rng = np.random.default_rng(0)
    text = rng.choice([0, 2, 3, 4], 4000)
    passages = [text[start : start + length] for start, length in rng.integers([0, 20], [900, 60], (700, 2))]
    check_mixture([[BOS, *text, *text[:1000]], *([BOS, *passage, *passage[:30]] for passage in passages)])


def test_impossible_targets_have_a_finite_loss():
    """Losses so large that probabilities are 0 in fp32, with votes for the target and without."""
    nll = np.full(4, 500.0)
    losses = mixed([[BOS, 2, 2, 2, 3]], nll, nll)
    assert np.isfinite(losses).all() and losses[0] == 500 and losses[2] < 10 and losses[3] > 499


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
@settings(deadline=None)
def test_equal_keys_are_numbered_and_counted(keys):
    numbers, before = tg.number_equal(torch.tensor(keys))
    for i, key in enumerate(keys):
        assert before[i] == keys[:i].count(key)
        assert ((numbers == numbers[i]) == (torch.tensor(keys) == key)).all()


@pytest.mark.gpu
def test_a_gpu_counts_the_same():
    rng = np.random.default_rng(0)
    text = rng.choice([0, 2, 3, 4], 5000)
    val = validation_of([np.append(BOS, text[start : start + 300]) for start in rng.integers(0, 4700, 200)])
    votes = [tg.count_votes(val, PIECES, torch.device(device)) for device in ("cpu", "cuda")]
    torch.testing.assert_close(*votes, rtol=1e-6, atol=1e-7)
