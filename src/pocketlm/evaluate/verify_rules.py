"""Rules that engines break on, checked on the written files.

Splitting over GPUs, linears that an engine fuses, lists of what is not compressed, zero points off
by one, a chat template or tensors beside the decoder that were left behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pocketlm.core.errors import ArtifactError, PocketLMError
from pocketlm.core.permuted import Permuted
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.evaluate.verify_files import Artifact, Named, NotChecked
from pocketlm.formats import compressed_tensors, pocketlm
from pocketlm.formats.capabilities import FUSED, capability, check_layer, check_model, is_expert
from pocketlm.models import open_model
from pocketlm.models.adapter import Model
from pocketlm.models.tokenizer import load_tokenizer

WORLDS = (2, 4, 8)  # GPUs over which engines split a layer
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "dense_4h_to_h", "fc2", "c_proj", "w2")
OWN_FILES = ("llama.cpp", "onnxruntime")  # an artifact is exported for them
WORD = {"pack-quantized": 32, "gptq": 32, "gptq_v2": 32, "awq": 32}  # bits of a packed word
BESIDE = {
    "multi-token prediction": re.compile(r"(^|\.)(mtp|nextn|eh_proj|enorm|hnorm)(\.|_|$)"),
    "vision": re.compile(r"(^|\.)(vision|visual|image|vit|multi_modal_projector|mm_)"),
}


@dataclass
class Rules:
    """What the rules are checked on.

    Attributes:
        view: The artifact as we read it.
        target: A name of `formats/capabilities.json`.
        split: Over how many GPUs the engine is to split it.
        against: The original; None: not given.
    """

    view: Model
    target: str
    split: int = 1
    against: Path | str | None = None

    def checks(self) -> tuple[Named, ...]:
        """Name, the checks it builds on, and function of each."""
        needs = ("config.json", "shards", "compressed weights")
        of_directories = (
            ("number formats", needs, self.check_formats),
            ("fused linears", needs, self.check_fused),
            ("ignore list", needs, self.check_ignored),
            ("tensor parallel", needs, self.check_split),
        )
        return (
            *(() if self.target in OWN_FILES else of_directories),
            ("zero points", needs, self.check_zero_points),
            ("chat template", ("shards",), self.check_template),
            ("tensors beside the decoder", ("shards",), self.check_beside),
        )

    def check_formats(self, artifact: Artifact) -> str:
        """The engine is known to run every linear's grid, as it is stored."""
        form, specs = form_of(artifact), grids(artifact)
        if form not in capability(self.target).formats:
            raise ArtifactError(
                f"{self.target} does not load the format {form}.",
                remedy="It loads " + ", ".join(capability(self.target).formats) + ".",
            )
        assert artifact.index is not None
        for name, spec in specs.items():
            shape = self.view.linear_shapes().get(name)
            if shape is not None:
                activations = artifact.index.modules[name].activations
                check_layer(form, spec, shape, self.target, name, activations)
        return f"{len(specs)} grids are among those that {self.target} is known to run."

    def check_fused(self, artifact: Artifact) -> str:
        """Linears that the engine runs as one have one grid, or are all kept."""
        specs = grids(artifact)
        kept = [name for name in self.view.linear_shapes() if name not in specs]
        assert artifact.index is not None
        inputs = {
            name: module.activations
            for name, module in artifact.index.modules.items()
            if module.activations is not None
        }
        check_model(specs, kept, self.target, inputs)
        fused = sum(name.rpartition(".")[2] in (g[0] for g in FUSED) for name in specs)
        experts = sum(map(is_expert, specs))
        return f"{fused} fused layers and {experts} experts' linears agree."

    def check_ignored(self, artifact: Artifact) -> str:
        """By config.json an engine expects packed weights where they are, and nowhere else."""
        packed = set(grids(artifact))
        section = artifact.config["quantization_config"]
        assert artifact.index is not None
        packed |= set(artifact.index.modules)
        linears = {*self.view.linear_shapes()}
        for index in range(len(self.view.block_paths)):
            linears |= {n for n in self.view.skipped(index) if f"{n}.weight" in artifact.tensors}
        if f"{self.view.head_path}.weight" in artifact.tensors:
            linears.add(self.view.head_path)
        for name in sorted(linears):
            expected = expects_packed(section, name)
            if expected is not None and expected != (name in packed):
                what = "stored packed" if name in packed else "stored as it was"
                said = "packed" if expected else "ignored"
                raise ArtifactError(f"is {what}, but {said} by config.json.", where=name)
        kept = len(linears - packed)
        return f"{len(packed)} linears are packed, {kept} are not, as config.json says."

    def check_zero_points(self, artifact: Artifact) -> str:
        """Weights average to about nothing: read by another convention they would be a step off."""
        index = artifact.index
        if index is None:
            raise NotChecked("no weight is packed.")
        steps: dict[str, float] = {}
        for name, module in index.modules.items():
            if not isinstance(module.spec, QuantSpec) or module.spec.type != "int":
                continue
            weight = index.decode(name, artifact.read)
            weight = weight.values if isinstance(weight, Permuted) else weight
            if isinstance(weight, PackedInt):
                step = weight.scale_OG.float().abs().mean().clamp(min=1e-30)
                steps[name] = float(weight.dequantize().mean() / step)
        if not steps:
            raise NotChecked("no linear holds integers.")
        middle = median(map(abs, steps.values()))
        if middle > 0.5:
            worst = max(steps, key=lambda name: abs(steps[name]))
            raise ArtifactError(
                f"weights average {middle:.2f} steps away from 0, most of all here "
                f"({steps[worst]:+.2f}): zero points seem to be stored by another convention.",
                where=worst,
                remedy="Check checkpoint_format: gptq_v2 stores zero points, gptq less one.",
            )
        return f"weights average {middle:.3f} steps away from 0 (median of {len(steps)} linears)."

    def check_split(self, artifact: Artifact) -> str:
        """Over how many GPUs the linears' rows, columns and groups can be split."""
        form = form_of(artifact)
        reasons = {world: self._split_problem(artifact, form, world) for world in WORLDS}
        if self.split > 1:
            problem = self._split_problem(artifact, form, self.split)
            if problem is not None:
                raise ArtifactError(f"cannot be split over {self.split} GPUs: {problem}.")
        works = [str(world) for world in (1, *WORLDS) if world == 1 or reasons[world] is None]
        first = next((w for w in WORLDS if reasons[w] is not None), None)
        why = "" if first is None else f"; not over {first}: {reasons[first]}"
        return f"can be split over {', '.join(works)} GPUs{why}."

    def _split_problem(self, artifact: Artifact, form: str, world: int) -> str | None:
        config = self.view.skeleton.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", world)
        if heads % world:
            return f"{heads} heads"
        shapes = self.view.linear_shapes()
        for name, spec in grids(artifact).items():
            if name not in shapes:
                continue
            rows, columns = shapes[name]
            if name.rpartition(".")[2] in ROW_PARALLEL:
                part, unit = columns, spec.group_size or 1
                if form in WORD and 32 % spec.bits == 0:
                    unit = max(unit, 32 // spec.bits)
                kind = "columns in groups of"
            else:
                part, unit, kind = rows, (spec.group_rows or 1), "rows in units of"
                if form in WORD and not spec.symmetric:
                    unit = max(unit, 32 // spec.bits)
            if part % (world * unit):
                return f"{part} {kind} {unit} in {name}"
        return None

    def check_template(self, artifact: Artifact) -> str:
        """The tokenizer loads from the directory, with the chat template that the source has."""
        tokenizer = _tokenizer(artifact.path)
        if tokenizer is None:
            raise NotChecked("there is no tokenizer beside the weights.")
        found = tokenizer.chat_template
        if self.against is not None:
            theirs = open_model(self.against).tokenizer().chat_template
            if theirs != found:
                what = "is not the original's" if found else "is lost"
                raise ArtifactError(f"the chat template {what}.", where=str(artifact.path))
            return "the original's." if found else "none, as in the original."
        return f"{len(str(found))} characters." if found else "none."

    def check_beside(self, artifact: Artifact) -> str:
        """Draft layers and vision towers, which the decoder does not run, are carried over."""
        if self.against is not None:
            source = open_model(self.against)
            names = {name for name in source.extras if name in source.source.infos()}
            for name in sorted(names):
                if name not in artifact.tensors:
                    raise ArtifactError("was left behind.", where=name)
                if not torch.equal(artifact.read(name), source.source.read(name)):
                    raise ArtifactError("is not what it was in the original.", where=name)
            return (
                f"{len(names)} tensors are the original's." if names else "the original has none."
            )
        promised = {
            "multi-token prediction": artifact.config.get("num_nextn_predict_layers")
            or artifact.config.get("mtp_num_hidden_layers"),
            "vision": artifact.config.get("vision_config"),
        }
        found = {
            kind: sum(pattern.search(name) is not None for name in artifact.tensors)
            for kind, pattern in BESIDE.items()
        }
        extras = len(self.view.extras)
        for kind, said in promised.items():
            if said and not found[kind] and not extras:
                raise ArtifactError(f"config.json promises {kind}, but no tensor is there.")
        return f"{extras} tensors; give the original to have them compared." if extras else "none."


def grids(artifact: Artifact) -> dict[str, QuantSpec]:
    """Module path → grid, of the compressed linears that hold nothing but codes.

    Raises:
        NotChecked: If nothing is compressed.
    """
    if artifact.index is None:
        raise NotChecked("no weight is packed.")
    modules = artifact.index.modules.items()
    return {name: m.spec for name, m in modules if isinstance(m.spec, QuantSpec)}


def form_of(artifact: Artifact) -> str:
    """The name of the artifact's format, as `formats/capabilities.json` spells it.

    Raises:
        NotChecked: If nothing is compressed.
    """
    if artifact.index is None:
        raise NotChecked("no weight is packed.")
    section = artifact.config["quantization_config"]
    if artifact.index.format == "gptq":
        return str(section.get("checkpoint_format") or "gptq")
    return artifact.index.format


def expects_packed(section: Mapping[str, Any], name: str) -> bool | None:
    """Whether an engine expects packed weights of a linear by config.json; None: it does not ask.

    Args:
        section: The ``quantization_config``.
        name: Module path.
    """
    method = section.get("quant_method")
    in_block = any(part.isdigit() for part in name.split("."))
    if method == compressed_tensors.NAME:
        if any(_names(pattern, name) for pattern in section.get("ignore") or ()):
            return False
        groups = section.get("config_groups", {}).values()
        targets = [target for group in groups for target in group["targets"]]
        return any(target == "Linear" or _names(target, name) for target in targets)
    if method == pocketlm.NAME:
        return any(name in group["modules"] for group in section["groups"])
    if not in_block:  # GPTQ and AWQ are of blocks
        return None
    if method == "gptq":
        rules = section.get("dynamic") or {}
        return not any(re.match(p[2:], name) for p in rules if p.startswith("-:"))
    return not any(part in name for part in section.get("modules_to_not_convert") or ())


def _names(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name


def _tokenizer(path: Path) -> Any:
    if not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        return None
    try:
        return load_tokenizer(path)
    except PocketLMError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the tokenizer does not load: {error}") from None
