"""One rule for every head: the least losses at several lengths under a budget, as a mixed integer programme.

Several lengths are several aims: the epsilon-constraint method minimises one under limits on the others, which step
from the most to the least that they can be, and keeps what nothing found is better than. HiGHS, by scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.contract.errors import RegardError
from regard.contract.optional import need

_POINTS = 5
# the solver's tolerances are absolute: losses are scaled so that they are relative ones of 1e-9
_SCALE, _SLACK = 1e3, 1e-6


class RuleChoice:
    """Unknowns: x[head, rule], then, if the rules of a layer are limited, y[layer, rule], all 0 or 1.

    losses: float64 (lengths, heads of all layers, rules). seen: blocks that a rule sees at each length of the budget
    (lengths, rules), of `blocks` there are. budget: mean of seen / blocks over the heads. layers: of the heads.
    distinct: most rules in a layer, None for any number. gap: relative, at which the solver may stop. Raises
    MissingExtra.
    """

    def __init__(
        self,
        losses: NDArray[np.float64],
        seen: Sequence[Sequence[int]],
        blocks: Sequence[int],
        budget: float,
        layers: int,
        distinct: int | None,
        gap: float,
    ):
        self.sparse, self.optimize = need("scipy.sparse", "explain"), need("scipy.optimize", "explain")
        self.gap = gap
        self.lengths, self.heads, self.rules = losses.shape
        most = np.abs(losses).max(2).sum(1)
        self.losses = losses * (_SCALE / np.where(most == 0, 1.0, most))[:, None, None]
        self.extra = 0 if distinct is None else layers * self.rules
        self.structure = self._structure(layers, distinct)
        every, there = np.ones((1, self.heads)), np.asarray(blocks)
        self.density = self._wide(self.sparse.kron(every, np.asarray(seen) / (self.heads * there)[:, None]))
        # whole numbers of blocks, so that rounding cannot break the budget
        room = np.floor(budget * self.heads * there + 1e-9) + 0.5
        self.within = [*self.structure, self._rows(self._wide(self.sparse.kron(every, np.asarray(seen))), room)]

    def front(self) -> list[NDArray[np.int64]]:
        """The rules of all heads (heads,) for each plan that no other found beats; empty if none is in budget."""
        unlimited = np.full(self.lengths, np.inf)
        found = [self._choose(first, unlimited) for first in range(self.lengths)]
        ends = [choice for choice in found if choice is not None]
        if len(ends) < self.lengths:
            return []
        reached = np.stack([self._value(choice) for choice in ends])
        points = np.linspace(reached.max(0), reached.min(0), _POINTS)
        if self.lengths > 1:
            ends += [choice for first in range(self.lengths) for choice in self._between(first, points)]
        values = np.stack([self._value(choice) for choice in ends])
        _, unique = np.unique(values.round(6), axis=0, return_index=True)
        return [
            ends[i]
            for i in sorted(unique)
            if not any((values[j] <= values[i]).all() and (values[j] < values[i] - _SLACK).any() for j in unique)
        ]

    def least_density(self) -> float:
        """The least that the largest mean density over the lengths of the budget can be."""
        sparse = self.sparse
        rows = [
            self.optimize.LinearConstraint(sparse.hstack([c.A, sparse.csr_array((c.A.shape[0], 1))]), c.lb, c.ub)
            for c in self.structure
        ]
        # one more unknown, no smaller than any density, is minimised
        largest = sparse.hstack([self.density, -np.ones((self.density.shape[0], 1))])
        whole = np.ones(largest.shape[1])
        whole[-1] = 0
        return float(self._solve(1 - whole, [*rows, self._rows(largest, 0)], whole).fun)

    def _between(self, first: int, points: NDArray[np.float64]) -> list[NDArray[np.int64]]:
        """The best at one length under every combination of limits (points, lengths) on the others."""
        others = np.flatnonzero(np.arange(self.lengths) != first)
        tried: list[tuple[NDArray[np.float64], NDArray[np.int64] | None]] = []
        for place in product(range(_POINTS), repeat=len(others)):
            limits = np.full(self.lengths, np.inf)
            limits[others] = points[place, others]
            # a looser problem whose answer fits, or that has none, has answered this one
            if not any(
                (limits <= given).all() and (choice is None or (self._value(choice) <= limits + _SLACK).all())
                for given, choice in tried
            ):
                tried.append((limits, self._choose(first, limits)))
        return [choice for _, choice in tried if choice is not None]

    def _choose(self, first: int, limits: NDArray[np.float64]) -> NDArray[np.int64] | None:
        """The rules with the least loss at one length within limits (lengths,) at all; None if there are none."""
        cost = self.losses[first]
        limited = np.isfinite(limits)
        rows = list(self.within)
        if limited.any():
            losses = self.losses[limited].reshape(limited.sum(), -1)
            rows.append(self._rows(self._wide(self.sparse.csr_array(losses)), limits[limited] + _SLACK))
        whole = np.concatenate([cost.ravel(), np.zeros(self.extra)])
        found = self._solve(whole, rows, np.ones(whole.size))
        return None if found is None else found.x[: cost.size].reshape(cost.shape).argmax(1)

    def _solve(self, cost: NDArray[np.float64], rows: list[Any], whole: NDArray[np.float64]) -> Any:
        found = self.optimize.milp(
            cost,
            integrality=whole,
            bounds=self.optimize.Bounds(0, 1),
            constraints=rows,
            options={"mip_rel_gap": self.gap},
        )
        if found.status not in (0, 2):
            raise RegardError(f"the solver stopped without an answer: {found.message}")
        return found if found.status == 0 else None

    def _structure(self, layers: int, distinct: int | None) -> list[Any]:
        """One rule for every head, and few in a layer."""
        sparse, ones = self.sparse, np.ones((1, self.rules))
        one = self._wide(sparse.kron(sparse.eye_array(self.heads), ones))
        if distinct is None:
            return [self._rows(one, 1, 1)]
        of_layer = np.kron(np.eye(layers), np.ones((self.heads // layers, 1)))
        pairs = self.heads * self.rules
        used = sparse.hstack([sparse.eye_array(pairs), -sparse.kron(of_layer, sparse.eye_array(self.rules))])
        kinds = sparse.hstack([sparse.csr_array((layers, pairs)), sparse.kron(np.eye(layers), ones)])
        return [self._rows(one, 1, 1), self._rows(used, 0), self._rows(kinds, distinct)]

    def _rows(self, table: Any, most: Any, least: float = -np.inf) -> Any:
        return self.optimize.LinearConstraint(table.tocsr(), least, most)

    def _wide(self, rows: Any) -> Any:
        """Rows over x, with nothing for y."""
        return self.sparse.hstack([rows, self.sparse.csr_array((rows.shape[0], self.extra))])

    def _value(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.losses[:, np.arange(self.heads), choice].sum(1)
