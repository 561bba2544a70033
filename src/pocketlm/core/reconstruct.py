"""Block reconstruction: learns what a block's weights depend on, against the block's output.

    minimise over θ   mean |f(X; W(θ)) - Y|²

X is what the compressed model so far feeds the block, Y what the original block gave for the
original model's input. A method brings θ and W(θ), one learner for each linear.

An iteration takes whole batches in random order. W(θ) is formed once; the gradient of each batch
stops at the weights, is summed there, and goes through W(θ) once: one batch's graph is alive at a
time. Rates fall linearly to zero, so that the end is where the parameters have settled; it is kept
if its error on all data is below that of the start, else the start is.

Cost: an iteration is 3 forward passes over `batch_size` sequences (one forward, two's worth
backward) and some passes over the weights; two forward passes over all data come on top.

Legend: B sequences, T tokens, D hidden width, O output rows, I input columns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pocketlm.core.errors import NumericError
from pocketlm.core.state import BlockTask, Note

REPORTS = 20  # how often progress is told in one block
FORWARDS = 5.3  # an iteration over a forward's matrix products: 3 of them take 57 % of it (CPU)


@dataclass(frozen=True)
class Parameter:
    """A tensor that is learned.

    Attributes:
        values: Float32; changed in place.
        rate: Its learning rate at the start.
        low: The least value it may take.
        high: The largest.
    """

    values: Tensor
    rate: float
    low: float = -math.inf
    high: float = math.inf


class Learner(Protocol):
    """One linear's weight as a function of what is learned."""

    parameters: Sequence[Parameter]

    def weight_OI(self) -> Tensor:
        """The weight [O, I], float32, differentiable in the parameters."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How parameters move.

    Attributes:
        optimizer: "sign": by the rate against the gradient's sign; "adam": Adam.
        iterations: Steps.
        batch_size: Sequences of a step, to the nearest whole batch of the task.
    """

    optimizer: Literal["sign", "adam"]
    iterations: int
    batch_size: int


@dataclass(frozen=True)
class Outcome:
    """What learning came to.

    Attributes:
        before: Mean squared error of the block's output at the start, over all data.
        after: The same of the parameters that were kept, never larger.
        idle: Linears that no token reached; their parameters are as they were.
        repeatable: Whether every operation has a kernel that sums in the same order every time.
    """

    before: float
    after: float
    idle: frozenset[str]
    repeatable: bool = True

    def notes(self, name: str) -> tuple[Note, ...]:
        """What is to be told of a linear."""
        if name in self.idle:
            return (Note("no_tokens", "no calibration token reached it: nothing was learned."),)
        found: tuple[Note, ...] = ()
        if not self.repeatable:
            text = "an operation of this block sums in any order: another run may differ a little."
            found = (Note("not_repeatable", text),)
        if self.after < self.before:
            return found
        text = "learning did not lower the block's error: its start was kept."
        return (*found, Note("not_learned", text, {"error": self.before}))


def reconstruct(task: BlockTask, learners: Mapping[str, Learner], schedule: Schedule) -> Outcome:
    """Learns the parameters of a block's linears, in place; the same every time.

    Args:
        task: The block, its inputs and targets.
        learners: By module path.
        schedule: How.

    Returns:
        The block's error before and after.

    Raises:
        NumericError: If the block's output is not finite at the start.
    """
    parameters = [p for learner in learners.values() for p in learner.parameters]
    start = [p.values.detach().clone() for p in parameters]
    before = block_error(task, learners)
    if not math.isfinite(before):
        raise NumericError(
            "the block's output is not finite before anything is learned.",
            where=next(iter(learners), None),
            remedy="Check the weights and the calibration text.",
        )
    move = Sign(parameters) if schedule.optimizer == "sign" else Adam(parameters)
    reached: set[str] = set()
    strict = True
    for done, batches in enumerate(islice(draws(task, schedule), schedule.iterations)):
        try:
            with repeatable(task.device, strict):
                loss = _gradients(task, learners, batches, reached)
        except RuntimeError as error:
            if not strict or "deterministic" not in str(error):
                raise
            strict = False
            for parameter in parameters:
                parameter.values.grad = None
            with repeatable(task.device, strict):
                loss = _gradients(task, learners, batches, reached)
        move(1.0 - done / schedule.iterations)
        if done % max(1, schedule.iterations // REPORTS) == 0:
            task.report(done, schedule.iterations, float(loss))
    after = block_error(task, learners)
    if not after < before:
        for parameter, values in zip(parameters, start, strict=True):
            parameter.values.data.copy_(values)
        after = before
    task.report(schedule.iterations, schedule.iterations, after)
    return Outcome(before, after, frozenset(set(learners) - reached), strict)


def block_error(task: BlockTask, learners: Mapping[str, Learner]) -> float:
    """The mean squared error of the block's output over all data."""
    with torch.no_grad():
        weights = {name: learner.weight_OI() for name, learner in learners.items()}
        total, count = torch.zeros((), dtype=torch.float64, device=task.device), 0
        for batch in range(task.batches):
            target_BTD = task.targets(batch)
            total += (task.forward(weights, batch).float() - target_BTD).square().sum()
            count += target_BTD.numel()
    return float(total) / count


def draws(task: BlockTask, schedule: Schedule) -> Iterator[list[int]]:
    """The batches of each iteration, without end: each batch once before any comes again."""
    generator = task.generator()
    each = max(1, round(schedule.batch_size / task.inputs(0).shape[0]))
    each, waiting = min(each, task.batches), []
    while True:
        while len(waiting) < each:
            waiting += torch.randperm(task.batches, generator=generator).tolist()
        yield waiting[:each]
        waiting = waiting[each:]


def _gradients(
    task: BlockTask, learners: Mapping[str, Learner], batches: Sequence[int], reached: set[str]
) -> Tensor:
    """Leaves the gradient of some batches' mean squared error in the parameters; its value."""
    with torch.enable_grad():
        formed = {name: learner.weight_OI() for name, learner in learners.items()}
        leaves = {name: weight.detach().requires_grad_() for name, weight in formed.items()}
        total = torch.zeros((), device=task.device)
        for batch in batches:
            target_BTD = task.targets(batch)
            loss = (task.forward(leaves, batch).float() - target_BTD).square().mean()
            (loss / len(batches)).backward(inputs=list(leaves.values()))
            total += loss.detach() / len(batches)
        hit = [name for name, leaf in leaves.items() if leaf.grad is not None]
        reached.update(hit)
        torch.autograd.backward([formed[name] for name in hit], [leaves[n].grad for n in hit])
    return total


class Sign:
    """Signed gradient descent: θ ← θ - rate · sign(gradient)."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        for parameter in parameters:
            parameter.values.requires_grad_()

    def __call__(self, share: float) -> None:
        """Moves by a share of the rates; takes the gradients away."""
        with torch.no_grad():
            for parameter in self._parameters:
                values = parameter.values
                if values.grad is not None:
                    values.sub_(values.grad.sign_(), alpha=share * parameter.rate)
                    values.clamp_(parameter.low, parameter.high)
                    values.grad = None


class Adam:
    """Adam (arXiv:1412.6980) without weight decay."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._optimizer = torch.optim.Adam(
            [{"params": [p.values.requires_grad_()], "lr": p.rate} for p in parameters]
        )

    def __call__(self, share: float) -> None:
        """Moves by a share of the rates; takes the gradients away."""
        for group, parameter in zip(self._optimizer.param_groups, self._parameters, strict=True):
            group["lr"] = share * parameter.rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter in self._parameters:
                parameter.values.clamp_(parameter.low, parameter.high)


@contextmanager
def repeatable(device: torch.device, strict: bool = True) -> Generator[None]:
    """On a GPU, kernels whose sums come in the same order every time, as they do on a CPU.

    Strict: fused attention adds up in order too, and an operation that has no such kernel raises a
    RuntimeError. Not strict: such an operation runs as it is, and attention takes plain matrix
    products, since the fused kernels then add up in any order.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with warnings.catch_warnings(), sdpa_kernel([*(fused if strict else ()), SDPBackend.MATH]):
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=only_warned)
