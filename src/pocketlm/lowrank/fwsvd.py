"""FWSVD: truncated SVD of the weight, its columns weighed by Fisher information.

W ≈ U_r Σ_r V_rᵀ S⁻¹ with U Σ Vᵀ = W S, S = diag(√ Σ_o F_oi) for the diagonal F of the Fisher
information of the weights (arXiv:2207.00112, its weighted objective and closed form; there a weight
is [I, O], and what is summed are its rows).

Deviation: the paper's F is that of the task's loss, whose gradient needs the whole model in memory
and a backward pass through it. Here it is that of the block's output y taken for the mean of a
normal distribution of unit variance, F = diag(JᵀJ) with J = ∂y/∂W: what a change of the weight does
to the block. It is estimated by Fᵢ = E (Jᵀv)ᵢ² over random v of independent unit entries, one
backward pass of the block for each batch; tokens need no passes of their own, since the entries of
v are independent.

Legend: B sequences, T tokens, D hidden width, O output rows, I input columns, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.reconstruct import repeatable
from pocketlm.core.state import BlockTask, Cost, LinearState, Note
from pocketlm.core.stats import Stat
from pocketlm.lowrank.factor import Diagonal, best_factors, left_alone, stored
from pocketlm.lowrank.rank import Ranked


class Fwsvd(Ranked):
    """SVD of columns scaled by the Fisher information of the block's output.

    Attributes:
        batches: Batches that the information is estimated on, at most.
    """

    kind: ClassVar[Literal["block"]] = "block"
    needs: ClassVar[tuple[type[Stat], ...]] = ()

    batches: int = Field(32, ge=1)

    def compress(self, task: BlockTask) -> Mapping[str, LinearState]:
        """The states of all linears of the block; those with a rank as two factors."""
        ranks = {name: self.rank_of(name, state.shape) for name, state in task.states.items()}
        chosen = [name for name, rank in ranks.items() if rank is not None]
        fisher = column_information(task, chosen, self.batches) if chosen else {}
        after: dict[str, LinearState] = {}
        for name, state in task.states.items():
            rank = ranks[name]
            if rank is None:
                after[name] = left_alone(state)
                continue
            metric = Diagonal(fisher[name].sqrt())
            left_OR, right_RI = best_factors(state.reference_OI, rank, metric)
            notes: tuple[Note, ...] = ()
            if not bool((fisher[name] > 0).any()):
                text = "no calibration token reached it: factorised without data."
                notes = (Note("no_tokens", text),)
            after[name] = state.with_current(stored(left_OR, right_RI, state.scale_dtype), *notes)
        return after

    def flops_per_weight(self, samples: int, seq_len: int) -> float:
        """Forward and backward of the batches, and the decompositions' share is left out."""
        return 6.0 * min(samples, 4 * self.batches) * seq_len

    def cost(self, rows: int, columns: int) -> Cost:
        """The weight, its gradient and a singular value decomposition."""
        return Cost(24 * rows * columns, 0.0, calls=30)


def column_information(task: BlockTask, names: list[str], batches: int) -> dict[str, Tensor]:
    """The Fisher information of a block's output, summed over each column of a weight.

    Args:
        task: The block and its inputs.
        names: Module paths of the linears.
        batches: Batches at most.

    Returns:
        Module path → float32 [I]; zeros where no token reached the linear.
    """
    generator = task.generator()
    weights = {name: task.states[name].reference_OI.detach() for name in names}
    found = {name: torch.zeros_like(weight_OI[0]) for name, weight_OI in weights.items()}
    count = min(batches, task.batches)
    for batch in range(count):
        with torch.enable_grad(), repeatable(task.device):
            leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            output_BTD = task.forward(leaves, batch).float()
            noise_BTD = torch.randn(output_BTD.shape, generator=generator).to(task.device)
            (output_BTD * noise_BTD).sum().backward(inputs=list(leaves.values()))
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                found[name] += leaf.grad.square().sum(0)
        task.report(batch + 1, count, 0.0)
    return found
