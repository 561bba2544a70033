"""Inputs of linears as llama.cpp rounds them on a CPU, by the type of the weight beside them.

It multiplies codes by codes: a dot product with a quantized weight takes the input in 8 bits,

    Q8_0   beside blocks of 32:    code = round(127 x / max|x|),    scale = max|x| / 127 in float16
    Q8_K   beside blocks of 256:   code = round(-127 x / x_max),    scale = -x_max / 127

with x_max the value of largest magnitude; beside BF16 in that dtype, beside F16 and F32 as they
are. In a dense model that moves logits a little. In a mixture it also moves a router's scores, and
where two experts are nearly level another one is run: how far is measured with our own run.

That is a sum over few choices, and a code that lies between two is settled by less: llama.cpp keeps
keys and values in float16. So it is drawn several times, inputs moved by up to 2^-11 of their size.

Not done: the head's inputs, and the float16 sums of Q4_1's and Q5_1's minima; both move logits a
little too. Facts: ggml-cpu's table of dot products, quantize_row_q8_0 and quantize_row_q8_K; F16
beside float32 inputs from a run (our own is 4e-6 away from it, and 8e-4 with inputs in float16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.spec import ActivationSpec
from pocketlm.formats.gguf_types import NUMBERS, block_weights
from pocketlm.models.adapter import Model
from pocketlm.models.gguf import GgufSource

HALF = 2.0**-11  # float16 rounds by at most this share
NAMES = {number: kind for kind, number in NUMBERS.items()}


@dataclass(frozen=True)
class LlamaInput(InputQuantizer):
    """The rounding of one linear's inputs.

    Attributes:
        kind: Type of the weight, such as Q4_K.
        draw: Which draw of what moves inputs before they are rounded; 0: nothing does.
    """

    kind: str = "Q8_0"
    draw: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """x̂ of any [..., I], in the dtype of x."""
        if x.numel() == 0:  # an expert without tokens
            return x
        if self.draw:
            generator = torch.Generator().manual_seed(self.draw)
            moves = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
            x = x * (1 + HALF * moves)
        if self.kind == "BF16":
            return x.bfloat16().to(x.dtype)
        wide = x.float().unflatten(-1, (-1, block_weights(self.kind)))
        largest = wide.gather(-1, wide.abs().argmax(-1, keepdim=True))
        if block_weights(self.kind) == 32:
            inverse = 127 / largest.abs()
            scale = (largest.abs() / 127).half().float()
        else:
            inverse = -127 / largest
            scale = 1 / inverse
        rounded = torch.where(largest == 0, 0.0, (inverse * wide).round() * scale)
        return rounded.flatten(-2).to(x.dtype)


def llama_inputs(file: Model, draw: int = 0) -> dict[str, InputQuantizer]:
    """Module path → how llama.cpp rounds its inputs, of a GGUF file's linears.

    Args:
        file: The file, opened.
        draw: Of what moves inputs before; 0: nothing does.
    """
    assert isinstance(file.source, GgufSource)
    kinds, found = file.source.kinds(), dict[str, InputQuantizer]()
    for module in file.linear_shapes():
        kind = NAMES[kinds[f"{module}.weight"]]
        if kind not in ("F32", "F16"):
            size = max(8, block_weights(kind))
            spec = ActivationSpec(bits=8, granularity="group", group_size=size)
            found[module] = LlamaInput(spec, kind=kind, draw=draw)
    return found
