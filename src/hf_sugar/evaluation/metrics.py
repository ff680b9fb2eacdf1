"""Ranks, recalls and bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


BOOTSTRAP = {"confidence": 0.95, "resamples": 2000, "seed": 0}
Relevant = Sequence[set[int]] | Sequence[int]


@dataclass(frozen=True)
class Estimate:
    """
    A measured percentage, the ends of its confidence interval, and the number of queries that it is the mean of.

    ```python
    >>> print(Estimate(63.1, 58.9, 67.2, 500))
    63.1 [58.9, 67.2]
    ```
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def from_hits(cls, hits: Sequence[float], groups: Sequence[int] | None = None) -> "Estimate":
        """Mean of per-query `hits` (0 to 1) with its 95% interval; `groups` as in [`bootstrap_interval`]."""
        hits = np.asarray(hits, dtype=np.float64)
        low, high = bootstrap_interval(hits, groups=groups)
        return cls(100 * float(hits.mean()), 100 * low, 100 * high, len(hits))

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def ranks(scores: np.ndarray, relevant: Relevant) -> np.ndarray:
    """
    Rank of the best relevant candidate of each query, counted from 1.

    Ties are broken pessimistically: an irrelevant candidate with the same score counts as ranked above.

    Args:
        scores (`np.ndarray` of shape `(queries, candidates)`): Higher is more similar.
        relevant (`Sequence[set[int]]` or `Sequence[int]` or `np.ndarray` of shape `(queries,)`):
            For each query, the index of its relevant candidate or the set of all of them.

    Returns:
        `np.ndarray` of shape `(queries,)`, int64. A `ValueError` if shapes disagree, a score is NaN, or a query has no
        relevant candidate or one out of range.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or len(scores) != len(relevant):
        raise ValueError(f"`scores` has shape {scores.shape}; expected ({len(relevant)}, candidates).")
    result = np.empty(len(scores), dtype=np.int64)
    for q, (row, answers) in enumerate(zip(scores, relevant, strict=True)):
        if np.isnan(row).any():
            raise ValueError(f"`scores` of query {q} hold NaN: the embeddings overflowed. Use bfloat16 or float32.")
        answers = np.unique(list(answers) if isinstance(answers, set | frozenset | list | tuple) else [answers])
        if len(answers) == 0 or answers[0] < 0 or answers[-1] >= len(row):
            needed = f"each query needs at least one index from 0 to {len(row) - 1}"
            raise ValueError(f"`relevant[{q}]` is {answers.tolist()}; {needed}.")
        best = row[answers].max()
        result[q] = 1 + np.count_nonzero(row >= best) - np.count_nonzero(row[answers] >= best)
    return result


def recall_at_k(scores: np.ndarray, relevant: Relevant, ks: Sequence[int] = (1, 5, 10)) -> dict[int, np.ndarray]:
    """Whether each query finds a relevant candidate, one of several being enough, among its k best ones: for each k float64
    0 or 1, of shape `(queries,)`, whose mean is the recall. Scores and relevant candidates are as for [`ranks`]."""
    positions = ranks(scores, relevant)
    return {k: (positions <= k).astype(np.float64) for k in ks}


def bootstrap_interval(values: Sequence[float], groups: Sequence[int] | None = None) -> tuple[float, float]:
    """
    Lower and upper end of the percentile bootstrap interval of a mean, with the settings of `BOOTSTRAP`. Where all values
    are equal the interval is that one point, however few the values: it says nothing then.

    Args:
        values (`Sequence[float]` or `np.ndarray` of shape `(n,)`): One value for each query; none is a `ValueError`.
        groups (`Sequence[int]` or `np.ndarray` of shape `(n,)`, *optional*):
            Label of the group each value belongs to. Whole groups are resampled then. Queries from one story, or from
            one image, are not independent, and an interval that takes them for it is too narrow.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("`values` is empty: no query was evaluated, so there is no mean to give an interval of.")
    _, members = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    sums, counts = np.bincount(members, weights=values), np.bincount(members)
    generator = np.random.default_rng(BOOTSTRAP["seed"])
    means = np.empty(BOOTSTRAP["resamples"])
    for r in range(len(means)):  # one at a time: (resamples, n) indices do not fit in memory for large n
        drawn = generator.integers(len(sums), size=len(sums))
        means[r] = sums[drawn].sum() / counts[drawn].sum()
    outside = (1 - BOOTSTRAP["confidence"]) / 2
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(low), float(high)
