"""A sparse artifact runs as the weights it decodes to, and says why its zeros are multiplied."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.unit.engine.conftest import compress, tiny
from tests.unit.runtime.helpers import byte_tokenizer

from pocketlm.core.spec import QuantSpec
from pocketlm.core.stored import SparsitySpec
from pocketlm.core.tensors import Dense, Sparse
from pocketlm.evaluate.verify_logits import view_logits
from pocketlm.models import open_model
from pocketlm.prune.patterns import kept
from pocketlm.quant.grid import minmax_grid, round_to_grid
from pocketlm.runtime.load import load
from pocketlm.runtime.semi_structured import refuses

__all__ = ["compress", "tiny"]


@pytest.mark.parametrize("floats", [True, False])
def test_loaded_as_it_decodes(tmp_path, compress, floats: bool, caplog) -> None:
    steps = ({"method": "wanda", "sparsity": "2:4"}, *(() if floats else ("rtn",)))
    compress(tmp_path / "out", steps=steps, target="pocketlm", floats=floats)
    byte_tokenizer().save_pretrained(tmp_path / "out")
    with caplog.at_level(logging.WARNING, "pocketlm.runtime"):
        model, _ = load(tmp_path / "out", dtype=torch.float32)
    assert "zeros of a sparse model are multiplied like other values" in caplog.text
    view = open_model(tmp_path / "out", allow_compressed=True)
    tokens = list(range(20))
    with torch.no_grad():
        found_TV = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    torch.testing.assert_close(found_TV, view_logits(view, tokens), rtol=1e-3, atol=1e-3)


def test_what_runs_on_sparse_tensor_cores_is_decided_by_rule() -> None:
    weight_OI = torch.randn(32, 64)
    mask_OI = kept(weight_OI.abs(), SparsitySpec.read("2:4"))
    spec = QuantSpec(group_size=32)
    grid = minmax_grid(weight_OI * mask_OI, spec, torch.float16)
    floats = Sparse(Dense(weight_OI * mask_OI), mask_OI, (2, 4))
    codes = Sparse(round_to_grid(weight_OI * mask_OI, grid, spec), mask_OI, (2, 4))
    cpu = torch.device("cpu")
    assert "CUDA" in (refuses(floats, torch.bfloat16, cpu) or "")
    assert "quantized" in (refuses(codes, torch.bfloat16, cpu) or "")
    other = Sparse(floats.values, mask_OI, None)
    assert "no kernel" in (refuses(other, torch.bfloat16, cpu) or "")
