"""A recipe's mixture of GGUF types, for a model that is known: an override for each tensor.

Experts of a block lie in one tensor of the file for each of their linears: one pattern names them.
"""

from __future__ import annotations

from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.formats.gguf_mix import tensor_type
from pocketlm.formats.gguf_types import FLOATS, SPECS
from pocketlm.formats.targets import EXPERT
from pocketlm.models.adapter import Model
from pocketlm.models.gguf_form import GgufForm


def with_mixture(recipe: Recipe, model: Model) -> Recipe:
    """The recipe with the mixture's grids as overrides; those that it has already win.

    Args:
        recipe: Returned as it is where it names no mixture.
        model: The original.

    Raises:
        UnsupportedModel: If the model is not written as GGUF.
    """
    if recipe.mix is None:
        return recipe
    form = GgufForm.of(model)
    shapes = {f"{name}.weight": shape for name, shape in model.linear_shapes().items()}
    shapes |= {end.tensor: end.shape for end in model.ends()}
    found: dict[str, QuantSpec] = {}
    for tensor, spelled in form.names(shapes).items():
        kind = tensor_type(recipe.mix, spelled, shapes[tensor], form.architecture)
        if kind not in FLOATS:
            found[EXPERT.sub(r"\1.*.", tensor.removesuffix(".weight"))] = SPECS[kind]
    return recipe.model_copy(update={"overrides": {**found, **recipe.overrides}})
