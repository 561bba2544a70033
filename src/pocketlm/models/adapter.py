"""A causal language model as a stream of blocks: implements ModelView for any decoder.

The model stands on the meta device; one block at a time gets its weights. Its own forward is run
with stand-ins for the blocks and the head, so whatever it does around them is done.
Legend: B sequences, T tokens, N positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.views import End, Fold, Group, Rows, TensorSource
from pocketlm.formats.capabilities import is_expert
from pocketlm.models.apply_fold import BlockFolds
from pocketlm.models.block import Block
from pocketlm.models.call import (
    Call,
    Recorder,
    TensorShare,
    first_tensor,
    hand_on,
    stand_in,
)
from pocketlm.models.config import context_length, head_width
from pocketlm.models.ends import Ends, find_ends
from pocketlm.models.experts import run_all_experts
from pocketlm.models.folds import FoldProbe
from pocketlm.models.holding import packing_refusal
from pocketlm.models.kinds import most_common_dtype, tensor_kinds
from pocketlm.models.layout import Layout, lay_out
from pocketlm.models.linear import Linear
from pocketlm.models.load import Loader
from pocketlm.models.names import NameMap
from pocketlm.models.observe import Observation, observe
from pocketlm.models.packed import PackedForm
from pocketlm.models.run import pause_before, round_inputs
from pocketlm.models.skeleton import Skeleton
from pocketlm.models.stream import SafetensorsSource

PROBE_TOKENS = 8  # enough for every token-dependent path of a block


class Model:
    """A ModelView (see core/views.py).

    Args:
        source: The checkpoint's tensors.
        config: config.json as it is in the source.
        skeleton: The model without weights.
        names: The checkpoint's names against the skeleton's.
        fused_experts: Modules of experts that stay fused → why.
        device: Where blocks compute.
        compute_dtype: What they compute in.
        side_files: Files an artifact carries over.
        load_tokenizer: Loads the tokenizer.
        quantizers: Module path, as the checkpoint spells it → how its inputs are rounded.
        shortcuts: Module between two blocks' bases → the first's last linear (models/shortcut.py).
        forms: Tensor name → how the checkpoint holds it, of every compressed weight.
    """

    def __init__(
        self,
        source: TensorSource,
        config: Mapping[str, Any],
        skeleton: Skeleton,
        names: NameMap,
        fused_experts: Mapping[str, str],
        device: torch.device,
        compute_dtype: torch.dtype,
        side_files: Callable[[], Mapping[str, bytes]],
        load_tokenizer: Callable[[], PreTrainedTokenizerBase],
        quantizers: Mapping[str, InputQuantizer] | None = None,
        shortcuts: Mapping[str, str] | None = None,
        forms: Mapping[str, PackedForm] | None = None,
    ) -> None:
        self.quantizers, self.shortcuts = quantizers or {}, shortcuts or {}
        self.forms = forms or {}
        self.source, self.config, self.names = source, config, names
        self.device, self.compute_dtype = device, compute_dtype
        self.skeleton = skeleton
        self._side_files, self._load_tokenizer = side_files, load_tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        model = skeleton.model
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        self._loader = Loader(source, names, model, device, compute_dtype)
        self._ends = Ends(self._loader, model, skeleton.blocks)
        self._layouts = tuple(
            lay_out(block, path, names, fused_experts)
            for block, path in zip(skeleton.blocks, skeleton.block_paths, strict=True)
        )
        self.block_paths = tuple(layout.path for layout in self._layouts)
        self.extras, self.repeated = names.extras, names.repeated
        self._share = TensorShare()
        self._returned: int | None = None  # how many things a block returns; 0: the bare tensor
        self._probe: tuple[Tensor, Call] | None = None
        self._observed: dict[Any, Observation] = {}
        self._folds: dict[Any, list[Fold | None]] = {}
        text = model.config.get_text_config()
        self.vocabulary = int(text.vocab_size)
        self.context = context_length(text)
        embedding = model.get_input_embeddings()
        self.tied = embedding.weight is self._ends.head.weight
        self.dtype = most_common_dtype(source)

    # --- around the blocks ---

    def _run_model(
        self,
        tokens_BT: Tensor,
        blocks: list[Callable[..., Any]],
        head: Callable[[Tensor], Tensor],
        gradients: bool = False,
    ) -> Any:
        """The model's own forward with stand-ins for all blocks and the head."""
        modules = [*self.skeleton.blocks, self._ends.head]
        with (
            torch.set_grad_enabled(gradients),
            stand_in(modules, [*blocks, head]),
            self._ends.reading_rows(),
        ):
            return self.skeleton.model(input_ids=tokens_BT, use_cache=False)

    def _recorders(self) -> list[Recorder]:
        return [Recorder(self._wrap, self._share) for _ in self.skeleton.blocks]

    def _passed_over(self) -> list[Callable[..., Any]]:
        """Stand-ins for all blocks where only what surrounds them is to run."""
        return [hand_on(self._wrap) for _ in self.skeleton.blocks]

    def _wrap(self, hidden_BTD: Tensor) -> Any:
        """What a block returns when its hidden states are these."""
        if not self._returned:
            return hidden_BTD
        return (hidden_BTD, *[None] * (self._returned - 1))

    def begin(self, tokens_BT: Tensor) -> tuple[Tensor, Call]:
        """Embeds a batch and records what each block will be called with.

        Args:
            tokens_BT: Token ids, int64.

        Returns:
            The first block's input [B, T, D], and the call to hand to every block's `start`.
        """
        self._learn_return_type()
        return self._record(tokens_BT, None)

    def _record(self, tokens_BT: Tensor, first: Callable[..., Any] | None) -> tuple[Tensor, Call]:
        recorders = self._recorders()
        stand_ins: list[Callable[..., Any]] = list(recorders)
        if first is not None:
            stand_ins[0] = first(recorders[0])
        self._run_model(tokens_BT.to(self.device), stand_ins, lambda hidden: hidden)
        calls = zip(recorders, self.block_paths, strict=True)
        call = Call(tuple(recorder.call(path) for recorder, path in calls))
        hidden = recorders[0].hidden
        assert hidden is not None
        return hidden, call

    def _learn_return_type(self) -> None:
        """Runs the first block for real on a few tokens: some classes return tuples."""
        if self._returned is not None:
            return
        module = self.skeleton.blocks[0]
        forward = module.forward

        def real(recorder: Recorder) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                recorder(*args, **kwargs)
                output = forward(*args, **kwargs)
                self._returned = len(output) if isinstance(output, tuple) else 0
                return output

            return run

        loaded = any(not p.is_meta for p in module.parameters())
        if not loaded:
            self._loader.fill(module, self.skeleton.block_paths[0])
        tokens = torch.arange(PROBE_TOKENS).remainder(self.vocabulary)[None]
        self._probe = self._record(tokens, real)
        if not loaded:
            self._loader.empty(module)

    def finish(self, hidden_BTD: Tensor) -> Tensor:
        """The last block's output through the final norm: what the head reads."""
        return self._finish(hidden_BTD, gradients=False)

    def _finish(self, hidden_BTD: Tensor, gradients: bool) -> Tensor:
        self._learn_return_type()
        captured: list[Tensor] = []

        def head(hidden: Tensor) -> Tensor:
            captured.append(hidden)
            return hidden

        stand_ins = self._passed_over()
        stand_ins[-1] = lambda *args, **kwargs: self._wrap(hidden_BTD)
        # As many ids as there are positions: GPT-2 and its kin view the result in their shape.
        ids_BT = torch.zeros(hidden_BTD.shape[:-1], dtype=torch.int64, device=self.device)
        self._run_model(ids_BT, stand_ins, head, gradients)
        return captured[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 logits [N, V] of some finished positions; the caller keeps N small."""
        return self._logits(hidden_ND, gradients=False)

    def _logits(self, hidden_ND: Tensor, gradients: bool) -> Tensor:
        self._learn_return_type()
        logits_1NV = self._run_model(
            self._one_token(),
            self._passed_over(),
            lambda _: self._ends.head_logits(hidden_ND[None]),
            gradients,
        ).logits
        return logits_1NV[0].float()

    def loss_gradient(self, hidden_BTD: Tensor, tokens_BT: Tensor, positions: int) -> Tensor:
        """Gradient of the summed loss in the last block's output; see core/views.py."""
        leaf_BTD = hidden_BTD.to(self.device).detach().requires_grad_()
        end_BTD = self._finish(leaf_BTD, gradients=True)
        next_N = tokens_BT[:, 1:].flatten().to(self.device)
        end_ND = end_BTD.detach()[:, :-1].flatten(0, 1)
        slopes: list[Tensor] = []
        for end_PD, next_P in zip(end_ND.split(positions), next_N.split(positions), strict=True):
            end_PD = end_PD.clone().requires_grad_()
            loss = F.cross_entropy(self._logits(end_PD, True), next_P, reduction="sum")
            slopes.append(torch.autograd.grad(loss, end_PD)[0])
        slope_BTD = torch.cat(slopes).unflatten(0, (len(tokens_BT), -1))
        slope_BTD = F.pad(slope_BTD, (0, 0, 0, 1))  # the last token predicts nothing
        return torch.autograd.grad(end_BTD, leaf_BTD, slope_BTD)[0]

    def _one_token(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.int64, device=self.device)

    # --- blocks ---

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Loads one block; its memory serves the next one when the context closes.

        Args:
            index: Position in the model.

        Yields:
            The block with its weights.
        """
        module, layout = self.skeleton.blocks[index], self._layouts[index]
        self._learn_return_type()
        self._loader.fill(module, self.skeleton.block_paths[index])
        handles: list[RemovableHandle] = []
        try:
            seen = self._observe(index, module, layout)
            groups = groups_of(seen, layout, self._folds.get(layout.key))
            idle = {layout.names[path]: "its forward never ran" for path in seen.idle}
            names = [name for group in groups for name in group.linears]
            by_name = {layout.names[path]: path for path in layout.linears}
            modules = {name: module.get_submodule(by_name[name]) for name in names}
            linears = {
                n: Linear(m, layout.tensors[by_name[n]], self.source) for n, m in modules.items()
            }
            order = {modules[name]: group.index for group in groups for name in group.linears}
            for name, view in linears.items():
                view.set_input_quantizer(self.quantizers.get(name))
            handles = [*pause_before(order), *round_inputs(linears.values())]
            skipped = {**layout.skipped, **idle}
            probe = partial(self._probe_folds, index, module, layout)
            path = self.skeleton.block_paths[index]
            spelled = {layout.spell_path(inner): inner for inner, _ in module.named_modules()}
            folds = BlockFolds(module, path, linears, spelled, self.names, self.source)
            parameters = self._plain_parameters(module, path)
            yield Block(
                index, layout.path, module, linears, groups, skipped, probe, folds, parameters
            )
        finally:
            for handle in handles:
                handle.remove()
            self._loader.empty(module)

    def prefetch(self, index: int) -> None:
        """Begins to read a block for a GPU; nothing where the CPU computes, or past the last."""
        parallel = isinstance(self.source, SafetensorsSource)
        if self.device.type == "cuda" and parallel and index < len(self.skeleton.blocks):
            self._loader.prefetch(self.skeleton.blocks[index], self.skeleton.block_paths[index])

    def _plain_parameters(self, module: nn.Module, path: str) -> dict[str, str]:
        """Checkpoint tensor → parameter of a block, of those that are stored as they are."""
        bound = {
            name: self.names.bindings[f"{path}.{name}"] for name, _ in module.named_parameters()
        }
        return {binding.tensors[0]: name for name, binding in bound.items() if binding.plain}

    def _probe_folds(self, index: int, module: nn.Module, layout: Layout) -> tuple[Group, ...]:
        seen = self._observed[layout.key]
        if layout.key not in self._folds:
            assert self._probe is not None
            hidden, call = self._probe
            head_dim = head_width(self.skeleton.model.config.get_text_config())
            run_all_experts(module, True)
            probe = FoldProbe(module, hidden, call.blocks[index], head_dim)
            self._folds[layout.key] = probe.folds(seen)
            run_all_experts(module, False)
        return groups_of(seen, layout, self._folds[layout.key])

    def _observe(self, index: int, module: nn.Module, layout: Layout) -> Observation:
        if layout.key not in self._observed:
            assert self._probe is not None
            hidden, call = self._probe
            linears = {path: module.get_submodule(path) for path in layout.linears}
            run = call.blocks[index].run
            run_all_experts(module, True)
            self._observed[layout.key] = observe(
                linears, module, lambda: first_tensor(run(module, hidden))
            )
            run_all_experts(module, False)
        return self._observed[layout.key]

    def linear_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(O, I) of every linear inside blocks, by module path, without reading a weight."""
        return {
            layout.names[path]: shape
            for layout in self._layouts
            for path, shape in layout.linears.items()
        }

    def ends(self) -> tuple[End, ...]:
        """Embedding and head, without reading them; one entry where they are tied.

        A weight that no single tensor of the checkpoint holds is left out.
        """
        return find_ends(self.skeleton.model, self._ends.head, self.names)

    @contextmanager
    def with_ends(self, rows: Mapping[str, Rows]) -> Iterator[None]:
        """Puts other values in place of ends' weights while the context is open.

        Args:
            rows: Tensor of an end → what gives its rows start to stop.
        """
        self._ends.forget()
        self._loader.replaced = dict(rows)
        try:
            yield
        finally:
            self._ends.forget()
            self._loader.replaced = {}

    @property
    def stores_transposed(self) -> bool:
        """Whether linears inside blocks are stored as [I, O] (GPT-2's Conv1D)."""
        block = self.skeleton.blocks[0]
        return any(isinstance(module, Conv1D) for module in block.modules())

    @property
    def other_names(self) -> Mapping[str, str]:
        """Module of a block, but no expert, as the checkpoint names it → as transformers does.

        Only where these differ.
        """
        found = self.names.other_names(self.skeleton.block_paths)
        return {one: other for one, other in found.items() if not is_expert(one)}

    def packing_refusal(self, target: str) -> str | None:
        """Why an engine cannot load its linears in compressed-tensors' form, as a clause; or None.

        Args:
            target: The engine.
        """
        if self.stores_transposed:
            return "linears lie transposed in the checkpoint"
        if target != "transformers":
            return None
        kinds = [self.skeleton.blocks[alike[0]] for alike in self.alike_blocks()]
        return packing_refusal(self.skeleton.model, kinds)

    def alike_blocks(self) -> list[list[int]]:
        """Indices of blocks that are built alike, by layout."""
        alike: dict[Any, list[int]] = {}
        for index, layout in enumerate(self._layouts):
            alike.setdefault(layout.key, []).append(index)
        return list(alike.values())

    def skipped(self, index: int) -> Mapping[str, str]:
        """Module path → why it is left alone, of one block, without loading it."""
        return self._layouts[index].skipped

    @property
    def head_path(self) -> str:
        """Module path of the head."""
        modules = self.skeleton.model.named_modules()
        return next(path for path, module in modules if module is self._ends.head)

    def tensor_kinds(self) -> Mapping[str, str]:
        """Every tensor → what part of the model it is; see models/kinds.py."""
        in_blocks = {t for layout in self._layouts for t in layout.tensors.values()}
        return tensor_kinds(
            self.skeleton.model, self._ends.head, self.names, self.source.infos(), in_blocks
        )

    # --- beside the weights ---

    def side_files(self) -> Mapping[str, bytes]:
        """Files an artifact carries over: tokenizer, chat template, generation config, licence."""
        return self._side_files()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer


def groups_of(
    seen: Observation, layout: Layout, folds: list[Fold | None] | None
) -> tuple[Group, ...]:
    """The groups under the checkpoint's names."""
    found = folds or [None] * len(seen.groups)
    return tuple(
        Group(index, tuple(layout.names[path] for path in paths), layout.spell(fold))
        for index, (paths, fold) in enumerate(zip(seen.groups, found, strict=True))
    )
