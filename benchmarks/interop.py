r"""Every format of ours in real engines: the runs behind docs/capabilities.md.

Tiny random models of each family, and SmolLM2-135M, are compressed and exported in every format;
each engine loads what was written and is compared with our own float32 run, as `verify --engine`
does. Cells that were run are kept and not run again, so that a run that was stopped goes on.

    python benchmarks/interop.py --vllm-python ENV/bin/python --llama-cpp DIR \
        --onnx-python ENV/bin/python
    python benchmarks/interop.py --publish    # into src/pocketlm/formats/proofs.json and the docs
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from interop_rows import (
    ENGINES,
    MARKS,
    REAL,
    ROWS,
    TINY,
    TOLERATED,
    TRIED,
    Made,
    method_of,
    reasons,
    wanted,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tiny models are those of the tests

from tests.unit.engine.test_export_gguf import bpe_tokenizer  # noqa: E402
from tests.unit.models.families import build  # noqa: E402

from pocketlm import api  # noqa: E402
from pocketlm.core.errors import PocketLMError  # noqa: E402
from pocketlm.core.spec import QuantSpec  # noqa: E402
from pocketlm.core.stored import SparseSpec  # noqa: E402
from pocketlm.evaluate.engines.ask import Answer, Job, Refusal, ask  # noqa: E402
from pocketlm.evaluate.engines.find import Engine, EngineMissing, find_engine  # noqa: E402
from pocketlm.evaluate.verify_engine import KL_LIMITS, EngineRun, dtypes_for  # noqa: E402
from pocketlm.evaluate.verify_files import Artifact, check_config, check_shards  # noqa: E402
from pocketlm.formats.proofs import Cell, Proofs, Row, grid_names, key  # noqa: E402
from pocketlm.formats.read import CompressedIndex  # noqa: E402
from pocketlm.models import open_model  # noqa: E402
from pocketlm.report.capabilities import page  # noqa: E402

DATA = ROOT / "src/pocketlm/formats/proofs.json"
PAGE = ROOT / "docs/capabilities.md"
STATE = ROOT / "build/interop"


@dataclass
class State:
    """Cells and rows so far, on disk after each engine's process."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls) -> State:
        """What an earlier run left."""
        file = STATE / "cells.json"
        return cls(**json.loads(file.read_text())) if file.is_file() else cls()

    def save(self) -> None:
        """Writes all of it, whole or not at all."""
        STATE.mkdir(parents=True, exist_ok=True)
        growing = STATE / "cells.json.part"
        growing.write_text(json.dumps({"rows": self.rows, "cells": self.cells}, indent=1))
        growing.replace(STATE / "cells.json")


class Files:
    """The files of one architecture, made when they are first asked for."""

    def __init__(self, architecture: str, folder: Path, onnx_python: Path | None) -> None:
        self.architecture, self.folder, self.onnx_python = architecture, folder, onnx_python
        self.source: str | Path = REAL
        if architecture != REAL:
            family, changes = TINY[architecture]
            self.source = folder / "source"
            model = build(family, torch.bfloat16, **changes)
            if "gemma" in family:  # its embeddings, made 16 times larger, would drown the blocks
                model.get_input_embeddings().weight.data *= 0.3
            model.save_pretrained(self.source)
            bpe_tokenizer().save_pretrained(self.source)
        self.made: dict[str, Path] = {}

    def of(self, name: str) -> Path:
        """The files of a row.

        Raises:
            PocketLMError: If they cannot be made.
        """
        if name in self.made:
            return self.made[name]
        made = ROWS[name]
        place = self.folder / f"row-{list(ROWS).index(name)}"
        current: str | Path = self.source if made.base is None else self.of(made.base)
        if made.recipe is not None:
            output = place if made.to is None else place.with_name(place.name + "-artifact")
            few = {"samples": 4, "seq_len": 64}
            recipe = api.build_recipe(**made.recipe)
            api.compress(current, recipe, output, target=made.target, resume=False, **few)
            current = output
        if made.to is not None:
            output = place if "gguf" not in made.to else place.with_suffix(".gguf")
            python = self.onnx_python if made.to == "onnx" else None
            api.export(current, output, to=made.to, engine_python=python)
            current = output
        self.made[name] = Path(current)
        return self.made[name]

    def read(self, name: str) -> Path:
        """What we read as a row: ONNX is not read here, and was compared with its base."""
        made = ROWS[name]
        return self.of(name if made.to != "onnx" or made.base is None else made.base)


def grids_of(path: Path) -> tuple[str, ...]:
    """What linears are stored as."""
    if path.suffix == ".gguf":
        import gguf

        tensors = gguf.GGUFReader(path).tensors
        return tuple(sorted({t.tensor_type.name for t in tensors if t.name.startswith("blk.")
                             and len(t.shape) > 1}))  # fmt: skip
    artifact = Artifact(path)
    check_config(artifact)
    check_shards(artifact)
    index = CompressedIndex.build(artifact.config, artifact.tensors)
    if index is None:
        return ()
    plain = {n: m.spec for n, m in index.modules.items() if isinstance(m.spec, QuantSpec)}
    inputs = {n: m.activations for n, m in index.modules.items() if m.activations is not None}
    others = [m.spec for m in index.modules.values() if not isinstance(m.spec, QuantSpec)]
    if others:
        return ("sparse" if isinstance(others[0], SparseSpec) else "factors",)
    return grid_names(plain, inputs)


def format_of(made: Made, path: Path) -> str:
    """The name of a row's format."""
    if path.suffix == ".gguf":
        return "gguf"
    if made.to is not None:
        return made.to
    section = json.loads((path / "config.json").read_text()).get("quantization_config", {})
    return section.get("quant_method", "dense")


def run_architecture(
    architecture: str, engines: dict[str, Engine], state: State, onnx_python: Path | None
) -> None:
    """Runs what is left to run of one architecture."""
    left = {
        (row, engine)
        for row in wanted(architecture)
        for engine in ROWS[row].engines
        if engine in engines
        and key(row, MARKS.get(engine, engine), architecture) not in state.cells
    }
    if not left:
        return
    with tempfile.TemporaryDirectory(prefix="interop-") as folder:
        files = Files(architecture, Path(folder), onnx_python)
        paths: dict[str, Path] = {}
        for row in wanted(architecture):
            if not any(row == name for name, _ in left):
                continue
            try:
                paths[row] = files.of(row)
            except PocketLMError as error:
                for engine in ROWS[row].engines:
                    note(state, row, engine, architecture, Cell(message=f"not written: {error}"))
                continue
            found = {"method": method_of(ROWS[row]), "format": format_of(ROWS[row], paths[row])}
            state.rows.setdefault(row, {**found, "grids": grids_of(files.read(row))})
        state.save()
        for engine in engines.values():
            rows = [row for row in paths if (row, engine.name) in left]
            if rows:
                ask_rows(engine, rows, files, architecture, state)
            state.save()


def ask_rows(
    engine: Engine, rows: list[str], files: Files, architecture: str, state: State
) -> None:
    """One process of an engine over several rows."""
    runs, jobs = [], []
    for row in rows:
        model, path = files.of(row), files.read(row)
        run = EngineRun(engine, model, open_model(path, allow_compressed=True))
        artifact = Artifact(path)
        if path.is_dir():
            check_config(artifact)
            check_shards(artifact)
            artifact.index = CompressedIndex.build(artifact.config, artifact.tensors)
        runs.append((run, artifact))
        jobs.append(Job(model, run.questions, dtypes_for(engine, artifact.index)))
    started = time.monotonic()

    def keep(place: int, answer: Answer | Refusal) -> None:
        run, artifact = runs[place]
        try:
            cell = judged(run, artifact, answer)
        except PocketLMError as error:
            cell = Cell(message=str(error))
        note(state, rows[place], engine.name, architecture, cell)
        state.save()

    ask(engine, jobs, keep)
    seconds = time.monotonic() - started
    print(f"{architecture}: {engine.name}, {len(rows)} models, {seconds:.0f} s", flush=True)


def judged(run: EngineRun, artifact: Artifact, answer: Answer | Refusal) -> Cell:
    """The cell of an answer, by the bounds of `verify`."""
    today = date.today().isoformat()
    if isinstance(answer, Refusal) and answer.message.startswith("ImportError"):
        return Cell(message=answer.message[:300], date=today)  # a package that is not there
    if isinstance(answer, Refusal):
        return Cell(status="refused", message=answer.message[:300], date=today)
    run.answer = answer
    run.prepare(artifact)
    found = run.distance()
    equal = run.bit_equal() if run.engine.name == "transformers" else None
    limit = run.kl_limit()
    good = equal or found.kl < limit
    return Cell(
        status="proven" if good and found.wrong <= run.flips_at_most() else "disagrees",
        kl=found.kl, kl_largest=found.kl_largest, bit_equal=equal, greedy=found.greedy,
        limit=None if limit == KL_LIMITS[run.engine.name] else limit,
        different=found.different, wrong=found.wrong, version=answer.version, dtype=answer.dtype,
        date=today, message=" ".join(run.notes).strip("() ") or None,
    )  # fmt: skip


def note(state: State, row: str, engine: str, architecture: str, cell: Cell) -> None:
    """Keeps and prints a cell."""
    place = key(row, MARKS.get(engine, engine), architecture)
    state.cells[place] = cell.model_dump(exclude_none=True)
    figure = "" if cell.kl is None else f"KL {cell.kl:.1e}, {cell.wrong} of {cell.different} wrong"
    print(f"  {place}: {cell.status} {figure} {cell.message or ''}"[:200], flush=True)


def publish(state: State) -> None:
    """Writes the table into the package and the page into the docs."""
    kinds = {name: f"tiny {family}" for name, (family, _) in TINY.items()}
    unknown = {"method": "", "format": "", "grids": ()}
    rows = []
    for name, made in ROWS.items():
        found = state.rows.get(name) or {**unknown, "method": method_of(made),
                                         "format": (made.to or "?").partition(":")[0]}  # fmt: skip
        rows.append(Row(name=name, **found))
    cells = {place: Cell(**cell) for place, cell in state.cells.items()}
    for place, reason in TOLERATED.items():
        if place in cells and cells[place].status == "disagrees":
            cells[place] = cells[place].model_copy(update={"message": reason})
    for architecture in (*TINY, REAL):
        for row, engine in itertools.product(wanted(architecture), TRIED):
            if engine in {MARKS.get(name, name) for name in ROWS[row].engines}:
                left = Cell(message="not run yet; `make interop` does")
                cells.setdefault(key(row, engine, architecture), left)
    table = Proofs(
        architectures={**kinds, REAL: "the whole model (Llama)"},
        engines=ENGINES, rows=tuple(rows), cells=dict(sorted(cells.items())),
        reasons=reasons(),
    )  # fmt: skip
    DATA.write_text(json.dumps(table.model_dump(mode="json", exclude_none=True), indent=1) + "\n")
    PAGE.write_text(page(table))


def engines_here(options: argparse.Namespace) -> dict[str, Engine]:
    """The engines that are installed; what is missing is said."""
    found = {}
    for name in options.engines:
        python = {"vllm": options.vllm_python, "onnxruntime": options.onnx_python}.get(name)
        path = options.llama_cpp if name == "llama.cpp" else None
        try:
            found[name] = find_engine(name, python, path)
        except EngineMissing as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
    return found


def main() -> int:
    """Runs what is left; exit code 1 where an engine computes otherwise for no known reason, where
    a cell that the published table proves is so no more, and where an engine asked for is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--llama-cpp", type=Path, help="directory with node_modules")
    parser.add_argument("--onnx-python", type=Path)
    known = ["transformers", "llama.cpp", "vllm", "onnxruntime"]
    parser.add_argument("--engines", nargs="*", default=known)
    parser.add_argument("--architectures", nargs="*", default=[*TINY, REAL])
    parser.add_argument("--again", action="store_true", help="forget earlier cells")
    parser.add_argument("--publish", action="store_true", help="write the package's table and page")
    options = parser.parse_args()
    if options.again:
        shutil.rmtree(STATE, ignore_errors=True)
    state = State.load()
    torch.set_num_threads(1)
    engines = engines_here(options)
    for architecture in options.architectures:
        run_architecture(architecture, engines, state, options.onnx_python)
    published = Proofs.model_validate_json(DATA.read_text())
    proven = [place for place, cell in published.cells.items() if cell.status == "proven"]
    if options.publish:
        publish(state)
    cells = [Cell(**cell) for cell in state.cells.values()]
    counts = {status: sum(c.status == status for c in cells)
              for status in ("proven", "refused", "disagrees", "not run here")}  # fmt: skip
    print(counts)
    now = {place: cell["status"] for place, cell in state.cells.items()}
    bad = {place: f"was proven, is {now[place]}" for place in proven
           if now.get(place, "proven") != "proven"}  # fmt: skip
    bad |= {place: "computes otherwise" for place, s in now.items()
            if s == "disagrees" and place not in TOLERATED}  # fmt: skip
    bad |= {name: "is not installed" for name in options.engines if name not in engines}
    for place, said in bad.items():
        print(f"{said}: {place}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
