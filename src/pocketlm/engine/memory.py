"""How much memory calibration takes: what a batch holds at a boundary, and inside a block.

Legend: B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pocketlm.core.state import Step
from pocketlm.core.views import BlockView, ModelView
from pocketlm.formats.safetensors_header import element_bytes


def hidden_width(model: ModelView) -> int:
    """D: the width of the stream between blocks."""
    names = ("hidden_size", "n_embd", "d_model")
    return next(int(model.config[name]) for name in names if model.config.get(name))


def hidden_bytes(model: ModelView, tokens: int) -> int:
    """Bytes of the activations of `tokens` tokens at a block boundary."""
    return tokens * hidden_width(model) * element_bytes(model.compute_dtype)


def run_bytes(widths: list[tuple[int, int]], hidden: int, tokens: int, element: int) -> int:
    """Bytes that a batch holds while it stands inside a block, at most.

    Args:
        widths: (O, I) of the block's linears.
        hidden: D.
        tokens: Tokens of the batch.
        element: Bytes of one activation.

    Returns:
        The residual, its normed copy, and the inputs and outputs of the widest linear.
    """
    widest = max(rows + columns for rows, columns in widths)
    return tokens * (2 * hidden + widest) * element


def learning_bytes(
    model: ModelView, steps: Sequence[Step], shapes: Mapping[str, tuple[int, int]], tokens: int
) -> int:
    """Bytes that block steps hold for the largest block: what they learn, and a batch's graph.

    Args:
        model: The model.
        steps: Of the recipe.
        shapes: (O, I) of every compressed linear, by module path.
        tokens: Of one batch.

    Returns:
        A count; 0 without a block step. The graph keeps each linear's input and output twice over.
    """
    learned = [step for step in steps if step.kind == "block"]
    if not learned:
        return 0
    most = 0
    for inside in shapes_by_block(model, shapes):
        held = sum(
            max(step.cost(*shape).bytes_held for step in learned) for shape in inside.values()
        )
        graph = 2 * tokens * sum(rows + columns for rows, columns in inside.values())
        most = max(most, held + graph * element_bytes(model.compute_dtype))
    return most


def shapes_by_block(
    model: ModelView, shapes: Mapping[str, tuple[int, int]]
) -> list[dict[str, tuple[int, int]]]:
    """The shapes of each block's linears."""
    return [
        {name: shape for name, shape in shapes.items() if name.startswith(path + ".")}
        for path in model.block_paths
    ]


def input_widths(shapes: Mapping[str, tuple[int, int]]) -> list[int]:
    """Widths of the distinct inputs: linears of one parent and width are taken to share theirs."""
    shared = {(name.rpartition(".")[0], columns) for name, (_, columns) in shapes.items()}
    return [columns for _, columns in shared]


def runs_budget(model: ModelView, activation_bytes: int) -> int:
    """Bytes that batches may hold while they stand inside a block.

    A quarter of what activations may take on a GPU: there statistics, weights and what waits at the
    boundary share one memory, and running a batch again costs little.
    """
    return activation_bytes // 4 if model.device.type == "cuda" else activation_bytes


def held_runs(model: ModelView, block: BlockView, tokens: int, budget_bytes: int) -> int:
    """How many batches may stand inside a block at once.

    Args:
        model: The model.
        block: The block.
        tokens: Tokens of one batch.
        budget_bytes: Memory for activations inside the block.

    Returns:
        A count; batches beyond it are run again from the block's input at every group.
    """
    widths = [(view.out_features, view.in_features) for view in block.linears.values()]
    each = run_bytes(widths, hidden_width(model), tokens, element_bytes(model.compute_dtype))
    return budget_bytes // each
