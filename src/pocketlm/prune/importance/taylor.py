"""LLM-Pruner (arXiv:2305.11627): what the loss would lose to first order.

    score_u = Σ over all weights w of the unit, in every coupled linear, of |w ∂L/∂w|

(its element-wise importance, of first order, summed over a group: `param_first` of its code.)

Its recovery by LoRA is training and not here. Cost: one pass forward and one backward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.core.transform import Findings, Structure, Survey
from pocketlm.core.views import BlockView
from pocketlm.prune.width import Width


class LlmPruner(Width):
    """LLM-Pruner: removes coupled weights whose loss would change least, by Taylor expansion."""

    def measure(self, survey: Survey) -> Findings:
        """A score for each unit, from gradients."""
        of_block = self._structures(survey.outline)

        def look(
            index: int, block: BlockView, gradients: Mapping[str, Tensor]
        ) -> dict[str, Tensor]:
            return {
                f"{one.path}.{one.dimension}": _taylor(one, block, gradients)
                for one in of_block.get(index, ())
            }

        return survey.gradients(look)


def _taylor(structure: Structure, block: BlockView, gradients: Mapping[str, Tensor]) -> Tensor:
    total_U = torch.zeros(structure.units, dtype=torch.float64)
    by_tensor = {view.tensor_name: view for view in block.linears.values()}
    for cut in structure.cuts:
        view = by_tensor.get(cut.tensor)
        if view is None:  # a bias
            continue
        size_OI = (view.weight_OI() * gradients[view.name]).abs().double()
        axis = 1 - cut.axis if view.stored_transposed else cut.axis
        line = size_OI.sum(1 - axis)
        total_U += line.reshape(cut.copies, structure.units, cut.width).sum((0, 2)).cpu()
    return total_U
