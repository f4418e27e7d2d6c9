"""The share of variance that lies between items, by hand and by simulation."""

import numpy as np
import pytest
from explainable import between_share


def test_by_hand():
    # Within: variances 2 and 2. Means 1 and 5: variance 8, of which 2 / 2 is chance
    assert between_share(np.array([[0.0, 2.0], [4.0, 6.0]])) == pytest.approx(7 / 9)
    assert between_share(np.array([[0.0, 2.0], [2.0, 0.0]])) == 0


def test_a_known_share_is_found():
    rng = np.random.default_rng(0)
    returns = rng.normal(0, 1, (4000, 1)) + rng.normal(0, 3, (4000, 8))
    assert between_share(returns) == pytest.approx(0.1, abs=0.01)
