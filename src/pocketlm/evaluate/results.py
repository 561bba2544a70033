"""What an evaluation says: typed, JSON round trip, each figure beside its protocol."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pocketlm.evaluate.bootstrap import Interval


class Result(BaseModel):
    """A frozen result; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class QualityProtocol(Result):
    """How the figures were made; two reports compare only where this is equal.

    Attributes:
        windows: How many.
        seq_len: Tokens of a window, a BOS included.
        stride: Tokens from one window's start to the next; `seq_len`, they do not overlap.
        tokens_scored: Of all windows; the first token of a window is not predicted.
        bos: Whether each window starts with the tokenizer's BOS.
        compute_dtype: Of the blocks; log-softmax is float32.
        device: Where it ran.
        text_name: As the user named it.
        text_sha256: Of the whole text.
        windows_sha256: Of the token ids.
        interval: How the intervals were made.
        versions: Of what computed.
    """

    windows: int
    seq_len: int
    stride: int
    tokens_scored: int
    bos: bool
    compute_dtype: str
    device: str
    text_name: str
    text_sha256: str
    windows_sha256: str
    interval: str
    versions: dict[str, str]

    def sentence(self) -> str:
        """The protocol in words, for tables and model cards."""
        bos = "a BOS before each" if self.bos else "no BOS"
        return (
            f"{self.windows} non-overlapping windows of {self.seq_len} tokens of {self.text_name} "
            f"(sha256 {self.text_sha256[:12]}), {bos}, blocks in {self.compute_dtype} on "
            f"{self.device}, float32 log-softmax; {self.interval}."
        )


class WorstToken(Result):
    """A position where the model differs most from the original.

    Attributes:
        window: Index of the window.
        position: Of the predicted token within it.
        kl: Nats.
        nll: The model's nats for the token that followed.
        original_nll: The original's.
        context: The text before; None without a tokenizer, as the next three.
        token: What followed.
        original_choice: The original's likeliest token.
        model_choice: The model's.
    """

    window: int
    position: int
    kl: float
    nll: float
    original_nll: float
    context: str | None = None
    token: str | None = None
    original_choice: str | None = None
    model_choice: str | None = None


class Divergence(Result):
    """A model beside its original on the same windows; losses and KL in nats a token.

    Attributes:
        original_log_perplexity: The original's own, with its interval.
        original_perplexity: Its exponential.
        loss_over_original: Mean of paired per-window differences of log-perplexity.
        kl_mean: KL(original ‖ model).
        kl_median: Half of the tokens have less.
        kl_p90: 90 % have less.
        kl_p99: 99 % have less.
        kl_p99_9: 99.9 % have less.
        top1_agreement: Share of positions with the same likeliest token.
        original_window_losses: The original's log-perplexity of each window.
        worst_tokens: Ten of them at most, worst first.
    """

    original_log_perplexity: Interval
    original_perplexity: float
    loss_over_original: Interval
    kl_mean: Interval
    kl_median: Interval
    kl_p90: Interval
    kl_p99: Interval
    kl_p99_9: Interval
    top1_agreement: Interval
    original_window_losses: tuple[float, ...]
    worst_tokens: tuple[WorstToken, ...]


class QualityReport(Result):
    """The quality of one model.

    Attributes:
        log_perplexity: Mean nats a token, with its interval over windows.
        perplexity: Its exponential.
        window_losses: Log-perplexity of each window.
        divergence: From the original; None where none was given.
        protocol: How it was measured.
        notes: What a user must be told.
        seconds: Wall time.
    """

    log_perplexity: Interval
    perplexity: float
    window_losses: tuple[float, ...]
    divergence: Divergence | None
    protocol: QualityProtocol
    notes: tuple[str, ...]
    seconds: float


class SpeedReport(Result):
    """How fast one model runs, and in how much memory.

    Attributes:
        prompt_tokens: Of the prompt, real text.
        new_tokens: Generated in each run.
        runs: After a warm-up; the figures are their medians.
        prefill_tokens_per_second: Prompt tokens over the time to the first new token.
        decode_tokens_per_second: Of the tokens after the first.
        decode_runs: Of each run, for the spread.
        weight_bytes_per_token: Weights read by one step of decoding.
        achieved_bytes_per_second: These and the cache's, times the steps a second.
        bandwidth_bytes_per_second: Measured on this machine by copying.
        bound_tokens_per_second: What the bandwidth allows.
        peak_memory_bytes: Of the process, loading and imports included; None where unknown.
        memory_before_load_bytes: The same just before the model was loaded.
        peak_device_memory_bytes: Of the accelerator; None on a CPU.
        load_seconds: Of loading.
        device: Where it ran.
        hardware: The device's name and its threads.
        dtype: Of the activations.
        kernels: What multiplies packed linears, and how many of them; empty without packed ones.
        versions: Of what computed.
        notes: What a user must be told.
        batch: Rows decoded at once; tokens per second are those of all rows.
        context: Positions held when decoding began; None in reports of older versions, as all
            that follows.
        first_token_seconds: From the prompt to its first new token.
        token_seconds_p50: Between two tokens of a row: half of the steps took less.
        token_seconds_p99: 99 % took less.
        cache_bytes_per_step: Keys and values that a step reads, all rows, at its mean length.
        prefill_operations_per_second: Multiplications and additions.
        decode_operations_per_second: The same of decoding.
        rate_operations_per_second: Measured on this machine by a large product.
        loop: How steps run: through which forward, in a graph or not.
    """

    prompt_tokens: int
    new_tokens: int
    runs: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_runs: tuple[float, ...]
    weight_bytes_per_token: int
    achieved_bytes_per_second: float
    bandwidth_bytes_per_second: float
    bound_tokens_per_second: float
    peak_memory_bytes: int | None
    memory_before_load_bytes: int | None
    peak_device_memory_bytes: int | None
    load_seconds: float
    device: str
    hardware: str
    dtype: str
    kernels: dict[str, int]
    versions: dict[str, str]
    notes: tuple[str, ...]
    batch: int = 1
    context: int | None = None
    first_token_seconds: float | None = None
    token_seconds_p50: float | None = None
    token_seconds_p99: float | None = None
    cache_bytes_per_step: float = 0.0
    prefill_operations_per_second: float | None = None
    decode_operations_per_second: float | None = None
    rate_operations_per_second: float | None = None
    loop: str | None = None

    def sentence(self) -> str:
        """The protocol in words."""
        return (
            f"Prompt of {self.prompt_tokens} tokens, {self.new_tokens} new ones, batch "
            f"{self.batch}, greedy, "
            f"{self.dtype} activations on {self.hardware}; median of {self.runs} runs. Decoding "
            f"reads {self.achieved_bytes_per_second / 1e9:.1f} GB/s; copying reaches "
            f"{self.bandwidth_bytes_per_second / 1e9:.1f} GB/s. Peak memory is that of a process "
            "that loads the model and answers."
        )


class Comparison(Result):
    """A model beside its original on the items of one task.

    Attributes:
        original: The original's score, with its interval.
        change: The model's score minus the original's, with the interval of paired differences.
        p_value: Of McNemar's exact test; None where scores are not right or wrong.
        flips: Items that got another answer, right or wrong.
        gained: Items with a better score than the original's.
        lost: Items with a worse one.
        verdict: With `margin`: see `paired.judge`.
        margin: The loss that is tolerated.
        more_items: About how many further items would decide an inconclusive verdict; None where
            none would, or where it is decided.
    """

    original: Interval
    change: Interval
    p_value: float | None
    flips: int
    gained: int
    lost: int
    verdict: Literal["pass", "regression", "inconclusive"]
    margin: float
    more_items: int | None


class TaskResult(Result):
    """What a task says of a model.

    Attributes:
        task: Its name.
        metric: Which of its scores; the mean is a share where answers are right or wrong.
        items: How many were asked.
        fewshot: Examples before each.
        items_sha256: Of all questions and answers, in order.
        score: The mean, with its 95 % interval.
        comparison: With the original; None without one.
        versions: Of the task's definition and of lm-eval.
        compute_dtype: Of the model.
    """

    task: str
    metric: str
    items: int
    fewshot: int
    items_sha256: str
    score: Interval
    comparison: Comparison | None
    versions: dict[str, str]
    compute_dtype: str

    def sentence(self) -> str:
        """The protocol and, where there is an original, the verdict in words."""
        said = f"{self.task}: {self.metric} of {self.items} items, {self.fewshot} examples before "
        said += f"each (sha256 {self.items_sha256[:12]})"
        found = self.comparison
        if found is None:
            return f"{said}."
        p_value = "" if found.p_value is None else f", McNemar's exact p {found.p_value:.2g}"
        said += f"; flipped answers: {found.flips}, for the better: {found.gained}, for the "
        said += f"worse: {found.lost}{p_value}. {found.verdict.capitalize()} at a margin of "
        said += f"{100 * found.margin:g} point{'' if found.margin == 0.01 else 's'}"
        if found.verdict != "inconclusive":
            return f"{said}."
        more = "no number of" if found.more_items is None else f"about {found.more_items}"
        return f"{said}: {more} more items would decide."


def versions() -> dict[str, str]:
    """Versions of what computes, and of this package."""
    found = {"python": platform.python_version()}
    for package in ("pocketlm", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
