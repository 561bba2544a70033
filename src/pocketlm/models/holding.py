"""Whether transformers' classes can hold linears in compressed-tensors' form: tried, not listed.

That form takes a linear's ``weight`` away and puts packed tensors in its place. Some classes ask
for the weight nevertheless when they initialise what is not loaded (Falcon's, GPTBigCode's blocks),
and some are exchanged for others wherever a model is packed, whose tensors have other names (the
experts of Llama 4). Our own format does neither.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from pocketlm.formats.compressed_config import NAME
from pocketlm.models.linear import is_linear


def packing_refusal(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> str | None:
    """Why transformers cannot load a model with packed linears; None: it can.

    Args:
        model: Without weights.
        blocks: One decoder block of each kind, on the meta device.

    Returns:
        A clause, such as ``FalconLinear asks for a weight where it is packed``.
    """
    for module in model.modules():
        patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
        if patch is not None and NAME in patch["quantization_methods"]:
            kind = type(module).__name__
            return f"transformers exchanges {kind} in a packed model and finds no weights for it"
    for block in blocks:
        packed = copy.deepcopy(block)
        for module in packed.modules():
            if type(module) is nn.Linear or is_linear(module):
                module._parameters.pop("weight", None)
        for module in packed.modules():
            try:
                model._init_weights(module)
            except AttributeError as error:
                if "'weight'" in str(error):
                    kind = type(module).__name__
                    return f"transformers' {kind} asks for weights where they are packed"
                raise
    return None
