"""The order of a recipe's steps: which go together in a pass, and what cannot follow what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import Recipe
from pocketlm.core.state import Step
from pocketlm.core.stats import GradientSize, Hessian


@dataclass(frozen=True)
class Pass:
    """Consecutive steps of one kind; a block step makes a pass of its own."""

    kind: str
    steps: tuple[Any, ...]

    @property
    def at_once(self) -> bool:
        """Whether the statistics of a block are gathered before any of it is compressed.

        Where kept weights have their old values, no later group can make up for an earlier one: all
        are ranked by the inputs that the block had, as Wanda's authors do it. Steps that fit values
        want the inputs that earlier groups, compressed, will give.
        """
        return self.kind == "linear" and all("values" in step.preserves for step in self.steps)


def passes(steps: Iterable[Step]) -> list[Pass]:
    """The passes over a block that a recipe's steps make.

    Raises:
        ConfigError: If a fold comes after a step that quantizes, or nothing quantizes.
    """
    found: list[Pass] = []
    for kind, run in groupby(steps, key=lambda step: step.kind):
        together = tuple(run)
        found += [Pass(kind, (s,)) for s in together] if kind == "block" else [Pass(kind, together)]
    late = [p for p in found[1:] if p.kind == "fold"]
    if late:
        raise ConfigError(
            f"{type(late[0].steps[0]).__name__} moves scales after a step that quantizes.",
            where="recipe",
            remedy="Put folds such as awq or smoothquant first.",
        )
    if found[-1].kind == "fold":
        raise ConfigError(
            f"{type(found[-1].steps[-1]).__name__} is the last step, and it quantizes nothing.",
            where="recipe",
            remedy="Add a quantizing step such as rtn or gptq after it.",
        )
    return found


def check_order(recipe: Recipe, steps: Sequence[Step]) -> None:
    """Refuses steps that cannot do what the recipe asks, before anything is read.

    Args:
        recipe: Says whether there is a grid to quantize to.
        steps: Its steps, options checked.

    Raises:
        ConfigError: If a step needs a grid and there is none or the other way round, or a step
            undoes what an earlier one made.
    """
    _check_gradients(recipe, passes(steps))
    makers = [step for step in steps if step.makes]
    named = {id(step): spec.method for step, spec in zip(steps, recipe.steps, strict=True)}
    if recipe.weights is None:
        lost = [step for step in makers if step.makes == frozenset({"grid"})]
        if lost or not makers:
            last = named[id(lost[0] if lost else steps[-1])]
            raise ConfigError(
                f"{last} has no number format to quantize to."
                if lost
                else f"the recipe's last step, {last}, changes no weight.",
                where="recipe",
                remedy="Give --scheme W4A16, or `weights` in the recipe.",
            )
    elif not any("grid" in step.makes for step in makers):
        raise ConfigError(
            f"{named[id(steps[-1])]} quantizes nothing, but the recipe names a number format.",
            where="recipe",
            remedy="End with a quantizing step such as gptq, or set `weights: null`.",
        )
    _check_factors(recipe, steps)
    for made in ("mask",):
        first = next((i for i, step in enumerate(steps) if made in step.makes), len(steps))
        for step in steps[first + 1 :]:
            if made in step.makes or step.kind == "fold" or made in step.preserves:
                continue
            raise ConfigError(
                f"{named[id(step)]} does not keep the {made} that {named[id(steps[first])]} made.",
                where="recipe",
                remedy=f"Put {named[id(step)]} before it.",
            )
        for step in steps[:first]:
            if first < len(steps) and "grid" in step.makes and "grid" not in steps[first].makes:
                raise ConfigError(
                    f"{named[id(steps[first])]} comes after {named[id(step)]}, which quantizes.",
                    where="recipe",
                    remedy="Prune first, then quantize.",
                )


def _check_gradients(recipe: Recipe, todo: Sequence[Pass]) -> None:
    """Gradients are those of the original: a fold would scale the weights away from them."""
    asks = any(kind is GradientSize for p in todo for step in p.steps for kind in step.needs)
    if asks and todo[0].kind == "fold":
        raise ConfigError(
            f"{recipe.steps[0].method} moves scales into weights whose gradients a later step "
            "has from the original.",
            where="recipe",
            remedy="Leave it out, or prune by another score, such as wanda.",
        )


def _check_factors(recipe: Recipe, steps: Sequence[Step]) -> None:
    """What may follow a step that makes factors: one that knows them, or quantizes a factor."""
    first = next((i for i, step in enumerate(steps) if "factors" in step.makes), len(steps))
    for place in range(first + 1, len(steps)):
        step, method = steps[place], recipe.steps[place].method
        if "factors" in step.preserves:
            continue
        maker = recipe.steps[first].method
        # A factor has inputs of its own: their Hessian is known, other statistics are not.
        known = step.kind == "linear" and set(step.needs) <= {Hessian}
        if "factors" in step.makes:
            what = f"{method} would factorise again what {maker} has factorised."
            remedy = "Keep one of them; `ranks` gives linears ranks of their own."
        elif known and "mask" not in step.makes and step.makes | step.preserves:
            continue
        else:
            what = f"{method} does not know the factors that {maker} makes."
            remedy = f"Put {method} before {maker}, or quantize with rtn, clip, gptq or refine."
        raise ConfigError(what, where="recipe", remedy=remedy)
