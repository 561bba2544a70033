"""Perplexity of a model and its divergence from the original, on the same windows.

Hidden states stream block by block (`hidden`), then logits are made for a few hundred positions at
a time, scored and dropped. Every token of a window but the first is predicted from those before it.
Loss over the original: mean over windows of (model's log-perplexity - original's), paired.

Legend: N windows, T tokens of a window, P positions of a chunk, V vocabulary, D hidden width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pocketlm.calibration.windows import Windows
from pocketlm.core.errors import CalibrationError, ConfigError, NumericError
from pocketlm.core.views import ModelView
from pocketlm.evaluate import hidden
from pocketlm.evaluate.bootstrap import (
    RESAMPLES_MEAN,
    RESAMPLES_QUANTILE,
    mean_interval,
    quantile_intervals,
)
from pocketlm.evaluate.divergence import TokenScores, score_tokens
from pocketlm.evaluate.results import (
    Divergence,
    QualityProtocol,
    QualityReport,
    WorstToken,
    versions,
)

LOGIT_BYTES = 512 << 20  # for all logits of one chunk of positions, both models
LOGIT_COPIES = 6  # [P, V] float32 tensors alive at once
WORST = 10
CONTEXT_TOKENS = 24  # shown before a worst token

OnProgress = Callable[[int, int], None]


class Decoder(Protocol):
    """The part of a tokenizer that shows tokens."""

    def decode(self, token_ids: Any) -> Any:
        """The text of some ids."""
        ...


@dataclass
class BaseScores:
    """An original on its way through several comparisons: its finished activations.

    Attributes:
        model: The original; its head makes the logits again, chunk by chunk.
        windows: Which it has read.
        states: What its head reads, [N, T, D].
    """

    model: ModelView
    windows: Windows
    states: hidden.HiddenStates

    def close(self) -> None:
        """Frees the activations."""
        self.states.close()


def score_original(
    model: ModelView, windows: Windows, on_progress: OnProgress | None = None
) -> BaseScores:
    """Runs an original once, to compare several models with it.

    Args:
        model: The original.
        windows: What it reads.
        on_progress: Called with steps done and steps in all.

    Returns:
        To be handed to `evaluate_model` as `against`, and closed after the last.

    Raises:
        CalibrationError: If a token id is outside the model's vocabulary.
    """
    _check_ids(model, windows)
    count = _Counter(on_progress, hidden.steps(model, *windows.tokens_NT.shape))
    return BaseScores(model, windows, hidden.stream(model, windows.tokens_NT, count.step))


def require_same_vocabulary(model: ModelView, original: ModelView) -> None:
    """Refuses to compare distributions over different tokens.

    Raises:
        ConfigError: If the two have different vocabularies.
    """
    if original.vocabulary != model.vocabulary:
        raise ConfigError(
            f"the model has {model.vocabulary} tokens, the original {original.vocabulary}.",
            where="--against",
            remedy="Compare a model with the one it was made from.",
        )


def evaluate_model(
    model: ModelView,
    windows: Windows,
    against: ModelView | BaseScores | None = None,
    *,
    tokenizer: Decoder | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> QualityReport:
    """Measures a model, and how far it is from the original.

    Args:
        model: What is measured.
        windows: What it reads, from `eval_windows`.
        against: The original, or what `score_original` gave for it.
        tokenizer: To show the worst tokens as text.
        seed: Of the bootstrap.
        on_progress: Called with steps done and steps in all.

    Returns:
        Losses and KL in nats a token.

    Raises:
        CalibrationError: If a token id is outside the model's vocabulary.
        ConfigError: If the original has another vocabulary or read other windows.
        NumericError: If a logit is not finite.
    """
    started = time.perf_counter()
    tokens_NT = windows.tokens_NT
    _check_ids(model, windows)
    original = against.model if isinstance(against, BaseScores) else against
    if original is not None:
        require_same_vocabulary(model, original)
    if isinstance(against, BaseScores) and against.windows.sha256 != windows.sha256:
        raise ConfigError(
            "the original was scored on other windows.", remedy="Score it on these first."
        )
    streams = 1 if original is None or isinstance(against, BaseScores) else 2
    total = streams * hidden.steps(model, *tokens_NT.shape) + tokens_NT.shape[0]
    count = _Counter(on_progress, total)
    base, own_base = None, False
    if isinstance(against, BaseScores):
        base = against
    elif original is not None:
        base = BaseScores(original, windows, hidden.stream(original, tokens_NT, count.step))
        own_base = True
    try:
        with closing(hidden.stream(model, tokens_NT, count.step)) as states:
            scores = _score(model, states, base, tokens_NT, count.step)
    finally:
        if base is not None and own_base:
            base.close()
    window_losses_N = scores.nll.mean(1).numpy()
    _check_finite(window_losses_N, "the model")
    log_perplexity = mean_interval(window_losses_N, seed)
    return QualityReport(
        log_perplexity=log_perplexity,
        perplexity=math.exp(log_perplexity.value),
        window_losses=tuple(window_losses_N.tolist()),
        divergence=None if base is None else _divergence(scores, windows, tokenizer, seed),
        protocol=_protocol(model, windows, seed),
        notes=windows.notes,
        seconds=time.perf_counter() - started,
    )


class _Counter:
    """Counts steps and tells whoever listens."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def step(self) -> None:
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(min(self._done, self._total), self._total)


@torch.no_grad()
def _score(
    model: ModelView,
    states: hidden.HiddenStates,
    base: BaseScores | None,
    tokens_NT: Tensor,
    on_window: Callable[[], None],
) -> TokenScores:
    """Every predicted token's figures, [N, T-1] each."""
    chunk = max(1, LOGIT_BYTES // (4 * LOGIT_COPIES * model.vocabulary))
    found: list[TokenScores] = []
    for window in range(tokens_NT.shape[0]):
        hidden_TD = states.read(window, window + 1)[0, :-1]
        base_TD = None if base is None else base.states.read(window, window + 1)[0, :-1]
        next_T = tokens_NT[window, 1:]
        for start in range(0, len(next_T), chunk):
            part = slice(start, start + chunk)
            base_logits_PV = None
            if base is not None and base_TD is not None:
                base_logits_PV = base.model.logits(base_TD[part].to(base.model.device))
                base_logits_PV = base_logits_PV.to(model.device)
            logits_PV = model.logits(hidden_TD[part].to(model.device))
            found.append(score_tokens(logits_PV, next_T[part].to(model.device), base_logits_PV))
        on_window()

    def gather(pick: Callable[[TokenScores], Tensor | None]) -> Tensor:
        parts = [part for part in map(pick, found) if part is not None]
        return torch.cat(parts).view(tokens_NT.shape[0], -1)

    nll, top = gather(lambda s: s.nll), gather(lambda s: s.top)
    if base is None:
        return TokenScores(nll, top)
    return TokenScores(
        nll,
        top,
        gather(lambda s: s.base_nll),
        gather(lambda s: s.base_top),
        gather(lambda s: s.kl),
    )


def _divergence(
    scores: TokenScores, windows: Windows, tokenizer: Decoder | None, seed: int
) -> Divergence:
    assert scores.base_nll is not None
    assert scores.base_top is not None
    assert scores.kl is not None
    base_losses_N = scores.base_nll.mean(1).numpy()
    _check_finite(base_losses_N, "the original")
    kl_NT = scores.kl.numpy()
    original = mean_interval(base_losses_N, seed)
    median, p90, p99, p99_9 = quantile_intervals(kl_NT, [0.5, 0.9, 0.99, 0.999], seed)
    agreement_N = (scores.top == scores.base_top).double().mean(1).numpy()
    return Divergence(
        original_log_perplexity=original,
        original_perplexity=math.exp(original.value),
        loss_over_original=mean_interval(scores.nll.mean(1).numpy() - base_losses_N, seed),
        kl_mean=mean_interval(kl_NT.mean(1), seed),
        kl_median=median,
        kl_p90=p90,
        kl_p99=p99,
        kl_p99_9=p99_9,
        top1_agreement=mean_interval(agreement_N, seed),
        original_window_losses=tuple(base_losses_N.tolist()),
        worst_tokens=_worst(scores, windows, tokenizer),
    )


def _worst(
    scores: TokenScores, windows: Windows, tokenizer: Decoder | None
) -> tuple[WorstToken, ...]:
    """The tokens of largest KL, worst first."""
    assert scores.base_nll is not None
    assert scores.base_top is not None
    assert scores.kl is not None
    length = scores.kl.shape[1]
    rows = []
    for flat in torch.topk(scores.kl.flatten(), min(WORST, scores.kl.numel())).indices.tolist():
        n, t = divmod(flat, length)
        ids = windows.tokens_NT[n]
        texts: dict[str, str] = {}
        if tokenizer is not None:
            context = tokenizer.decode(ids[max(0, t + 1 - CONTEXT_TOKENS) : t + 1].tolist())
            texts = {
                "context": str(context),
                "token": str(tokenizer.decode([int(ids[t + 1])])),
                "original_choice": str(tokenizer.decode([int(scores.base_top[n, t])])),
                "model_choice": str(tokenizer.decode([int(scores.top[n, t])])),
            }
        rows.append(
            WorstToken(
                window=n,
                position=t + 1,
                kl=float(scores.kl[n, t]),
                nll=float(scores.nll[n, t]),
                original_nll=float(scores.base_nll[n, t]),
                **texts,
            )
        )
    return tuple(rows)


def _protocol(model: ModelView, windows: Windows, seed: int) -> QualityProtocol:
    count, seq_len = windows.tokens_NT.shape
    return QualityProtocol(
        windows=count,
        seq_len=seq_len,
        stride=seq_len,
        tokens_scored=count * (seq_len - 1),
        bos=windows.bos,
        compute_dtype=str(model.compute_dtype).removeprefix("torch."),
        device=str(model.device),
        text_name=windows.text_name,
        text_sha256=windows.text_sha256,
        windows_sha256=windows.sha256,
        interval=(
            f"95 % percentile bootstrap over windows, {RESAMPLES_MEAN} resamples "
            f"({RESAMPLES_QUANTILE} for quantiles), seed {seed}"
        ),
        versions=versions(),
    )


def _check_ids(model: ModelView, windows: Windows) -> None:
    largest = int(windows.tokens_NT.max())
    if largest >= model.vocabulary:
        raise CalibrationError(
            f"token {largest} is outside the model's vocabulary of {model.vocabulary}.",
            where=windows.text_name,
            remedy="Use the tokenizer that belongs to the model.",
        )


def _check_finite(losses_N: np.ndarray, who: str) -> None:
    broken = np.flatnonzero(~np.isfinite(losses_N))
    if broken.size:
        raise NumericError(
            f"{who} gave logits that are not finite in {broken.size} of {len(losses_N)} windows.",
            where=f"window {broken[0]}",
            remedy="Evaluate in float32; if it persists, the weights are broken: run verify.",
        )
