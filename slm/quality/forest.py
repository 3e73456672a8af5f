"""A random forest as arrays: what scikit-learn has grown, without its objects.

A document goes left where its feature is at most the bound, as far as a leaf; the score is the mean
of its leaves. NumPy does it for all documents and trees at once, level by level.
"""

from typing import Any, NamedTuple

import numpy as np

from slm.errors import UserError

LEAF = -1


class Forest(NamedTuple):
    """All nodes of all trees; a child has a higher number than its parent."""

    roots: np.ndarray  # (trees,) int64: number of each tree's first node
    feature: np.ndarray  # (nodes,) int32: which one is looked at; LEAF
    bound: np.ndarray  # (nodes,) float64
    children: np.ndarray  # (nodes, 2) int64: left, right; of a leaf itself
    value: np.ndarray  # (nodes,) float64

    def scores(self, features: np.ndarray) -> np.ndarray:  # (n, D) float32 -> (n,) float64
        node = np.tile(self.roots, (len(features), 1))  # (n, trees)
        row = np.arange(len(features))[:, None]
        while (inner := self.feature[node] != LEAF).any():
            right = features[row, np.maximum(self.feature[node], 0)] > self.bound[node]
            node = np.where(inner, self.children[node, right.astype(int)], node)
        return self.value[node].mean(axis=1)

    def check(self, where: str, width: int) -> None:
        """What stands on a disk may be anything: every walk ends, and looks at what is there."""
        number, nodes = np.arange(len(self.feature)), len(self.feature)
        inner = self.feature != LEAF
        fits = self.children.shape == (nodes, 2) and len(self.bound) == len(self.value) == nodes
        fits = fits and len(self.roots) > 0 and nodes > 0
        if not fits or not (
            ((self.roots >= 0) & (self.roots < nodes)).all()
            and ((self.feature >= LEAF) & (self.feature < width)).all()
            and (self.children[inner] > number[inner, None]).all()
            and ((self.children[inner] < nodes).all())
            and np.isfinite(self.value).all()
        ):
            raise UserError(f"{where}: its arrays are no forest of {width} features")


def arrays_of(forest: Any) -> Forest:
    """Of a RandomForestRegressor that was fitted."""
    trees = [one.tree_ for one in forest.estimators_]
    sizes = np.array([tree.node_count for tree in trees])
    roots = np.cumsum(sizes) - sizes
    own = np.concatenate([np.arange(size) for size in sizes])
    left = np.concatenate([tree.children_left for tree in trees])
    right = np.concatenate([tree.children_right for tree in trees])
    children = np.column_stack([left, right])
    leaf = left < 0
    children[leaf] = own[leaf, None]
    feature = np.concatenate([tree.feature for tree in trees])
    return Forest(
        roots,
        np.where(leaf, LEAF, feature).astype(np.int32),
        np.concatenate([tree.threshold for tree in trees]),
        children + np.repeat(roots, sizes)[:, None],
        np.concatenate([tree.value[:, 0, 0] for tree in trees]),
    )
