"""The share of variance that lies between items, by hand and by simulation."""

import explainable
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


def test_later_rewards_count_less():
    assert explainable.discounted([1.0, 2.0, 4.0], 0.5) == 1 + 1 + 1
    assert explainable.discounted([], 0.5) == 0


def test_it_plays_with_the_script(capsys):
    explainable.main(explainable.Args(task="strbuild", items=2, samples=2))
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("lies between items") and 0 <= float(told[0].split()[0]) <= 1
    assert told[1].endswith("its reward explains")
