"""A compressed artifact read as the model it came from, decoded tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError, SourceError
from pocketlm.core.tensors import WeightTensor
from pocketlm.core.views import TensorInfo, TensorSource
from pocketlm.formats.read import CompressedIndex
from pocketlm.models.bytes import byte_view, require_finite
from pocketlm.models.packed import PackedForm

WHERE = "the compressed artifact"


class DecodedSource:
    """A TensorSource that decodes compressed linears as they are read, into float32.

    float32 holds scale times code with one rounding, so what is read is what was measured.

    Args:
        stored: The artifact's tensors.
        index: Which of them make compressed linears.

    Attributes:
        rounded_to: Module → dtype its products are rounded to before they become float32, as an
            engine does that is compared with; empty: exact in float32.
    """

    def __init__(self, stored: TensorSource, index: CompressedIndex) -> None:
        self._stored, self._index = stored, index
        self.rounded_to: Mapping[str, torch.dtype] = {}
        replaced = index.replaced
        self._module_of: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        for name, info in stored.infos().items():
            module = replaced.get(name)
            if module is None:
                self._infos[name] = info
                continue
            original = index.modules[module].tensor_name
            if original not in self._module_of:
                self._module_of[original] = module
                self._infos[original] = TensorInfo(original, torch.float32, self._shape(module))

    @classmethod
    def wrap(cls, stored: TensorSource, config: Mapping[str, Any]) -> DecodedSource | None:
        """The decoded view of an artifact; None where nothing in it is compressed.

        Raises:
            UnsupportedModel: If it is compressed in a way that is not read here.
            ArtifactError: If configuration and tensors contradict each other.
        """
        index = CompressedIndex.build(config, stored.infos())
        return None if index is None else cls(stored, index)

    def forms(self) -> Mapping[str, PackedForm]:
        """Tensor name → how it is held, of every compressed weight."""
        infos, found = self._stored.infos(), dict[str, PackedForm]()
        for name, module in self._module_of.items():
            known, shape = self._index.modules[module], self._infos[name].shape
            found[name] = PackedForm(
                format=self._index.format,
                spec=known.spec,
                shape=(shape[1], shape[0]) if known.transposed else (shape[0], shape[1]),
                bytes_stored=sum(infos[tensor].bytes_stored for tensor in known.tensors),
                scale_dtype=torch.float16 if known.scales is None else infos[known.scales].dtype,
                transposed=known.transposed,
                activations=known.activations,
            )
        return found

    def packed(self, name: str) -> WeightTensor:
        """A compressed weight [O, I] as it is stored, by its tensor name.

        Raises:
            ArtifactError: If its tensors contradict each other or the configuration.
            SourceError: If they are cut off.
        """
        return self._index.decode(self._module_of[name], self._stored.read)

    def require_biases(self, extras: Iterable[str], where: str) -> None:
        """Accepts a bias that the model has no place for only where it is zero.

        GPTQ files of AutoGPTQ hold one for every linear.

        Args:
            extras: Tensors that make no parameter.
            where: The checkpoint, for messages.

        Raises:
            ArtifactError: If such a bias would be lost.
        """
        for name in extras:
            module, _, leaf = name.rpartition(".")
            if leaf == "bias" and module in self._index.modules and self.read(name).any():
                raise ArtifactError(
                    f"holds '{name}', which the model has no place for.", where=where
                )

    def _shape(self, module: str) -> tuple[int, ...]:
        infos = self._stored.infos()
        rows, columns = self._index.shape(module, lambda n: infos[n].shape, self._stored.read)
        transposed = self._index.modules[module].transposed
        return (columns, rows) if transposed else (rows, columns)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model before compression, in the artifact's order."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """The whole tensor, decoded; the caller owns the memory.

        Raises:
            SourceError: If it is absent, cut off, or not finite.
        """
        module = self._module_of.get(name)
        if module is None:
            return self._stored.read(name)
        weight_OI = self._decoded(module, self._index.decode(module, self._stored.read))
        require_finite(name, weight_OI, WHERE)
        return weight_OI.T.contiguous() if self._index.modules[module].transposed else weight_OI

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of the tensor.

        Raises:
            SourceError: If they are cut off or not finite.
        """
        if name not in self._infos:
            raise SourceError(f"holds no tensor '{name}'.", where=WHERE)
        module = self._module_of.get(name)
        if module is None:
            return self._stored.rows(name, start, stop)
        if not self._index.modules[module].by_rows:
            return self.read(name)[start:stop].clone()
        rows = self._index.decode_rows(module, start, stop, self._stored.rows, self._stored.read)
        weight_OI = self._decoded(module, rows)
        require_finite(name, weight_OI, WHERE)
        return weight_OI

    def _decoded(self, module: str, weight: WeightTensor) -> Tensor:
        return weight.dequantize(self.rounded_to.get(module, torch.float32)).float()

    @property
    def bytes_stored(self) -> int:
        """Bytes of all tensors as the artifact holds them."""
        return sum(info.bytes_stored for info in self._stored.infos().values())

    def pieces(self, name: str, bytes_at_once: int | None = None) -> Iterator[WeightTensor]:
        """A compressed weight as it is stored, some rows at a time where they stand alone.

        Args:
            name: One of `forms`.
            bytes_at_once: Of the rows in float32; None: the whole weight in one piece.

        Raises:
            ArtifactError: If the tensors contradict each other.
        """
        module = self._module_of[name]
        by_rows, (rows, columns) = self._index.modules[module].by_rows, self._infos[name].shape
        if bytes_at_once is None or not by_rows or rows * columns * 4 <= bytes_at_once:
            yield self._index.decode(module, self._stored.read)
            return
        step = max(1, bytes_at_once // (columns * 4))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield self._index.decode_rows(module, start, stop, self._stored.rows, self._stored.read)

    def chunks(self, name: str, bytes_at_once: int) -> Iterator[bytes | memoryview]:
        """The tensor's raw bytes, in order."""
        if name not in self._module_of:
            yield from self._stored.chunks(name, bytes_at_once)
            return
        view, step = byte_view(self.read(name)), max(8, bytes_at_once // 8 * 8)
        for start in range(0, len(view), step):
            yield view[start : start + step]

    def quantizers(self) -> Mapping[str, InputQuantizer]:
        """Module path → what its inputs are rounded with; empty where nothing rounds them."""
        found = {m: self._index.quantizer(m, self._stored.read) for m in self._index.modules}
        return {module: quantizer for module, quantizer in found.items() if quantizer is not None}

    def fingerprint(self) -> str:
        """That of the stored tensors."""
        return self._stored.fingerprint()
