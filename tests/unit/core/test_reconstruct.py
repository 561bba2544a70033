"""The loop that learned methods share: what it sees, what it leaves, and that it repeats itself."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, islice

import pytest
import torch
from torch import Tensor

from pocketlm.core.errors import NumericError
from pocketlm.core.reconstruct import Parameter, Schedule, block_error, draws, reconstruct


class TwoLinears:
    """A BlockTask: two linears of a residual block; "idle" is read by no token."""

    def __init__(self, batches: int = 5, sequences: int = 2, offset: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches, self.device = batches, torch.device("cpu")
        self.states: Mapping[str, object] = {}
        self.wanted = {
            name: torch.randn(6, 6, generator=generator) for name in ("first", "second", "idle")
        }
        shape = (batches, sequences, 7, 6)
        self._inputs = torch.randn(shape, generator=generator)
        self._targets = self._forward(self.wanted, self._inputs) + offset
        self.seen: list[int] = []
        self.told: list[tuple[int, int, float]] = []

    def inputs(self, batch: int) -> Tensor:
        return self._inputs[batch]

    def targets(self, batch: int) -> Tensor:
        return self._targets[batch]

    def _forward(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x + torch.tanh(x @ weights["first"].T) @ weights["second"].T

    def forward(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(batch)
        return self._forward(weights, self._inputs[batch])

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(7)

    def report(self, done: int, total: int, loss: float) -> None:
        self.told.append((done, total, loss))


class Free:
    """A Learner of a whole weight."""

    def __init__(self, start: Tensor, rate: float, **bounds: float) -> None:
        self.parameters = [Parameter(start.clone(), rate, **bounds)]

    def weight_OI(self) -> Tensor:
        return self.parameters[0].values * 1.0


def learners(task: TwoLinears, rate: float = 0.02, **bounds: float) -> dict[str, Free]:
    return {name: Free(0.5 * wanted, rate, **bounds) for name, wanted in task.wanted.items()}


@pytest.mark.parametrize("optimizer", ["sign", "adam"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_error_falls_and_is_what_is_reported(optimizer: str, batch_size: int) -> None:
    task = TwoLinears()
    mine = learners(task)
    before = block_error(task, mine)
    outcome = reconstruct(task, mine, Schedule(optimizer, 60, batch_size))
    assert outcome.before == before
    assert outcome.after == block_error(task, mine)
    assert outcome.after < 0.3 * before
    assert task.told[-1] == (60, 60, outcome.after)
    assert 10 < len(task.told) < 40


def test_gradients_of_batches_add_up_to_the_gradient_of_all() -> None:
    moved = []
    for batch_size in (10, 1000):  # five batches of two at once, or all that there are
        task = TwoLinears(batches=5)
        mine = learners(task)
        reconstruct(task, mine, Schedule("adam", 3, batch_size))
        moved.append(mine["first"].parameters[0].values.detach())
    whole = TwoLinears(batches=1, sequences=10)
    task = TwoLinears(batches=5)
    whole._inputs = task._inputs.reshape(1, 10, 7, 6)
    whole._targets = task._targets.reshape(1, 10, 7, 6)
    whole.wanted = task.wanted
    mine = learners(whole)
    reconstruct(whole, mine, Schedule("adam", 3, 10))
    assert torch.equal(moved[0], moved[1])
    assert torch.allclose(moved[0], mine["first"].parameters[0].values, atol=1e-5)


def test_rates_fall_to_zero_and_bounds_hold() -> None:
    task = TwoLinears()
    free = learners(task, 0.1)
    start = free["second"].parameters[0].values.clone()
    reconstruct(task, free, Schedule("sign", 10, 2))
    moved = (free["second"].parameters[0].values.detach() - start).abs().max()
    assert moved <= 0.1 * (10 + 1) / 2 + 1e-6  # the sum of the falling rates
    assert moved > 0.4
    bounded = {n: Free(0.1 * w, 0.1, low=-0.3, high=0.4) for n, w in task.wanted.items()}
    outcome = reconstruct(task, bounded, Schedule("sign", 30, 2))
    values = bounded["second"].parameters[0].values.detach()
    assert outcome.after < outcome.before
    assert float(values.min()) == pytest.approx(-0.3)
    assert float(values.max()) == pytest.approx(0.4)


def test_what_no_token_reaches_stays_and_is_told() -> None:
    task = TwoLinears()
    mine = learners(task)
    start = mine["idle"].parameters[0].values.clone()
    outcome = reconstruct(task, mine, Schedule("adam", 5, 2))
    assert outcome.idle == {"idle"}
    assert torch.equal(mine["idle"].parameters[0].values, start)
    assert [note.kind for note in outcome.notes("idle")] == ["no_tokens"]
    assert outcome.notes("first") == ()


def test_a_start_that_cannot_be_bettered_stays_and_is_told() -> None:
    task = TwoLinears()
    mine = {name: Free(wanted, 0.1) for name, wanted in task.wanted.items()}
    outcome = reconstruct(task, mine, Schedule("sign", 3, 2))
    assert outcome.before == outcome.after == 0.0
    assert all(torch.equal(mine[n].parameters[0].values, task.wanted[n]) for n in mine)
    assert [note.kind for note in outcome.notes("first")] == ["not_learned"]


def test_batches_come_in_rounds_and_again_the_same() -> None:
    task = TwoLinears(batches=6)
    schedule = Schedule("sign", 3, 4)
    drawn = list(islice(draws(task, schedule), 6))
    assert all(len(some) == 2 for some in drawn)
    assert sorted(chain(*drawn[:3])) == sorted(chain(*drawn[3:])) == list(range(6))
    assert drawn[:3] != drawn[3:]
    assert list(islice(draws(task, schedule), 6)) == drawn
    results = []
    for _ in range(2):
        mine = learners(task)
        task.seen.clear()
        reconstruct(task, mine, schedule)
        assert [task.seen[i : i + 2] for i in (0, 2, 4)] == drawn[:3]
        results.append(mine["first"].parameters[0].values.detach())
    assert torch.equal(*results)


def test_output_that_is_not_finite_is_an_error() -> None:
    task = TwoLinears(offset=float("nan"))
    with pytest.raises(NumericError, match="not finite"):
        reconstruct(task, learners(task), Schedule("sign", 3, 2))
