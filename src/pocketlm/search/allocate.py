"""The exact choice of one candidate a unit: a multiple-choice knapsack as an integer program.

minimise  Σ damage[u][c] x[u][c]   subject to   Σ_c x[u][c] = 1,   Σ price[u][c] x[u][c] ≤ budget,
x binary, solved to optimality by HiGHS through scipy. Prices are whole numbers (bits or bytes), and
the solution is checked against the budget in whole numbers, whatever the solver's tolerance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from pocketlm.core.errors import BudgetError, NumericError

GAP = 1e-6  # of the damage; far below what any measurement of it can tell
ROOM = 1e6  # what the budget leaves to decide on, as the solver sees it
ATTEMPTS = 8


def smallest(prices: Sequence[Sequence[int]]) -> int:
    """The least that any choice costs."""
    return sum(min(row) for row in prices)


def allocate(
    damages: Sequence[Sequence[float]], prices: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """The choice of least summed damage within a budget.

    Args:
        damages: By unit and candidate, not negative.
        prices: The same, in whole bits or bytes.
        budget: What the prices may sum up to.

    Returns:
        The chosen candidate of each unit.

    Raises:
        BudgetError: If the cheapest candidates together are over the budget.
        NumericError: If the solver finds no solution though there is one.
    """
    if smallest(prices) > budget:
        raise BudgetError(
            f"{budget:,} is below the smallest that is possible, {smallest(prices):,}.",
            remedy="Raise the budget.",
        )
    allowed = budget
    for _ in range(ATTEMPTS):
        chosen = _solve(damages, prices, allowed)
        over = sum(row[c] for row, c in zip(prices, chosen, strict=True)) - budget
        if over <= 0:
            return chosen
        # The solver took its tolerance; leave that much out.
        allowed = max(allowed - over, smallest(prices))
    raise NumericError("the solver did not keep to the budget.", remedy="Try another budget.")


def _solve(
    damages: Sequence[Sequence[float]], prices: Sequence[Sequence[int]], budget: int
) -> list[int]:
    counts = [len(row) for row in damages]
    damage = np.concatenate([np.asarray(row, dtype=float) for row in damages])
    # What every choice costs at least is no decision; nor is one dearer than all that is left.
    extra = np.concatenate([np.asarray(row, dtype=float) - min(row) for row in prices])
    room = budget - smallest(prices)
    possible = extra <= room
    unit_of, columns = np.repeat(np.arange(len(counts)), counts), np.arange(len(damage))
    one_each = csr_array((np.ones(len(damage)), (unit_of, columns)))
    # The solver's tolerance is 1e-6, absolute: a room of a million keeps it below one whole price.
    scale = ROOM / max(room, 1)
    within = LinearConstraint((scale * extra * possible)[None], ub=scale * room)
    found = milp(
        damage / max(damage.max(), 1e-30),
        constraints=[LinearConstraint(one_each, 1, 1), within],
        integrality=np.ones(len(damage)),
        bounds=Bounds(np.zeros(len(damage)), possible.astype(float)),  # type: ignore[arg-type]
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        raise NumericError(f"the solver failed: {found.message}", remedy="Try another budget.")
    starts = np.concatenate([[0], np.cumsum(counts)])
    return [int(np.argmax(found.x[start:stop])) for start, stop in itertools.pairwise(starts)]
