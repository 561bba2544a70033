"""Calibration text that the model writes itself: no data, and none of another distribution.

Each window is drawn from the model's own distribution, at temperature 1, after its BOS or, where
its tokenizer puts none before a text, after an ordinary token drawn at random (LLM-QAT,
arXiv:2305.17888, section 3.1, and self-calibration, arXiv:2410.17170). A window that ends a text
goes on with the start of another, as packed text does.

Legend: N windows, T tokens of each, B windows at once, V vocabulary, E ends of a text.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pocketlm import __version__
from pocketlm.calibration.health import token_health
from pocketlm.calibration.tokens import prefix_ids
from pocketlm.calibration.windows import Windows, window_length
from pocketlm.core.errors import NumericError, ResourceError
from pocketlm.engine.events import EventLog
from pocketlm.engine.machine import available_ram_bytes, cache_directory, total_vram_bytes
from pocketlm.engine.progress import Progress
from pocketlm.formats.shards import write_file
from pocketlm.runtime.generate import end_tokens
from pocketlm.runtime.load import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pocketlm.models.adapter import Model

BATCH = 32  # windows written at once: a step reads all weights, whatever their number
TOKENS_PER_SECOND = 300.0  # of all windows together; a first guess, for the time left
NAME = "text written by the model itself"
SAID = "the model writes its calibration text"


def own_windows(
    view: Model,
    source: str | Path | PreTrainedModel,
    samples: int,
    seq_len: int,
    seed: int,
    log: EventLog,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Windows:
    """Windows that the model wrote; kept in the user's cache, so that a resumed run has them.

    Args:
        view: The model as it is streamed; its device is where the text is written.
        source: The model itself, or what `load` takes.
        samples: Windows wanted.
        seq_len: Tokens of each.
        seed: Same seed, machine and versions: same windows.
        log: Told how far it has come.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.

    Raises:
        ConfigError: If `samples` or `seq_len` is too small.
        ResourceError: If the model does not fit in memory as a whole, which writing needs.
        NumericError: If its logits are not finite.
    """
    seq_len, notes = window_length(samples, seq_len, view.context)
    tokenizer = view.tokenizer()
    prefix = prefix_ids(tokenizer)
    context = [
        __version__, torch.__version__, view.source.fingerprint(), str(view.device),
        torch.get_num_threads(), samples, seq_len, seed,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(context).encode()).hexdigest()[:16]
    kept = cache_directory("own-text") / f"{digest}.npy"
    tokens_NT = _read(kept, (samples, seq_len))
    if tokens_NT is None:
        if isinstance(source, str | Path):
            _require_room(view)
            model, _ = load(
                source,
                device=view.device,
                trust_remote_code=trust_remote_code,
                revision=revision,
            )
        else:
            model = source
        special = set(tokenizer.all_special_ids)
        ordinary = [i for i in range(len(tokenizer)) if i not in special]
        starts, ends = torch.tensor(prefix[:1] or ordinary), end_tokens(model, tokenizer)
        with _evaluating(model):
            tokens_NT = _written(model, len(tokenizer), starts, ends, samples, seq_len, seed, log)
        _keep(kept, tokens_NT)
    health = token_health(tokens_NT, tokenizer.all_special_ids, bool(prefix))
    text = hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest()
    return Windows(tokens_NT, NAME, text, bool(prefix), seed, (*notes, *health.remarks()), health)


def _require_room(view: Model) -> None:
    """Refuses a model that the device cannot hold whole, with a tenth for caches.

    Raises:
        ResourceError: Saying how large it is.
    """
    needed = 1.1 * sum(info.bytes_stored for info in view.source.infos().values())
    room = total_vram_bytes(view.device) if view.device.type == "cuda" else available_ram_bytes()
    if needed > room:
        raise ResourceError(
            f"writing text needs the whole model in memory, {needed / 1e9:.1f} GB.",
            where="--calibration self",
            remedy="Give a text file, or 'builtin'.",
        )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Generator[None]:
    """Without dropout, which a model that is handed over in training mode has."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _read(kept: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        tokens_NT = torch.from_numpy(np.load(kept, allow_pickle=False))
    except (OSError, ValueError):  # absent, or cut off
        return None
    return tokens_NT if tuple(tokens_NT.shape) == shape else None


def _keep(kept: Path, tokens_NT: Tensor) -> None:
    file = io.BytesIO()
    np.save(file, tokens_NT.numpy(), allow_pickle=False)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, file.getvalue())
    except OSError as error:
        raise ResourceError(
            f"cannot be written ({error.strerror}).",
            where=str(kept),
            remedy="Set XDG_CACHE_HOME to a place that can be.",
        ) from error


def _written(
    model: PreTrainedModel,
    vocabulary: int,
    starts: Tensor,
    ends: frozenset[int],
    samples: int,
    seq_len: int,
    seed: int,
    log: EventLog,
) -> Tensor:
    """Windows [N, T], a batch at a time."""
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(log, {"prepare": samples * seq_len / TOKENS_PER_SECOND})
    progress.stage("prepare", SAID)
    rows: list[Tensor] = []
    for first in range(0, samples, BATCH):
        count = min(BATCH, samples - first)
        columns: list[Tensor] = []
        for token_B in _tokens(model, vocabulary, starts, ends, count, generator):
            columns.append(token_B)
            progress.step((first + count * len(columns) / seq_len) / samples, SAID)
            if len(columns) == seq_len:
                break
        rows.append(torch.stack(columns, 1))
    return torch.cat(rows)


@torch.inference_mode()
def _tokens(
    model: PreTrainedModel,
    vocabulary: int,
    starts: Tensor,
    ends: frozenset[int],
    count: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """The next token of each of `count` windows, without end."""
    token_B, end_E = _drawn(starts, count, generator), torch.tensor(sorted(ends))
    inputs: dict[str, Any] = {}
    while True:
        yield token_B
        out = model(token_B[:, None].to(model.device), use_cache=True, logits_to_keep=1, **inputs)
        inputs = {"past_key_values": out.past_key_values}
        logits_BV = out.logits[:, -1, :vocabulary].float().cpu()  # a head may be padded
        if not torch.isfinite(logits_BV).all():
            raise NumericError("the model's logits are not finite.", where="--calibration self")
        next_B = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
        ended_B = torch.isin(token_B, end_E)
        token_B = torch.where(ended_B, _drawn(starts, count, generator), next_B)


def _drawn(starts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return starts[torch.randint(len(starts), (count,), generator=generator)]
