"""A report with everything in it, and an empty one."""

from __future__ import annotations

import pytest

from pocketlm.calibration.health import TextHealth
from pocketlm.evaluate.bootstrap import Interval
from pocketlm.evaluate.results import (
    Comparison,
    Divergence,
    QualityProtocol,
    QualityReport,
    SpeedReport,
    TaskResult,
    WorstToken,
)
from pocketlm.report.data import (
    Answer,
    InputRow,
    LedgerRow,
    LinearResult,
    Prediction,
    Remark,
    ReportData,
    SizePart,
    Timing,
)

KINDS = {
    "self_attn.q_proj": 0.004,
    "self_attn.k_proj": 0.003,
    "self_attn.v_proj": 0.009,
    "self_attn.o_proj": 0.012,
    "mlp.gate_proj": 0.007,
    "mlp.up_proj": 0.008,
    "mlp.down_proj": 0.011,
}
BLOCKS = 30


def around(value: float, share: float = 0.1) -> Interval:
    """An interval about a value."""
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def speed(decode: float, peak: int) -> SpeedReport:
    """A speed report with some decode speed and peak."""
    return SpeedReport(
        prompt_tokens=128,
        new_tokens=64,
        runs=3,
        prefill_tokens_per_second=decode * 21,
        decode_tokens_per_second=decode,
        decode_runs=(decode, decode * 0.97, decode * 1.04),
        weight_bytes_per_token=86_000_000,
        achieved_bytes_per_second=86e6 * decode,
        bandwidth_bytes_per_second=21.4e9,
        bound_tokens_per_second=249.0,
        peak_memory_bytes=peak,
        memory_before_load_bytes=300_000_000,
        peak_device_memory_bytes=None,
        load_seconds=1.2,
        device="cpu",
        hardware="Some Processor @ 2.50GHz, 2 threads",
        dtype="float32",
        kernels={"cpu int4": 210},
        versions={"torch": "2.13.0"},
        notes=(),
    )


@pytest.fixture
def quality() -> QualityReport:
    """A quality report against an original."""
    worst = WorstToken(
        window=3,
        position=17,
        kl=4.31,
        nll=7.2,
        original_nll=0.3,
        context=" It was first released in <b>North</b> America on the 6 of",
        token=" June",
        original_choice=" June",
        model_choice=" March",
    )
    return QualityReport(
        log_perplexity=around(2.853, 0.02),
        perplexity=17.34,
        window_losses=(2.8, 2.9),
        divergence=Divergence(
            original_log_perplexity=around(2.807, 0.02),
            original_perplexity=16.56,
            loss_over_original=around(0.0463),
            kl_mean=around(0.0512),
            kl_median=around(0.0231),
            kl_p90=around(0.121),
            kl_p99=around(0.512),
            kl_p99_9=around(1.83),
            top1_agreement=around(0.912, 0.004),
            original_window_losses=(2.8, 2.8),
            worst_tokens=(worst,) * 10,
        ),
        protocol=QualityProtocol(
            windows=60,
            seq_len=2048,
            stride=2048,
            tokens_scored=60 * 2047,
            bos=False,
            compute_dtype="float32",
            device="cpu",
            text_name="wikitext2-test.txt",
            text_sha256="ab" * 32,
            windows_sha256="cd" * 32,
            interval="95 % percentile bootstrap over windows, 10000 resamples, seed 0",
            versions={"python": "3.11.7", "pocketlm": "0.1.0", "torch": "2.13.0"},
        ),
        notes=("evaluation on 60 windows, not 100.",),
        seconds=61.0,
    )


def task() -> TaskResult:
    """A task on which the model lost a little."""
    return TaskResult(
        task="arc_easy",
        metric="acc_norm",
        items=2376,
        fewshot=0,
        items_sha256="cd" * 32,
        score=Interval(value=0.432, low=0.412, high=0.452),
        comparison=Comparison(
            original=Interval(value=0.447, low=0.427, high=0.467),
            change=Interval(value=-0.0152, low=-0.0301, high=-0.0003),
            p_value=0.045,
            flips=311,
            gained=101,
            lost=137,
            verdict="regression",
            margin=0.01,
            more_items=None,
        ),
        versions={"task": "1.0", "lm-eval": "0.4.13"},
        compute_dtype="float32",
    )


@pytest.fixture
def bare() -> ReportData:
    """A run that measured nothing."""
    return ReportData(
        title="SmolLM2-135M-Instruct",
        source="smollm2-135m",
        created="2026-01-02T03:04:05Z",
        version="0.1.0",
        machine="Linux, 2 cores",
        scheme="W4A16 symmetric, group 64",
        methods=("gptq",),
        calibration="wikitext2-train.txt, 64 windows of 1024 tokens, seed 0",
        recipe_yaml="steps:\n- method: gptq\nweights:\n  bits: 4\n  group_size: 64\n",
        parameters=134_515_008,
        original_bytes=269_060_552,
        compressed_bytes=111_000_000,
        original_bits=16.0,
        linear_bits=4.25,
    )


@pytest.fixture
def full(bare: ReportData, quality: QualityReport) -> ReportData:
    """A run that measured everything, of a model with thirty blocks."""
    linears = tuple(
        LinearResult(
            name=f"model.layers.{block}.{kind}",
            bits=4.25,
            error=error * (1 + ((7 * block + 3 * len(kind)) % 11) / 6),
        )
        for block in range(BLOCKS)
        for kind, error in KINDS.items()
    )
    kept = LedgerRow(
        tensor="model.embed_tokens.weight", action="kept", reason="embedding", bits=16.0
    )
    rows = tuple(
        LedgerRow(
            tensor=f"{linear.name}.weight",
            action="quantized",
            reason="recipe",
            bits=4.25,
            outputs=(f"{linear.name}.weight_packed", f"{linear.name}.weight_scale"),
        )
        for linear in linears
    )
    group = "group size 64 instead of 128: 128 does not divide 576 columns."
    return bare.model_copy(
        update={
            "command": "pocketlm compress smollm2-135m -o out --method gptq",
            "quality": quality,
            "original_speed": speed(11.2, 1_300_000_000),
            "speed": speed(27.9, 720_000_000),
            "tasks": (task(),),
            "answers": (
                Answer(
                    prompt="What is the capital of France?",
                    original="The capital of France is Paris.",
                    compressed="The capital of France is Paris, a city on the Seine.",
                ),
            ),
            "sizes": (
                SizePart(
                    name="compressed linears",
                    original_bytes=212_336_640,
                    compressed_bytes=53_084_160,
                ),
                SizePart(name="embedding", original_bytes=56_623_104, compressed_bytes=56_623_104),
                SizePart(name="norms and biases", original_bytes=70_272, compressed_bytes=70_272),
                SizePart(
                    name="scales, zero points and masks",
                    original_bytes=0,
                    compressed_bytes=3_317_760,
                ),
            ),
            "linears": linears,
            "timings": (
                Timing(stage="prepare", seconds=2.3),
                Timing(stage="compress", seconds=83.0),
                Timing(stage="assemble", seconds=0.8),
                Timing(stage="evaluate", seconds=61.0),
            ),
            "predictions": (
                Prediction(name="output", unit="bytes", predicted=113_000_000, actual=111_000_000),
                Prediction(name="peak RAM", unit="bytes", predicted=9e8, actual=8.7e8),
                Prediction(name="time", unit="seconds", predicted=95, actual=86.1),
            ),
            "remarks": (
                Remark(kind="warning", where="", text="calibration on 45 windows, not 64."),
                *(Remark(kind="fallback", where=row.tensor, text=group) for row in rows),
            ),
            "ledger": (kept, *rows),
            "text": TextHealth(
                windows=64,
                tokens=65_536,
                different_tokens=9_545,
                special_tokens=64,
                duplicate_windows=1,
                repeated_share=0.021,
                joined_windows=62,
                paragraphs=4_444,
                duplicate_paragraphs=2,
                documents=1,
            ),
            "inputs": tuple(
                InputRow(
                    kind=kind,
                    linears=BLOCKS,
                    columns=576,
                    tokens_least=65_536,
                    tokens_most=65_536,
                    rank_least=33.0,
                    rank_most=146.3,
                    dead_columns=3,
                    constant_columns=0,
                    few=0,
                    unreached=0,
                )
                for kind in KINDS
            ),
        }
    )
