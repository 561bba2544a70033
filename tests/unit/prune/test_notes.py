"""Where the notes of a run say that they belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pocketlm
from pocketlm.engine.events import Event


def test_a_note_of_the_whole_run_has_no_place_and_one_of_the_text_has(
    saved: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    seen: list[Event] = []
    recipe = {"steps": [{"method": "wanda", "sparsity": "2:4"}]}
    options = {"calibration": str(text_file), "samples": 100_000, "seq_len": 16}
    pocketlm.compress(saved("llama"), recipe, tmp_path / "out", on_event=seen.append, **options)
    places = {event.text: event.where for event in seen if event.kind == "warning"}
    assert next(where for text, where in places.items() if "weights pruned" in text) is None
    assert "calibration" in places.values()
