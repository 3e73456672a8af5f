"""The arrays of a forest say what scikit-learn's objects say, and arrays of anybody are checked."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor

from slm.errors import UserError
from slm.quality.forest import Forest, arrays_of


@pytest.fixture(scope="module")
def grown():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 5)).astype(np.float32)
    labels = rng.integers(0, 6, 80)
    return RandomForestRegressor(7, random_state=0).fit(features, labels)


def test_scores_are_those_of_the_forest(grown):
    forest = arrays_of(grown)
    forest.check("here", 5)
    features = np.random.default_rng(1).normal(size=(300, 5)).astype(np.float32)
    features[:80] = np.float32(grown.estimators_[0].tree_.threshold[0])  # on a bound: left
    np.testing.assert_allclose(forest.scores(features), grown.predict(features), rtol=1e-12)


def test_a_tree_of_one_leaf():
    lonely = RandomForestRegressor(2, random_state=0).fit(np.zeros((4, 3)), [2, 2, 2, 2])
    assert arrays_of(lonely).scores(np.ones((2, 3), np.float32)).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("array", "place", "value"),
    [
        ("children", (0, 0), 0),  # it would go round for ever
        ("children", (0, 1), 10**9),
        ("feature", 0, 5),
        ("feature", 0, -2),
        ("roots", 1, -1),
        ("value", 3, np.nan),
    ],
)
def test_arrays_that_are_no_forest(grown, array, place, value):
    broken = {name: one.copy() for name, one in arrays_of(grown)._asdict().items()}
    broken[array][place] = value
    with pytest.raises(UserError, match="here: its arrays are no forest of 5 features"):
        Forest(**broken).check("here", 5)
