"""Which figures of a run are reported: the split that chooses, and the epochs that count.

``val-selected``, the default, reports the test figures of the epoch with the best validation score, and the test split
is looked at for that epoch alone. The other two are conventions of papers, for laying results beside theirs; both look
at the test split again and again, so what they report is not an estimate for unseen data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LAST", "PROTOCOLS", "SELECTIONS", "best_epoch", "looks_at_test", "mean_figures", "score"]

PROTOCOLS = {
    "val-selected": "test figures of the epoch that was best on the validation split",
    "last-10-test": "mean of the test figures of the last ten epochs (MTAN, PCGrad, CAGrad, Nash-MTL on NYUv2)",
    "max-over-training": "test figures of the epoch whose mean over seeds was best on the TEST split (CAGrad on MT10)",
}
LAST = 10

Figures = Mapping[str, Mapping[str, float]]
"""Task -> metric -> value."""


def looks_at_test(protocol: str, epoch: int, epochs: int) -> bool:
    """Whether the test split is evaluated after an epoch (from 1), whatever the validation split says."""
    return protocol == "max-over-training" or (protocol == "last-10-test" and epoch > epochs - LAST)


SELECTIONS = ("log", "mean")


def score(directions: Mapping[str, Mapping[str, str]], figures: Figures, selection: str = "log") -> float:
    """What the best epoch is chosen by: the mean ``log`` of the figures, errors negated, or the ``mean`` itself.

    The change of the former is, to first order, delta-m, without needing a baseline; a figure of 0 outweighs all
    others. The latter is for figures of one kind that may be 0, such as success rates.
    """
    terms = [
        (1 if directions[task][metric] == "max" else -1)
        * (math.log(max(value, 1e-12)) if selection == "log" else value)
        for task, values in figures.items()
        for metric, value in values.items()
    ]
    return sum(terms) / len(terms)


def mean_figures(rows: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Figure by figure the mean over epochs."""
    first = rows[0]
    return {
        task: {metric: math.fsum(row[task][metric] for row in rows) / len(rows) for metric in values}
        for task, values in first.items()
    }


def best_epoch(
    directions: Mapping[str, Mapping[str, str]], seeds: Sequence[Sequence[Mapping[str, Any]]], selection: str = "log"
) -> int:
    """The epoch (from 1) whose test figures, averaged over seeds, score best; ``seeds``: the history of each."""
    length = min(len(history) for history in seeds)
    means = [mean_figures([history[k]["test"] for history in seeds]) for k in range(length)]
    scores = [score(directions, figures, selection) for figures in means]
    return 1 + max(range(length), key=lambda k: (scores[k], -k))
