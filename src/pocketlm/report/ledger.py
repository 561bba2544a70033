"""A ledger becomes what a report shows: rows, errors of linears, remarks, size breakdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from pocketlm.core.views import TensorInfo
from pocketlm.engine.health import InputHealth
from pocketlm.engine.ledger import Entry, Ledger
from pocketlm.report.data import InputRow, LedgerRow, LinearResult, Remark, SizePart
from pocketlm.report.kinds import kind_of

SCALES = "scales, zero points and masks"
_SCALE_ENDINGS = ("scale", "zero_point", "weight_shape", "weight_mask")


def ledger_rows(ledger: Ledger) -> tuple[LedgerRow, ...]:
    """Every tensor of the source and what became of it."""
    return tuple(
        LedgerRow(
            tensor=name,
            action=entry.action,
            reason=entry.reason,
            bits=_bits_per_weight(entry),
            outputs=tuple(entry.outputs),
        )
        for name, entry in ledger.tensors.items()
    )


def linear_results(ledger: Ledger) -> tuple[LinearResult, ...]:
    """The compressed linears with bits and error, in the ledger's order."""
    return tuple(
        LinearResult(
            name=name.removesuffix(".weight"), bits=_bits_per_weight(entry), error=entry.error
        )
        for name, entry in ledger.tensors.items()
        if entry.spec is not None and entry.end is None
    )


def input_rows(ledger: Ledger) -> tuple[InputRow, ...]:
    """What calibration data reached the linears, by kind and width, in the ledger's order."""
    kinds: dict[tuple[str, int], list[InputHealth]] = {}
    for name, entry in ledger.tensors.items():
        if entry.inputs is not None:
            kind, _ = kind_of(name.removesuffix(".weight"))
            kinds.setdefault((kind, entry.inputs.columns), []).append(entry.inputs)
    return tuple(_input_row(kind, columns, seen) for (kind, columns), seen in kinds.items())


def _input_row(kind: str, columns: int, seen: list[InputHealth]) -> InputRow:
    tokens = [one.tokens for one in seen]
    ranks = [one.effective_rank for one in seen if one.tokens and one.effective_rank is not None]
    return InputRow(
        kind=kind,
        linears=len(seen),
        columns=columns,
        tokens_least=min(tokens),
        tokens_most=max(tokens),
        rank_least=min(ranks, default=None),
        rank_most=max(ranks, default=None),
        dead_columns=sum(one.dead_columns for one in seen),
        constant_columns=sum(one.constant_columns for one in seen),
        few=sum(one.few for one in seen),
        unreached=sum(not one.tokens for one in seen),
    )


def ledger_remarks(ledger: Ledger) -> tuple[Remark, ...]:
    """What the run had to tell, then what was told of each tensor."""
    run = [Remark(kind="warning", where="", text=text) for text in ledger.warnings]
    tensors = [
        Remark(kind="fallback", where=name, text=text)
        for name, entry in ledger.tensors.items()
        for text in entry.notes
    ]
    return (*run, *tensors)


def size_parts(
    original: Mapping[str, TensorInfo],
    written: Mapping[str, TensorInfo],
    ledger: Ledger,
    block_paths: Iterable[str],
) -> tuple[SizePart, ...]:
    """Where the bytes are, before and after.

    Args:
        original: The source's tensors.
        written: The artifact's.
        ledger: Ties the two together.
        block_paths: Of the decoder blocks.

    Returns:
        Parts that are not empty, largest in the original first.
    """
    blocks = tuple(f"{path}." for path in block_paths)
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    placed: set[str] = set()
    for name, info in original.items():
        entry = ledger.tensors.get(name)
        compressed = entry is not None and entry.spec is not None
        linear = compressed and entry is not None and entry.end is None
        part = "compressed linears" if linear else _kept_part(name, info, blocks)
        before[part] = before.get(part, 0) + info.bytes_stored
        for output in entry.outputs if entry is not None else ():
            if output in written and output not in placed:
                placed.add(output)
                own = SCALES if linear and output.endswith(_SCALE_ENDINGS) else part
                after[own] = after.get(own, 0) + written[output].bytes_stored
    for entry in ledger.tensors.values():
        if entry.copy_of is not None:  # a head that was tied: the original held no such tensor
            placed.update(entry.outputs)
            stored = sum(written[name].bytes_stored for name in entry.outputs if name in written)
            after["head"] = after.get("head", 0) + stored
    rest = sum(info.bytes_stored for name, info in written.items() if name not in placed)
    if rest:
        after["other"] = after.get("other", 0) + rest
    names = sorted({*before, *after}, key=lambda part: (-before.get(part, 0), part))
    return tuple(
        SizePart(name=part, original_bytes=before.get(part, 0), compressed_bytes=after.get(part, 0))
        for part in names
    )


def _bits_per_weight(entry: Entry) -> float:
    return entry.bits / max(prod(entry.shape), 1)


def _kept_part(name: str, info: TensorInfo, blocks: tuple[str, ...]) -> str:
    if len(info.shape) < 2:
        return "norms and biases"
    if name.startswith(blocks):
        return "linears kept as they are"
    return "head" if "head" in name or "embed_out" in name else "embedding"
