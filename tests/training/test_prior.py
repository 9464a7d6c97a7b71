"""The share of positives among unlabelled scores, on generated scores with a known share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracereward.training.prior import estimate_prior


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_known_share_is_found_and_bounded(share, seed):
    """Positives around 1 and the others around -1, with deviation .7: 8 % on the wrong side of 0."""
    rng = np.random.default_rng(seed)
    positive = rng.normal(1, 0.7, 1000)
    right = rng.random(2000) < share
    unlabelled = np.where(right, rng.normal(1, 0.7, 2000), rng.normal(-1, 0.7, 2000))
    found = estimate_prior(positive, unlabelled)
    assert found.value == pytest.approx(share, abs=0.08)
    assert share <= found.upper <= share + 0.2


def test_by_hand():
    """All positives at 1 and a quarter of 400 unlabelled there: the only threshold is 1, with the ratio 1/4."""
    found = estimate_prior([1.0] * 100, [1.0] * 100 + [0.0] * 300)
    w_p, w_u = (np.sqrt(np.log(40) / (2 * n)) for n in (100, 400))
    assert found == pytest.approx((0.25, (0.25 + w_u) / (1 - w_p), 1.0))


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=30), st.lists(st.integers(-9, 9), min_size=1, max_size=30))
def test_threshold_minimises_the_bound_by_brute_force(positive, unlabelled):
    def bound(c):
        q_p, q_u = (np.mean([score >= c for score in scores]) for scores in (positive, unlabelled))
        width = sum(np.sqrt(np.log(40) / (2 * len(scores))) for scores in (positive, unlabelled))
        return q_u / q_p + 1.01 / q_p * width

    found = estimate_prior(positive, unlabelled)
    best = min(bound(c) for c in np.arange(-10, max(positive) + 0.25, 0.25))
    assert bound(found.threshold) == pytest.approx(best)
    assert 0 <= found.value <= found.upper <= 1


@pytest.mark.parametrize("scores", [([], [1.0]), ([1.0], []), ([float("nan")], [1.0])])
def test_scores_that_say_nothing_are_refused(scores):
    with pytest.raises(ValueError, match="finite scores"):
        estimate_prior(*scores)
