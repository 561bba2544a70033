"""Writes a model or an artifact as a GGUF file, tensor by tensor; says what was rounded again.

Codes of an artifact are kept wherever the wanted type holds them; what is written is decoded again
and compared, so that the account tells what was lost and not what should be. All else is rounded to
its type by linear steps that need no data. Memory is that of one tensor of the checkpoint: stacks
of experts are written expert by expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pocketlm.core.errors import ArtifactError, UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearStep
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.core.ternary import to_ternary
from pocketlm.core.views import TensorSource
from pocketlm.engine.ends import quantized_rows
from pocketlm.formats.gguf_blocks import FLOATS, decode, encode
from pocketlm.formats.gguf_hold import holding_type
from pocketlm.formats.gguf_mix import GUESSED, MIXES, always_plain, tensor_type
from pocketlm.formats.gguf_types import SPECS, block_weights, row_bytes
from pocketlm.models import open_model
from pocketlm.models.adapter import Model
from pocketlm.models.bytes import byte_view
from pocketlm.models.decoded import DecodedSource
from pocketlm.models.gguf_experts import is_stack
from pocketlm.models.gguf_form import GgufForm
from pocketlm.models.gguf_write import GgufEntry, write_gguf

ROWS_AT_ONCE_BYTES = 64 << 20


class WrittenTensor(BaseModel):
    """What became of one tensor.

    Attributes:
        type: Its type in the file.
        kept: Whether the artifact's codes were written, of all experts in a stack; else values were
            rounded to the type.
        error: Squared distance to the source's values over their squared length; 0: nothing lost.
    """

    model_config = ConfigDict(extra="forbid")

    type: str
    kept: bool
    error: float


@dataclass
class Account:
    """What was written, filled while it is."""

    tensors: dict[str, WrittenTensor] = field(default_factory=dict)

    @property
    def kinds(self) -> Counter[str]:
        """Type → how many tensors, of those that are no vectors."""
        return Counter(
            t.type for name, t in self.tensors.items() if not name.endswith("norm.weight")
        )

    def notes(self) -> list[str]:
        """What there is to be told."""
        kept = [t for t in self.tensors.values() if t.kept]
        moved = {n: t for n, t in self.tensors.items() if t.kept and t.error > 0}
        rounded = {n: t for n, t in self.tensors.items() if not t.kept and t.error > 0}
        said = [", ".join(f"{count} in {kind}" for kind, count in sorted(self.kinds.items())) + "."]
        if kept:
            said.append(f"the codes of {len(kept)} tensors are kept as they are.")
        if moved:
            worst = max(moved, key=lambda name: moved[name].error)
            said.append(
                f"scales or minima of {len(moved)} of them are rounded to float16: at most "
                f"{moved[worst].error:.1e} of a weight's squares ({worst})."
            )
        if rounded:
            worst = max(rounded, key=lambda name: rounded[name].error)
            said.append(
                f"{len(rounded)} tensors are rounded to their type, without data: at most "
                f"{rounded[worst].error:.1e} of a weight's squares ({worst})."
            )
        return said


@dataclass(frozen=True)
class Written:
    """A GGUF file.

    Attributes:
        bytes_before: Of the source's tensors, as they are stored or decoded.
        bytes_after: Of the file.
        tensors: Name in the file → what became of it.
        notes: What there is to be told.
    """

    bytes_before: int
    bytes_after: int
    tensors: Mapping[str, WrittenTensor]
    notes: list[str]


def write(
    source: str | Path,
    output: Path,
    mix: str | None,
    dtype: str | None,
    steps: Sequence[LinearStep],
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Writes the file; it takes its name once it is whole.

    Args:
        source: A model or an artifact.
        output: The file.
        mix: A mixture of types, as `gguf_mix.MIXES` has it; None: what holds the codes there are.
        dtype: Of values that no type holds as codes; None: the source's.
        steps: What rounds values to a type.
        on_progress: Called with bytes of tensors written and in all.

    Raises:
        UnsupportedModel: If llama.cpp does not compute this model's function.
        ArtifactError: If experts are missing, or differ in shape.
        ResourceError: If the disk is full.
    """
    model = open_model(source, allow_compressed=True)
    form = GgufForm.of(model)
    plan = _Plan(model.source, form, mix, dtype, steps, Account())
    names = form.names(model.source.infos())
    if model.quantizers:
        first = next(iter(model.quantizers))
        raise UnsupportedModel(
            "rounds the inputs of linears, which a GGUF file cannot say.",
            where=first,
            remedy="Decode it first (--to dense), or compress the weights alone.",
        )
    entries = [
        GgufEntry(name, "F32", tuple(table.shape), _just(table))
        for name, table in form.tables().items()
    ]
    entries += [plan.entry(spelled, members) for spelled, members in form.stacks(names).items()]
    keys = form.metadata(_model_name(model, source), _file_type(mix, entries))
    size = write_gguf(output, keys, entries, on_progress)
    before = sum(info.bytes_stored for info in model.source.infos().values())
    if isinstance(model.source, DecodedSource):
        before = model.source.bytes_stored
    notes = [*plan.account.notes(), *form.notes()]
    return Written(before, size, plan.account.tensors, notes)


def _model_name(model: Model, source: str | Path) -> str:
    return str(model.config.get("_name_or_path") or Path(source).name)


def _file_type(mix: str | None, entries: Sequence[GgufEntry]) -> int:
    if mix is not None:
        return MIXES[mix][1]
    kinds = Counter(entry.kind for entry in entries if len(entry.shape) > 1)
    most = kinds.most_common(1)[0][0] if kinds else ""
    return MIXES.get(most, ("", GUESSED))[1]


def _just(values: Tensor) -> Callable[[], Iterator[memoryview]]:
    return lambda: iter((byte_view(values.contiguous()),))


@dataclass
class _Loss:
    """What became of one tensor of the source; squares are those of its values."""

    kept: bool
    lost: float = 0.0
    whole: float = 0.0


@dataclass(frozen=True)
class _Plan:
    """How each tensor is written."""

    source: TensorSource
    form: GgufForm
    mix: str | None
    dtype: str | None
    steps: Sequence[LinearStep]
    account: Account

    def entry(self, spelled: str, members: Sequence[str]) -> GgufEntry:
        """One tensor of the file.

        Args:
            spelled: Its name in the file.
            members: What it is made of: a tensor of the source, or the experts of a stack in order.

        Raises:
            ArtifactError: If experts differ in shape.
        """
        infos = self.source.infos()
        shape = infos[members[0]].shape
        for name in members:
            if infos[name].shape != shape:
                raise ArtifactError(
                    f"is {infos[name].shape}, but {members[0]} is {shape}: llama.cpp stacks the "
                    "experts of a block.",
                    where=name,
                    remedy="Keep the model in another format: pocketlm export --to dense.",
                )
        kinds = {self._kind(name, spelled, self._held(name)) for name in members}
        kind = max(sorted(kinds), key=lambda kind: row_bytes(kind, shape[-1]))
        whole = (len(members), *shape) if is_stack(spelled) else shape
        return GgufEntry(spelled, kind, whole, lambda: self._stacked(members, spelled, kind))

    def _stacked(self, members: Sequence[str], spelled: str, kind: str) -> Iterator[memoryview]:
        """The bytes of a tensor of the file; what became of it goes into the account."""
        losses: list[_Loss] = []
        for name in members:
            codes = kind not in FLOATS and self._held(name) == kind
            losses.append(_Loss(kept=codes))
            yield from self._chunks(name, spelled, kind, losses[-1])
        lost, whole = sum(one.lost for one in losses), sum(one.whole for one in losses)
        self.account.tensors[spelled] = WrittenTensor(
            type=kind, kept=all(one.kept for one in losses), error=lost / whole if whole else 0.0
        )

    def _held(self, name: str) -> str | None:
        """The type that holds the artifact's codes of a tensor; None where it has none."""
        stored = self.form.model.forms.get(name)
        return None if stored is None else holding_type(stored.spec, stored.shape[1])

    def _kind(self, name: str, spelled: str, held: str | None) -> str:
        info = self.source.infos()[name]
        if self.mix is not None:
            return tensor_type(self.mix, spelled, info.shape, self.form.architecture)
        if always_plain(spelled, info.shape):
            return "F32"
        if held is not None and held not in FLOATS:
            return held
        asked = self.dtype or str(info.dtype).removeprefix("torch.")
        return {"float32": "F32", "bfloat16": "BF16"}.get(asked, "F16")

    def _chunks(self, name: str, spelled: str, kind: str, loss: _Loss) -> Iterator[memoryview]:
        order_O = self.form.row_order(spelled)
        for weight_OI, packed in self._pieces(name, keep=loss.kept, whole=order_O is not None):
            if order_O is not None:
                weight_OI = weight_OI[order_O]
                packed = None if packed is None else taken_rows(packed, order_O)
            weight_OI = weight_OI + self.form.norm_shift(spelled)
            if kind in FLOATS:
                data = weight_OI.to(FLOATS[kind]).contiguous()
                back_OI = data.float()
            else:
                loss.kept = loss.kept and packed is not None
                if packed is None:
                    packed = self._rounded(weight_OI, spelled, kind)
                data = encode(packed, kind)
                back_OI = decode(data, kind).dequantize()
            loss.lost += float((weight_OI - back_OI).square().sum(dtype=torch.float64))
            loss.whole += float(weight_OI.square().sum(dtype=torch.float64))
            yield byte_view(data)

    def _pieces(
        self, name: str, *, keep: bool, whole: bool
    ) -> Iterator[tuple[Tensor, Packed | None]]:
        """Rows of a tensor as float32, with their codes where those are kept."""
        shape = self.source.infos()[name].shape
        if keep:
            assert isinstance(self.source, DecodedSource)
            for packed in self.source.pieces(name, None if whole else ROWS_AT_ONCE_BYTES):
                plain = isinstance(packed, PackedInt | PackedFloat)  # no columns out of order
                yield packed.dequantize(), packed if plain else None
            return
        if whole or len(shape) < 2:
            yield self.source.read(name).float(), None
            return
        step = max(1, ROWS_AT_ONCE_BYTES // (shape[-1] * 4))
        for start in range(0, shape[0], step):
            rows = self.source.rows(name, start, min(start + step, shape[0]))
            yield rows.float(), None

    def _rounded(self, weight_OI: Tensor, spelled: str, kind: str) -> Packed:
        if kind == "TQ1_0":  # three levels, fewer than any grid of a recipe has
            return to_ternary(weight_OI, block_weights(kind), torch.float16)
        spec: QuantSpec = SPECS[kind]
        return quantized_rows(weight_OI, spelled, spec, torch.float16, self.steps)


def taken_rows(packed: Packed, order_O: Tensor) -> Packed:
    """The same codes and scales with their rows in another order; each row is by itself."""
    if isinstance(packed, PackedInt):
        zero_OG = None if packed.zero_OG is None else packed.zero_OG[order_O]
        return PackedInt(packed.codes_OI[order_O], packed.scale_OG[order_O], zero_OG, packed.bits)
    scale = packed.scale.map(lambda tensor: tensor[order_O])
    return replace(packed, codes_OI=packed.codes_OI[order_O], scale=scale)
