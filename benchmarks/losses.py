"""What scripts that measure losses share: options, one measurement, points kept on disk, ratios.

A point is what one recipe, or one artifact of another tool, loses over the original, by pocketlm's
own evaluation on the same windows of the same text. It takes minutes: each is kept in a file, and
read from there while what was asked stays the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import SCRATCH
from inputs import SAMPLES, SEED, SEQ_LEN, Inputs

ASKED = (
    "original", "calibration", "test", "samples", "seq_len", "windows", "window", "device",
    "threads", "scratch", "target", "dtype",
)  # fmt: skip
"""Arguments of `measure`; what else a script takes does not change a point."""
RESAMPLES = 10_000


def loss_parser(doc: str | None, scratch: str) -> argparse.ArgumentParser:
    """A command line with what every such script takes: `ASKED`, `--only` and `--record`.

    Args:
        doc: The script's docstring; its first paragraph is shown.
        scratch: Folder of its points, in the scratch directory.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="*", help="names to run; default: all")
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--calibration", type=Path, default=Inputs.calibration)
    parser.add_argument("--test", type=Path, default=Inputs.test)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="of calibration")
    parser.add_argument("--windows", type=int, default=60, help="of the test text")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a test window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="transformers", help="engine that must load the result")
    parser.add_argument("--dtype", help="of values that stay floats; default: the original's")
    parser.add_argument("--scratch", type=Path, default=SCRATCH / scratch)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser


def asked_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The `ASKED` of a command line, as plain JSON."""
    values = {key: getattr(arguments, key) for key in ASKED}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def chosen_recipes(recipes: Mapping[str, Any], only: Sequence[str] | None) -> dict[str, Any]:
    """The recipes with these names, or all; ends the script where one is unknown."""
    unknown = sorted(set(only or ()) - set(recipes))
    if unknown:
        raise SystemExit(f"no recipe named {', '.join(unknown)}; there are {', '.join(recipes)}")
    return {name: recipes[name] for name in (only or recipes)}


@dataclass(frozen=True)
class Kept:
    """Points on disk.

    Attributes:
        folder: One file a point.
        options: Of `asked_options`; a point that was asked with others is measured again.
    """

    folder: Path
    options: Mapping[str, Any]

    def find(self, name: str, recipe: Any) -> dict[str, Any] | None:
        """The point as it was measured; None where it was not, or something else was asked."""
        file = self._file(name)
        if not file.exists():
            return None
        kept = json.loads(file.read_text(encoding="utf-8"))
        return kept["found"] if kept["asked"] == [recipe, dict(self.options)] else None

    def keep(self, name: str, recipe: Any, found: dict[str, Any]) -> None:
        """Writes a point."""
        record = {"asked": [recipe, dict(self.options)], "found": found}
        self._file(name).write_text(json.dumps(record), encoding="utf-8")

    def point(self, name: str, recipe: Any, artifact: Path | None = None) -> dict[str, Any]:
        """One recipe, or one artifact: from its file, else measured here and kept."""
        found = self.find(name, recipe)
        if found is None:
            found = measure(name, recipe, artifact, self.options)
            self.keep(name, recipe, found)
        return found

    def _file(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.json"


def score(original: Path | str, test: Path | str, window: int, windows: int, device: str) -> Any:
    """The original on a test text: its scores, which models are compared with, and `windows`.

    Args:
        original: The model.
        test: The text.
        window: Tokens of a window.
        windows: How many.
        device: Where it runs, in float32.
    """
    import torch

    from pocketlm.calibration.texts import load_text
    from pocketlm.calibration.windows import eval_windows
    from pocketlm.evaluate.quality import score_original
    from pocketlm.models import open_model

    model = open_model(original, device=device, compute_dtype=torch.float32)
    text = load_text(test, part="evaluation")
    return score_original(
        model, eval_windows(model.tokenizer(), text, window, windows, model.context)
    )


_bases: dict[str, Any] = {}  # test text → the original on it


def measure(
    name: str, recipe: Any, artifact: Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """One recipe, or one artifact, compressed and measured; may run in a process of its own.

    Args:
        name: Its name in tables.
        recipe: As `pocketlm.compress` takes it; not used with an artifact.
        artifact: What is made already; it stays. None: compressed here and deleted after.
        options: Of `asked_options`; one process scores the original once for each test text.

    Returns:
        Losses with their 95 % intervals, of all windows and of each, and how they were measured.
    """
    import torch

    from pocketlm import api
    from pocketlm.evaluate.quality import evaluate_model
    from pocketlm.models import open_model

    torch.set_num_threads(options["threads"])
    seconds, output = None, artifact
    bits = size = None
    if output is None:
        output = Path(options["scratch"]) / name
        started = time.monotonic()
        made = api.compress(
            options["original"], recipe=recipe, output=output, samples=options["samples"],
            seq_len=options["seq_len"], calibration=options["calibration"], seed=SEED,
            device=options["device"], threads=options["threads"], resume=False,
            target=options["target"], dtype=options["dtype"],
        )  # fmt: skip
        seconds, bits = time.monotonic() - started, made.bits_per_weight
        size = made.output_bytes
    like = {"device": options["device"], "compute_dtype": torch.float32}
    if options["test"] not in _bases:
        asked = (options[key] for key in ("original", "test", "window", "windows", "device"))
        _bases[options["test"]] = score(*asked)
    base = _bases[options["test"]]
    started = time.monotonic()
    report = evaluate_model(open_model(output, allow_compressed=True, **like), base.windows, base)
    if artifact is None:
        shutil.rmtree(output)
    divergence = report.divergence
    assert divergence is not None
    loss, kl = divergence.loss_over_original, divergence.kl_mean
    return {
        "name": name, "bits": bits, "bytes": size, "seconds": seconds,
        "evaluation_seconds": time.monotonic() - started,
        "loss": [loss.value, loss.low, loss.high], "kl": [kl.value, kl.low, kl.high],
        "top1": divergence.top1_agreement.value, "perplexity": report.perplexity,
        "original_perplexity": divergence.original_perplexity,
        "window_losses": list(report.window_losses),
        "original_window_losses": list(divergence.original_window_losses),
        "protocol": report.protocol.sentence(),
    }  # fmt: skip


def lost(found: Mapping[str, Any]) -> list[float]:
    """Loss over the original of each window, of a point."""
    pairs = zip(found["window_losses"], found["original_window_losses"], strict=True)
    return [model - original for model, original in pairs]


def ratio_interval(one_N: list[float], other_N: list[float]) -> tuple[float, float, float]:
    """Ratio of the means, and its 95 % paired bootstrap interval over windows."""
    import numpy

    one, other = numpy.array(one_N), numpy.array(other_N)
    picks = numpy.random.default_rng(0).integers(0, len(one), (RESAMPLES, len(one)))
    ratios = one[picks].mean(1) / other[picks].mean(1)
    low, high = numpy.quantile(ratios, (0.025, 0.975))
    return float(one.mean() / other.mean()), float(low), float(high)


def interval_text(interval: Sequence[float], digits: int = 4) -> str:
    """A value and its interval: `0.0990 (0.0950-0.1030)`."""
    value, low, high = (f"{part:.{digits}f}" for part in interval)
    return f"{value} ({low}-{high})"


def seconds_text(found: Mapping[str, Any]) -> str:
    """How long a point's compression took; an artifact that was given has no time."""
    return "–" if found["seconds"] is None else f"{found['seconds']:.0f}"
