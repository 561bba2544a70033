"""Stacks of experts: complete, in order, of the sizes that a file states."""

from __future__ import annotations

import pytest
from transformers import MixtralConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from pocketlm.core.errors import ArtifactError
from pocketlm.models.gguf_experts import experts_metadata, stacks, why_not

UP = "blk.0.ffn_up_exps.weight"


def test_experts_in_their_order() -> None:
    names = {f"layers.0.experts.{i}.w3.weight": UP for i in (10, 2, 0, 1, *range(3, 10))}
    found = stacks({**names, "norm": "output_norm.weight"}, 11)
    assert found[UP] == tuple(f"layers.0.experts.{i}.w3.weight" for i in range(11))
    assert found["output_norm.weight"] == ("norm",)
    with pytest.raises(ArtifactError, match="0 to 11"):
        stacks(names, 12)
    with pytest.raises(ArtifactError, match="another tensor"):
        stacks({**names, "layers.0.mlp.experts.3.up_proj.weight": UP}, 11)


def test_keys() -> None:
    shared = Qwen2MoeConfig(
        num_experts=8, moe_intermediate_size=24, shared_expert_intermediate_size=40
    )
    assert {key: value.value for key, value in experts_metadata(shared).items()} == {
        "expert_count": 8,
        "expert_used_count": 4,
        "expert_feed_forward_length": 24,
        "expert_shared_feed_forward_length": 40,
    }
    assert experts_metadata(PretrainedConfig()) == {}


@pytest.mark.parametrize(
    ("config", "arch", "reason"),
    [
        (MixtralConfig(num_local_experts=4), "llama", None),
        (MixtralConfig(num_local_experts=1), "llama", "uses 2 of 1"),
        (Qwen3MoeConfig(norm_topk_prob=True), "qwen3moe", None),
        (Qwen3MoeConfig(), "qwen3moe", "norm_topk_prob is False"),
        (Qwen2MoeConfig(norm_topk_prob=True), "qwen2moe", "norm_topk_prob is True"),
        (Qwen3MoeConfig(norm_topk_prob=True, mlp_only_layers=[1]), "qwen3moe", "block 1"),
        (Qwen2MoeConfig(decoder_sparse_step=2), "qwen2moe", "block 0"),
        (Qwen3MoeConfig(norm_topk_prob=True, attention_bias=True), "qwen3moe", "biases"),
        (Qwen2MoeConfig(tie_word_embeddings=True), "qwen2moe", "tied"),
        (Qwen2MoeConfig(**{"head_dim": 8}), "qwen2moe", "wider"),
    ],
)
def test_what_llama_cpp_computes_otherwise(
    config: PretrainedConfig, arch: str, reason: str | None
) -> None:
    found = why_not(config, arch)
    assert found is None if reason is None else reason in (found or "")
