"""Decoding on CUDA: graphs and kernels of a step against the model's own forward."""

import pytest
import torch
from tests.unit.models.families import build

from pocketlm.runtime.decode import Decoder
from pocketlm.runtime.sampling import Sampling

pytestmark = pytest.mark.gpu
PROMPT = [5, 9, 31, 7, 62, 11]
NEW = 12


def tokens(decoder, rows):
    found = [decoder.prefill(rows, room=NEW).read()]
    found += [decoder.step().read() for _ in range(NEW - 1)]
    return [list(row) for row in zip(*found, strict=True)]


def on_gpu(family, **sizes):
    return build(family, **sizes).to("cuda")


@pytest.mark.parametrize("rows", [[PROMPT], [PROMPT, PROMPT[2:], PROMPT[1:4] * 3]])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-window", "gemma3", "olmo2"])
def test_replayed_steps_give_the_tokens_of_plain_ones(family, rows):
    model = on_gpu(family, head_dim=16)
    graph = Decoder(model, len(rows))
    plain = Decoder(model, len(rows), lean=False, graphs=False)
    assert tokens(graph, rows) == tokens(plain, rows)
    assert "CUDA graph" in graph.loop
    assert ("lean" in graph.loop) == (family not in ("gemma3", "olmo2"))
    assert not [note for note in graph.notes if "fails" in note or "logits are off" in note]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window"])
def test_replayed_prompts_give_the_tokens_of_plain_ones(family, rows):
    """A graph from the second prompt of a size on, for longer and shorter ones; steps between."""
    model = on_gpu(family, head_dim=16, max_position_embeddings=512)
    graph = Decoder(model, rows)
    plain = Decoder(model, rows, lean=False, graphs=False)
    graph.reserve(200)
    for length in (100, 70, 128, 65, 100, 1, 2, 1, 130):
        ids = [[3 + (i * i + row) % 90 for i in range(length)] for row in range(rows)]
        graph.cut(0)
        plain.cut(0)
        assert tokens(graph, ids) == tokens(plain, ids)
    assert set(graph._prompt_graphs._graphs) == {(rows, 128), (rows, 64)}
    assert not [note for note in graph.notes if "prompts" in note or "no CUDA graph" in note]


def test_past_the_first_graph():
    model = on_gpu("llama", head_dim=16, max_position_embeddings=1024)
    long = [[3 + i % 90 for i in range(250)]]
    assert tokens(Decoder(model), long) == tokens(Decoder(model, lean=False, graphs=False), long)


def test_a_graph_draws_anew_each_time_and_alike_for_a_seed():
    model = on_gpu("llama", head_dim=16)

    def drawn(seed):
        return tokens(Decoder(model, sampling=Sampling(1.5), seed=seed), [PROMPT])

    assert drawn(1) == drawn(1) != drawn(2)
    decoder = Decoder(model, sampling=Sampling(5.0))
    assert len(set(tokens(decoder, [PROMPT])[0])) > 3


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("shape", [(1, 32, 8, 128, 128), (3, 4, 4, 64, 32), (16, 16, 2, 64, 64)])
def test_kernels_of_a_step_equal_definition(shape, window):
    from pocketlm.runtime.decode_kernels import attend, rotate_and_store
    from pocketlm.runtime.lean import split_heads

    B, H, K, D, R = shape
    N, place = 512, 301
    like = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(0)
    qkv, angles = torch.randn(B, (H + 2 * K) * D, **like), torch.randn(2, N, R, **like)
    keys, values = torch.randn(2, B, K, N, D, **like)
    expected_k, expected_v = keys.clone(), values.clone()
    slot, pad = torch.tensor([place], device="cuda"), torch.arange(B, device="cuda")
    norms = (torch.randn(D, **like), torch.randn(D, **like))
    heads = (H, K, D)
    q = rotate_and_store(qkv, (angles[0], angles[1]), norms, 1e-6, heads, keys, values, slot, pad)
    cos, sin = angles[:, place - pad][:, :, None]
    q_too, k, v = split_heads(qkv, cos, sin, norms, 1e-6, heads)
    expected_k[:, :, place], expected_v[:, :, place] = k[:, :, 0], v[:, :, 0]
    assert torch.equal(values, expected_v)
    for ours, truth in ((q.view_as(q_too), q_too), (keys, expected_k)):
        assert (ours.double() - truth.double()).norm() < 8e-3 * truth.double().norm()
    columns = torch.arange(N, device="cuda")
    mask = (columns <= place) & (columns >= pad[:, None])
    if window is not None:
        mask &= columns > place - window
    done = torch.zeros(B * K, dtype=torch.int32, device="cuda")
    out = attend(q, keys, values, slot, pad, D**-0.5, window, done).double()
    assert not done.any()
    truth = torch.nn.functional.scaled_dot_product_attention(
        q.view_as(q_too).double(), keys.double(), values.double(), attn_mask=mask[:, None, None]
    ).reshape(B, -1)
    assert (out - truth).norm() < 8e-3 * truth.norm()
