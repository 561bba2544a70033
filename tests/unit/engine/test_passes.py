"""Folds, corrections and block steps in a run: what is written, resumed and propagated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.unit.engine.test_engine import ledger_of
from tests.unit.engine.test_resume import Killed, digests

from pocketlm import catalog
from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import Strict
from pocketlm.core.state import BlockTask, Cost, LinearState
from pocketlm.core.stats import Drift, Stat
from pocketlm.engine.events import Event
from pocketlm.engine.order import passes
from pocketlm.models import open_model
from pocketlm.quant.awq import Awq
from pocketlm.quant.correct import Correct
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.grid import minmax_grid, round_to_grid
from pocketlm.quant.rtn import Rtn


class Nearest(Strict):
    """A block step that rounds, and proves that targets are the original's outputs."""

    kind: ClassVar[str] = "block"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    def compress(self, task: BlockTask) -> Mapping[str, LinearState]:
        weights = {
            name: state.reference_OI.clone().requires_grad_() for name, state in task.states.items()
        }
        for batch in range(task.batches):
            output = task.forward(weights, batch)
            seen.append(float((output.detach() - task.targets(batch)).abs().max()))
        output.square().sum().backward()
        assert all(bool(weight.grad.abs().sum() > 0) for weight in weights.values())
        task.report(1, 1, seen[-1])
        drawn.append(float(torch.rand((), generator=task.generator())))
        return {name: self._rounded(state) for name, state in task.states.items()}

    def _rounded(self, state: LinearState) -> LinearState:
        grid = minmax_grid(state.reference_OI, state.spec, state.scale_dtype)
        return state.with_current(round_to_grid(state.reference_OI, grid, state.spec))

    def flops_per_weight(self, samples: int, seq_len: int) -> float:
        return 0.0

    def cost(self, rows: int, columns: int) -> Cost:
        return Cost(0, 0.0, 0)


seen: list[float] = []
drawn: list[float] = []


@pytest.fixture
def nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen.clear()
    drawn.clear()
    monkeypatch.setitem(catalog.METHODS, "nearest", f"{__name__}:Nearest")
    monkeypatch.setattr(catalog, "method_class", lambda name, known=catalog.method_class: (
        Nearest if name == "nearest" else known(name)
    ))  # fmt: skip


AWQ = {"method": "awq", "steps": 2}


def test_awq_writes_the_norms_it_divided(tmp_path: Path, compress, tiny: Path) -> None:
    compress(tmp_path / "out", steps=(AWQ, "clip", "gptq"))
    ledger = ledger_of(tmp_path / "out")
    folded = {name for name, entry in ledger.tensors.items() if entry.action == "folded"}
    assert folded
    assert all("layernorm" in name for name in folded)
    before, after = open_model(tiny), open_model(tmp_path / "out", allow_compressed=True)
    for name in folded:
        assert not torch.equal(before.source.read(name), after.source.read(name))
    tokens = torch.arange(32)[None]
    outputs = []
    for model in (before, after):
        hidden, call = model.begin(tokens)
        for index in range(3):
            with model.block(index) as block:
                hidden = block.forward(hidden, call)
        outputs.append(hidden)
    assert (outputs[0] - outputs[1]).norm() < 0.2 * outputs[0].norm()


MEMORY, DISK = 1 << 30, 1000
STOPPED = [  # tests/contracts stops every method once
    pytest.param((AWQ, "clip", "rtn"), MEMORY, marks=pytest.mark.slow),
    pytest.param(("smoothquant", "gptq"), MEMORY, marks=pytest.mark.slow),
    pytest.param(("correct", "gptq"), MEMORY, marks=pytest.mark.slow),
    pytest.param(("correct", "gptq"), DISK, marks=pytest.mark.slow),
    pytest.param(("hqq",), MEMORY, marks=pytest.mark.slow),
    ((AWQ, "nearest", "refine"), DISK),
]


@pytest.mark.parametrize(("steps", "activation_bytes"), STOPPED)
def test_stopped_runs_give_the_same_bytes(
    tmp_path: Path, compress, nearest: None, activation_bytes: int, steps: tuple[Any, ...]
) -> None:
    compress(tmp_path / "whole", steps=steps, activation_bytes=activation_bytes)

    def listen(event: Event) -> None:
        if event.kind == "block_started" and event.block == 2:
            raise Killed

    with pytest.raises(Killed):
        compress(
            tmp_path / "parts", steps=steps, activation_bytes=activation_bytes, listener=listen
        )
    compress(tmp_path / "parts", steps=steps, activation_bytes=activation_bytes)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize("steps", [("nearest",), ("clip", "rtn", "nearest")], ids="-".join)
def test_block_steps_see_the_original_model(
    tmp_path: Path, compress, nearest: None, steps: tuple[str, ...]
) -> None:
    compress(tmp_path / "out", steps=steps)
    first, later = seen[: len(seen) // 3], seen[len(seen) // 3 :]
    assert max(first) < 1e-5  # the first block has the same input in both streams
    assert min(later) > 1e-4  # later ones do not, and nothing has been rounded when it is asked
    assert len(set(drawn)) == 3


def test_drift_is_zero_where_nothing_was_compressed(
    tmp_path: Path, compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, float] = {}
    original = Correct.compress

    def spy(self, state, stats):
        found[state.name] = float(stats[Drift].matrix_II().abs().max())
        return original(self, state, stats)

    monkeypatch.setattr(Correct, "compress", spy)
    for activation_bytes in (1 << 30, 1):  # runs that are held, and runs that are run again
        found.clear()
        compress(
            tmp_path / str(activation_bytes),
            steps=("correct", "gptq"),
            activation_bytes=activation_bytes,
        )
        assert found["model.layers.0.self_attn.q_proj"] == 0.0
        assert found["model.layers.0.self_attn.o_proj"] > 0.0
        assert found["model.layers.1.self_attn.q_proj"] > 0.0
    assert digests(tmp_path / "1") == digests(tmp_path / str(1 << 30))


@pytest.mark.parametrize("steps", [(Gptq(), Awq()), (Awq(),), (Rtn(), Awq(), Rtn())])
def test_folds_come_before_what_quantizes(steps: tuple) -> None:
    with pytest.raises(ConfigError):
        passes(steps)
