"""From an artifact and its original to the layers that hurt: opens both, searches, restores.

The found units are restored one after another, worst first; each step's KL is measured, not summed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from pocketlm import __version__, catalog
from pocketlm.calibration.texts import load_text
from pocketlm.calibration.windows import Windows, eval_windows
from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import Recipe
from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.ledger import Ledger
from pocketlm.engine.machine import cache_directory
from pocketlm.evaluate.cache import LEDGER, Findings, content_of
from pocketlm.evaluate.quality import require_same_vocabulary
from pocketlm.formats.capabilities import unit_of
from pocketlm.models import open_model
from pocketlm.models.adapter import Model
from pocketlm.search.bisect import Range, find_worst, forecast
from pocketlm.search.restore import Restored, Restorer
from pocketlm.search.rewrite import patterns

RECIPE = Path("pocketlm") / "recipe.yaml"
NEGLIGIBLE = 0.002  # of the whole gain: less is not looked into


class Culprit(BaseModel):
    """A unit that hurts.

    Attributes:
        name: Module path, or that of what the target fuses; a block's where scales were folded.
        linears: Module paths.
        gain: KL that restoring it alone takes away, in nats a token.
        kl_left: KL with this unit and all worse ones restored.
        bytes_now: Of its stored tensors.
        bytes_kept: In the original's precision.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    linears: tuple[str, ...]
    gain: float
    kl_left: float
    bytes_now: int
    bytes_kept: int


class BisectResult(BaseModel):
    """Which layers hurt.

    Attributes:
        model: The artifact.
        against: The original.
        kl: Of the artifact as it is, mean nats a token.
        kl_all_restored: With every unit restored; what embedding, head and rounding leave.
        culprits: Worst first.
        ignore: Patterns of linears that keep the culprits in the original's precision.
        recipe: The artifact's recipe with them; None where it has none.
        units: How many units there are.
        measurements: How many KLs the answer took, known ones included.
        text: What was measured on.
        notes: What a user must be told.
        table: Directory of the findings.
        seconds: This run took.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    against: str
    kl: float
    kl_all_restored: float
    culprits: list[Culprit]
    ignore: list[str]
    recipe: Recipe | None
    units: int
    measurements: int
    text: str
    notes: list[str]
    table: str
    seconds: float


class _Measurer:
    """Gives KLs of variants, known or new, and tells how far the search is."""

    def __init__(self, restorer: Restorer, findings: Findings, log: EventLog, total: int) -> None:
        self._restorer, self._findings, self._log = restorer, findings, log
        self._total = total
        self._began, self._fresh = time.monotonic(), 0
        self.done = 0

    def __call__(self, variants: Sequence[Restored]) -> list[float]:
        known: dict[Restored, Any] = {v: self._findings.get(sorted(v)) for v in variants}
        missing = [variant for variant, kl in known.items() if kl is None]
        if missing:
            for variant, kl in zip(missing, self._restorer.measure(missing), strict=True):
                self._findings.keep(sorted(variant), kl)
                known[variant] = kl
            self._fresh += len(missing)
        self.done += len(variants)
        total = max(self._total, self.done)
        elapsed = time.monotonic() - self._began
        self._log.emit(
            "progress", f"{self.done} of about {total} KLs", done=self.done, total=total,
            share=self.done / total, seconds_left=elapsed / max(self._fresh, 1)
            * (total - self.done), data={"stage": "bisect"},
        )  # fmt: skip
        return [known[variant] for variant in variants]


def bisect_source(
    model: str | Path,
    against: str | Path,
    *,
    worst: int,
    text: str | None,
    limit: int,
    seq_len: int,
    target: str,
    device: str,
    trust_remote_code: bool,
    directory: Path | None,
    listener: Listener | None,
) -> BisectResult:
    """Finds the units of an artifact whose compression costs most KL.

    Args:
        model: An artifact with compressed linears.
        against: What it was made from.
        worst: How many units to find.
        text: What `load_text` takes; None: the evaluation half of the builtin text.
        limit: Windows; all of them run as one batch.
        seq_len: Tokens of a window.
        target: Engine that says which linears share one grid.
        device: Where blocks compute, in float32.
        trust_remote_code: Whether code from a checkpoint may run.
        directory: Where findings are kept; None: the user's cache.
        listener: Called with each event.

    Raises:
        ConfigError: If the artifact has no compressed linear, or has not the original's shapes.
        NumericError: If logits are not finite.
    """
    started, log = time.monotonic(), EventLog(None, listener)
    ours, original = (
        open_model(
            source, device=device, compute_dtype=torch.float32,
            trust_remote_code=trust_remote_code, allow_compressed=True,
        )
        for source in (model, against)
    )  # fmt: skip
    _require_alike(ours, original, Path(model))
    stored = {n.removesuffix(".weight"): form.bytes_stored for n, form in ours.forms.items()}
    shapes = original.linear_shapes()
    compressed = [name for name in shapes if name in stored]
    if not compressed:
        raise ConfigError(
            "holds no compressed linear.", where=str(model), remedy="Name a compressed artifact."
        )
    recipe, notes = _recipe(Path(model)), list[str]()
    whole = folded_blocks(ours, original, recipe)
    if whole:
        notes.append(
            f"scales were folded between tensors of {len(whole)} blocks: those are restored whole."
        )
    units = _units(compressed, ours.block_paths, whole, target)
    names, members = list(units), list(units.values())
    windows = _windows(ours, text, limit, seq_len)
    findings = Findings(
        directory or cache_directory("bisect"),
        {
            "pocketlm": __version__,
            "model": content_of(model, ours.source.fingerprint()),
            "against": content_of(against, original.source.fingerprint()),
            "windows": windows.sha256,
            "device": original.device.type,
        },
    )
    count, length = windows.tokens_NT.shape
    log.emit("stage", f"running both models on {count} windows", data={"stage": "bisect"})
    with closing(Restorer(ours, original, windows.tokens_NT, whole)) as restorer:
        total = 2 + forecast(len(units), worst) + min(worst, len(units))
        measure = _Measurer(restorer, findings, log, total)
        kl, kl_all = measure([frozenset(), frozenset(compressed)])

        def gains(ranges: Sequence[Range]) -> list[float]:
            chosen = [frozenset(n for m in members[a:b] for n in m) for a, b in ranges]
            return [kl - left for left in measure(chosen)]

        least = NEGLIGIBLE * (kl - kl_all)
        found = find_worst(len(units), kl - kl_all, worst, gains, least)
        at = [suspect.units[0] for suspect in found]
        ladder = [frozenset(n for i in at[: k + 1] for n in members[i]) for k in range(len(at))]
        left = measure(ladder)
    if len(found) < worst:
        notes.append(f"no further unit takes away {100 * NEGLIGIBLE:g} % of the KL or more.")
    widths = {name: _bytes_each(original, name) for name in compressed}
    culprits = [
        Culprit(
            name=names[i],
            linears=members[i],
            gain=suspect.gain,
            kl_left=kl_left,
            bytes_now=sum(stored[n] for n in members[i]),
            bytes_kept=sum(shapes[n][0] * shapes[n][1] * widths[n] for n in members[i]),
        )
        for i, suspect, kl_left in zip(at, found, left, strict=True)
    ]
    ignore = patterns([n for c in culprits for n in c.linears], ours.block_paths)
    return BisectResult(
        model=str(model),
        against=str(against),
        kl=kl,
        kl_all_restored=kl_all,
        culprits=culprits,
        ignore=ignore,
        recipe=None if recipe is None else _keeping(recipe, ignore),
        units=len(units),
        measurements=measure.done,
        text=f"{count} windows of {length} tokens of {windows.text_name}",
        notes=[*windows.notes, *notes],
        table=str(findings.directory),
        seconds=time.monotonic() - started,
    )


def _require_alike(ours: Model, original: Model, artifact: Path) -> None:
    require_same_vocabulary(ours, original)
    same = ours.block_paths == original.block_paths
    if not same or ours.linear_shapes() != original.linear_shapes():
        raise ConfigError(
            "its blocks or linears are not those of the original: it was pruned or rotated.",
            where=str(artifact),
            remedy="Linears of the original do not fit in; compare with the model they came from.",
        )
    if (artifact / LEDGER).is_file():
        ledger = Ledger.model_validate_json((artifact / LEDGER).read_text("utf-8"))
        if ledger.stages:
            raise ConfigError(
                "it was made smaller or rotated in stages before its linears were compressed.",
                where=str(artifact),
                remedy="Linears of the original do not fit in; use `pocketlm report` for stages.",
            )


def _recipe(artifact: Path) -> Recipe | None:
    """The recipe that an artifact was made by; None where it keeps none."""
    path = artifact / RECIPE
    if not path.is_file():
        return None
    return Recipe.parse(yaml.safe_load(path.read_text("utf-8")), where=str(path))


def _keeping(recipe: Recipe, ignore: Sequence[str]) -> Recipe:
    return recipe.model_copy(update={"ignore": tuple(dict.fromkeys((*recipe.ignore, *ignore)))})


def folded_blocks(ours: Model, original: Model, recipe: Recipe | None) -> frozenset[int]:
    """Indices of blocks in which a linear of the original does not fit in alone.

    Args:
        ours: The compressed model, decoded.
        original: What it was made from.
        recipe: Of the compression; all blocks where it folds scales into linears.

    Returns:
        Without a recipe that folds, the blocks with a norm or bias that was changed.
    """
    steps = () if recipe is None else recipe.steps
    if any(catalog.build_step(s.method, s.options).kind == "fold" for s in steps):
        return frozenset(range(len(ours.block_paths)))
    infos, theirs = ours.source.infos(), original.source.infos()
    changed: set[int] = set()
    for index, path in enumerate(ours.block_paths):
        for name, info in infos.items():
            if not name.startswith(f"{path}.") or len(info.shape) != 1 or name not in theirs:
                continue
            if not torch.equal(original.source.read(name).to(info.dtype), ours.source.read(name)):
                changed.add(index)
                break
    return frozenset(changed)


def _units(
    compressed: Sequence[str], paths: Sequence[str], whole: frozenset[int], target: str
) -> dict[str, tuple[str, ...]]:
    """Unit → its linears, in the order of the model."""
    found: dict[str, list[str]] = {}
    for index, path in enumerate(paths):
        for name in compressed:
            if name.startswith(f"{path}."):
                unit = path if index in whole else unit_of(name, target)
                found.setdefault(unit, []).append(name)
    return {unit: tuple(names) for unit, names in found.items()}


def _bytes_each(original: Model, name: str) -> int:
    """Bytes of a weight that is kept as it is."""
    info = original.source.infos().get(f"{name}.weight")
    return (original.dtype if info is None else info.dtype).itemsize


def _windows(model: Model, text: str | None, limit: int, seq_len: int) -> Windows:
    loaded = load_text(text or "builtin", "evaluation", model.tokenizer())
    return eval_windows(model.tokenizer(), loaded, seq_len, limit, model.context)
