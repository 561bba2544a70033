"""Types of a mixture: what llama-quantize 2026 chose for SmolLM2-135M, and its rules elsewhere."""

from __future__ import annotations

import pytest

from pocketlm.core.errors import ConfigError
from pocketlm.formats.gguf_mix import Architecture, require_mix, tensor_type

SMALL = Architecture("llama", 30, 3, tied=True)
MEDIUM = Architecture("llama", 32, 4, tied=False)
LARGE = Architecture("llama", 80, 8, tied=False)


def kinds(mix: str, part: str, columns: int, model: Architecture = SMALL) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for block in range(model.blocks):
        kind = tensor_type(mix, f"blk.{block}.{part}.weight", (512, columns), model)
        found.setdefault(kind, []).append(block)
    return found


def test_smollm2() -> None:
    more = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert kinds("Q4_K_M", "ffn_down", 1536)["Q6_K"] == more
    assert kinds("Q4_K_M", "attn_v", 576)["Q8_0"] == more
    assert set(kinds("Q4_K_M", "attn_q", 576)) == {"Q5_0"}
    assert kinds("Q3_K_M", "ffn_down", 1536)["Q5_K"] == [0]
    assert kinds("Q3_K_M", "attn_v", 576)["Q5_1"] == [0, 1]
    assert set(kinds("Q3_K_M", "attn_output", 576)) == {"Q5_0"}
    assert set(kinds("Q3_K_M", "ffn_up", 576)) == {"Q4_0"}
    assert tensor_type("Q3_K_M", "token_embd.weight", (49152, 576), SMALL) == "Q8_0"


def test_wide_models() -> None:
    assert set(kinds("Q3_K_M", "attn_v", 8192, LARGE)) == {"Q5_K"}
    assert tensor_type("Q4_K_M", "output.weight", (32000, 8192), LARGE) == "Q6_K"
    assert tensor_type("Q4_K_M", "token_embd.weight", (32000, 8192), LARGE) == "Q4_K"
    assert tensor_type("Q2_K", "blk.3.attn_v.weight", (1024, 4096), MEDIUM) == "Q4_K"
    assert tensor_type("Q4_K_M", "blk.3.attn_norm.weight", (8192,), LARGE) == "F32"
    assert tensor_type("Q8_0", "output.weight", (32000, 8192), LARGE) == "Q8_0"
    assert tensor_type("F16", "blk.3.attn_q.weight", (8192, 8192), LARGE) == "F16"
    assert tensor_type("Q4_K_M", "blk.3.attn_q.weight", (64, 48), LARGE) == "F16"


def test_eight_experts() -> None:
    """Mixtral 8x7B: values and keys in 8 bits, outputs in 5, stacks as dense linears."""
    eight = Architecture("llama", 32, 4, tied=False, experts=8)
    for part in ("attn_v", "attn_k"):
        assert set(kinds("Q4_K_M", part, 4096, eight)) == {"Q8_0"}
    assert set(kinds("Q4_K_M", "attn_output", 4096, eight)) == {"Q5_K"}
    assert set(kinds("Q5_K_M", "attn_output", 4096, eight)) == {"Q5_K"}
    assert set(kinds("Q3_K_L", "attn_output", 4096, eight)) == {"Q3_K"}
    down = kinds("Q4_K_M", "ffn_down_exps", 14336, eight)
    assert down == kinds("Q4_K_M", "ffn_down", 14336, MEDIUM)
    assert set(down) == {"Q4_K", "Q6_K"}
    assert set(kinds("Q4_K_M", "ffn_gate_exps", 4096, eight)) == {"Q4_K"}
    for mix in ("F16", "Q4_K_M"):
        assert set(kinds(mix, "ffn_gate_inp", 4096, eight)) == {"F32"}


def test_many_experts() -> None:
    many = Architecture("qwen3moe", 48, 8, tied=False, experts=128)
    assert set(kinds("Q4_K_M", "attn_k", 2048, many)) == {"Q4_K"}
    assert set(kinds("Q4_K_M", "attn_v", 2048, many)) == {"Q4_K", "Q6_K"}
    assert set(kinds("Q3_K_M", "attn_output", 4096, many)) == {"Q4_K"}
    assert set(kinds("Q2_K", "ffn_down_exps", 768, many)) == {"Q3_K"}
    assert set(kinds("Q4_K_M", "ffn_gate_inp_shexp", 2048, many)) == {"F32"}


def test_names() -> None:
    assert require_mix("q4_k_m") == "Q4_K_M"
    with pytest.raises(ConfigError, match="Q4_K_M"):
        require_mix("Q4_KM")
