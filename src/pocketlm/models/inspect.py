"""What is in a model: blocks, groups of linears, folds, bytes, what is left out and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field

from pocketlm.core.spec import QuantSpec
from pocketlm.core.views import Fold, Group, TensorInfo
from pocketlm.models.adapter import Model
from pocketlm.models.kinds import most_common_dtype
from pocketlm.models.packed import PackedForm


class Finding(BaseModel):
    """A frozen part of an inspection."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(Finding):
    """One kind of tensor's part of a model.

    Attributes:
        tensors: How many.
        parameters: Values in them.
        bytes_stored: As the checkpoint holds them.
    """

    tensors: int = 0
    parameters: int = 0
    bytes_stored: int = 0


class FoldFinding(Finding):
    """Where a scale could move into a group of linears, and whether the trial allowed it.

    Attributes:
        producer: The norm or linear it would come from; ``*`` stands for any index.
        form: "weight", "one_plus_weight" or "linear".
        accepted: Whether the block's output stayed the same.
        error: Relative error of the trial in float64; None where it did not run.
        reason: Why not.
    """

    producer: str
    form: str
    accepted: bool
    error: float | None
    reason: str | None


class GroupFinding(Finding):
    """Linears that read one and the same value.

    Attributes:
        linears: Module path, ``*`` for any index → (O, I).
        count: How many such groups a block has (one for each expert).
        fold: The best place for a scale; None where nothing feeds the group alone.
    """

    linears: dict[str, tuple[int, int]]
    count: int
    fold: FoldFinding | None


class LayoutFinding(Finding):
    """Blocks that are built alike.

    Attributes:
        block_class: The class in transformers.
        blocks: Their indices.
        groups: In order of execution; empty where nothing was run.
    """

    block_class: str
    blocks: list[int]
    groups: list[GroupFinding]


class Inspection(Finding):
    """What is in a model.

    Attributes:
        architecture: The class in transformers.
        model_type: As config.json says.
        blocks: How many decoder blocks.
        dtype: Of most weights.
        context: Longest position.
        vocabulary: Tokens.
        tied: Whether head and embedding are one tensor.
        parameters: All values of the checkpoint.
        bytes_stored: All bytes of the checkpoint's tensors.
        shares: Kind of tensor → its part.
        layouts: Blocks by how they are built.
        left_out: Module path, ``*`` for any index → why it is not compressed.
        extras: Tensors that the model does not use; they are carried over unchanged.
        compressed: Format and grid of weights that are compressed already → how many.
    """

    architecture: str
    model_type: str
    blocks: int
    dtype: str
    context: int
    vocabulary: int
    tied: bool
    parameters: int
    bytes_stored: int
    shares: dict[str, Share]
    layouts: list[LayoutFinding]
    left_out: dict[str, str]
    extras: list[str]
    compressed: dict[str, int] = Field(default_factory=dict)


def inspect_model(model: Model, probe: bool = True) -> Inspection:
    """Looks at a model.

    Args:
        model: As `open_model` gives it.
        probe: Whether to load one block of each layout, run it and try its folds.

    Returns:
        What was found.
    """
    why = "shares its tensor with the embedding" if model.tied else "the head is kept by default"
    left_out = {model.head_path: why}
    layouts = []
    for indices in model.alike_blocks():
        first = indices[0]
        groups: list[GroupFinding] = []
        if probe:
            with model.block(first) as block:
                groups = _group_findings(block.probe_folds(), model)
                skipped = block.skipped
        else:
            skipped = model.skipped(first)
        for name, reason in skipped.items():
            left_out.setdefault(any_index(name), reason)
        kind = type(model.skeleton.blocks[first]).__name__
        layouts.append(LayoutFinding(block_class=kind, blocks=indices, groups=groups))
    shares = _shares(model)
    return Inspection(
        architecture=type(model.skeleton.model).__name__,
        model_type=str(model.config.get("model_type", "")),
        blocks=len(model.block_paths),
        dtype=str(most_common_dtype(model.source, model.forms)).removeprefix("torch."),
        context=model.context,
        vocabulary=model.vocabulary,
        tied=model.tied,
        parameters=sum(share.parameters for share in shares.values()),
        bytes_stored=sum(share.bytes_stored for share in shares.values()),
        shares=shares,
        layouts=layouts,
        left_out=left_out,
        extras=list(model.extras),
        compressed=dict(Counter(_form_text(form) for form in model.forms.values())),
    )


def any_index(path: str) -> str:
    """A module path with every index replaced by ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _group_findings(groups: Iterable[Group], model: Model) -> list[GroupFinding]:
    shapes = model.linear_shapes()
    found: dict[tuple[str, ...], GroupFinding] = {}
    for group in groups:
        pattern = tuple(any_index(name) for name in group.linears)
        known = found.get(pattern)
        if known is not None:
            found[pattern] = known.model_copy(update={"count": known.count + 1})
            continue
        linears = {any_index(name): shapes[name] for name in group.linears}
        found[pattern] = GroupFinding(linears=linears, count=1, fold=_fold_finding(group.fold))
    return list(found.values())


def _fold_finding(fold: Fold | None) -> FoldFinding | None:
    if fold is None:
        return None
    return FoldFinding(
        producer=any_index(fold.producer),
        form=fold.form,
        accepted=fold.accepted,
        error=fold.error,
        reason=fold.reason,
    )


def _shares(model: Model) -> dict[str, Share]:
    """Every tensor of the checkpoint in exactly one kind."""
    kinds = model.tensor_kinds()
    shares: dict[str, Share] = {}
    for name, info in model.source.infos().items():
        form = model.forms.get(name)
        stored = info.bytes_stored if form is None else form.bytes_stored
        shares[kinds[name]] = _add(shares.get(kinds[name], Share()), info, stored)
    return shares


def _form_text(form: PackedForm) -> str:
    """Format, number format and groups, such as ``gptq, INT4, groups of 128``."""
    spec, text = form.spec, f"{form.format}, {form.spec.name}"
    if isinstance(spec, QuantSpec):
        text += " with zero points" if not spec.symmetric else ""
        text += f", groups of {spec.group_size}" if spec.group_size else ""
    return text if form.activations is None else f"{text}, inputs {form.activations.name}"


def _add(share: Share, info: TensorInfo, bytes_stored: int) -> Share:
    elements = 1
    for side in info.shape:
        elements *= side
    return Share(
        tensors=share.tensors + 1,
        parameters=share.parameters + elements,
        bytes_stored=share.bytes_stored + bytes_stored,
    )
