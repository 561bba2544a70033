"""A run that is stopped anywhere goes on and gives the bytes of an uninterrupted one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pocketlm.core.errors import OutputBusy, ResumeError
from pocketlm.engine import artifact, runner
from pocketlm.engine.events import Event
from pocketlm.engine.journal import Journal


class Killed(Exception):
    """Stands for a kill: nothing but `finally` blocks run."""


def digests(output: Path) -> dict[str, str]:
    own = {"events.jsonl"}
    files = [p for p in sorted(output.rglob("*")) if p.is_file() and p.name not in own]
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize(
    ("stop", "activation_bytes"),
    [
        ("block_started", 1 << 30),
        ("block_done", 1000),
        pytest.param("block_started", 1000, marks=pytest.mark.slow),
        pytest.param("block_done", 1 << 30, marks=pytest.mark.slow),
    ],
)
def test_stopped_at_every_block(tmp_path: Path, compress, activation_bytes: int, stop: str) -> None:
    compress(tmp_path / "whole", activation_bytes=activation_bytes)
    compressed: list[int] = []

    for limit in range(3):

        def listen(event: Event, limit: int = limit) -> None:
            if event.kind == "block_done" and event.block is not None:
                compressed.append(event.block)
            if event.kind == stop and event.block == limit:
                raise Killed

        with pytest.raises(Killed):
            compress(tmp_path / "parts", activation_bytes=activation_bytes, listener=listen)
        assert not (tmp_path / "parts").exists()
    outcome = compress(tmp_path / "parts", activation_bytes=activation_bytes)
    assert outcome is not None
    assert outcome.blocks_done + outcome.blocks_resumed == 3
    assert sorted(set(compressed)) == sorted(compressed), "a finished block was compressed again"
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert not (tmp_path / "parts.work").exists()


def test_stopped_while_assembling(
    tmp_path: Path, compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(tmp_path / "whole")
    for place in ("assemble", "_take_place"):
        with monkeypatch.context() as patch:
            patch.setattr(artifact, place, _raise)
            with pytest.raises(Killed):
                compress(tmp_path / "parts")
        assert not (tmp_path / "parts").exists()
        assert not artifact.partial_path(tmp_path / "parts").exists()
    outcome = compress(tmp_path / "parts")
    assert outcome is not None
    assert outcome.blocks_done == 0
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def _raise(*args: object, **kwargs: object) -> None:
    raise Killed


def test_memory_for_activations_does_not_change_the_result(tmp_path: Path, compress) -> None:
    compress(tmp_path / "much")
    for activation_bytes in (1, 40_000, 100_000):
        output = tmp_path / str(activation_bytes)
        compress(output, activation_bytes=activation_bytes)
        assert digests(output) == digests(tmp_path / "much")


def test_a_finished_run_is_not_done_again(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out")
    before = digests(tmp_path / "out")
    assert compress(tmp_path / "out") is None
    assert digests(tmp_path / "out") == before


def test_another_recipe_is_not_mixed_in(tmp_path: Path, compress) -> None:
    def stop(event: Event) -> None:
        if event.kind == "block_done":
            raise Killed

    with pytest.raises(Killed):
        compress(tmp_path / "out", listener=stop)
    with pytest.raises(ResumeError, match="--restart"):
        compress(tmp_path / "out", bits=3)
    with pytest.raises(ResumeError, match="calibration"):
        compress(tmp_path / "out", seed=1)
    outcome = compress(tmp_path / "out", bits=3, restart=True)
    assert outcome is not None
    assert outcome.blocks_resumed == 0


def test_a_finished_artifact_is_replaced_only_on_demand(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out")
    with pytest.raises(OutputBusy, match="--restart"):
        compress(tmp_path / "out", bits=3)
    compress(tmp_path / "out", bits=3, restart=True)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["config_groups"]["group_0"]["weights"]["num_bits"] == 3


def test_an_interrupted_restart_keeps_the_old_artifact(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out")
    before = digests(tmp_path / "out")

    def stop(event: Event) -> None:
        if event.kind == "block_done":
            raise Killed

    with pytest.raises(Killed):
        compress(tmp_path / "out", bits=3, restart=True, listener=stop)
    assert digests(tmp_path / "out") == before
    outcome = compress(tmp_path / "out", bits=3)
    assert outcome is not None
    assert outcome.blocks_resumed == 1
    assert digests(tmp_path / "out") != before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_strangers_directory_is_left_alone(tmp_path: Path, compress) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(OutputBusy, match="deletes nothing"):
            compress(tmp_path / "out", restart=restart)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_two_runs_on_one_output(tmp_path: Path, compress) -> None:
    journal = Journal(tmp_path / "out.work", {"a": 1}, restart=False)
    with pytest.raises(OutputBusy, match="another run"):
        compress(tmp_path / "out")
    journal.release()


def test_a_damaged_block_is_noticed(
    tmp_path: Path, compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_artifact", _raise)
        with pytest.raises(Killed):
            compress(tmp_path / "out")
    path = tmp_path / "out.work" / "blocks" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ResumeError, match="damaged"):
        compress(tmp_path / "out")
