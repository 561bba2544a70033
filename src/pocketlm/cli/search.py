"""Where bits matter: the sensitivity of each layer, the frontier, and the recipe for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pocketlm.cli import draw, flags
from pocketlm.cli.options import (
    Asym,
    BudgetBits,
    Calibration,
    Device,
    Dtype,
    GroupSize,
    Ignore,
    Json,
    LogFile,
    Method,
    Quiet,
    RecipeFile,
    RecipeName,
    Revision,
    SearchDir,
    SearchMinutes,
    Seed,
    Size,
    Source,
    Sym,
    Target,
    Threads,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer
from pocketlm.core.errors import ConfigError
from pocketlm.report.words import bytes_text, number_text, seconds_text

if TYPE_CHECKING:
    from pocketlm.search.results import Point, SearchResult

WORST = 5


def run(
    source: Source,
    bits: BudgetBits = None,
    size: Size = None,
    output: RecipeFile = None,
    recipe: RecipeName = None,
    method: Method = None,
    group_size: GroupSize = None,
    sym: Sym = False,
    asym: Asym = False,
    ignore: Ignore = None,
    target: Target = "transformers",
    calibration: Calibration = "builtin",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
    search_minutes: SearchMinutes = None,
    search_dir: SearchDir = None,
    log_file: LogFile = None,
    quiet: Quiet = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Find the best grid for each layer within a budget, and what every budget would give.

    Measures once how much each layer minds each grid; every later budget reuses that.
    Without a budget it draws the frontier alone.

    Example: [bold]pocketlm search Qwen/Qwen3-8B --bits 3.5 -o recipe.yaml[/bold]
    """
    settings = flags.model_flags(locals())
    average = flags.parse_bits(bits)
    budget = {
        **({} if search_minutes is None else {"search_minutes": search_minutes}),
        **({} if search_dir is None else {"search_dir": search_dir}),
    }
    if average is not None or size is not None:
        average = None if average is None else float(average)  # no code's width is meant here
        budget = flags.budget_flags(
            bits=average,
            size=size,
            scheme=None,
            search_minutes=search_minutes,
            search_dir=search_dir,
        )
    elif output is not None:
        raise ConfigError(
            "there is no recipe without a budget.",
            where="--output",
            remedy="Give --bits or --size.",
        )
    wanted = flags.recipe_flags(
        recipe=recipe,
        method=method,
        scheme=None,
        bits=None,
        group_size=group_size,
        sym=sym,
        asym=asym,
    )
    from pocketlm import api
    from pocketlm.cli.progress import progress

    with progress(quiet=quiet, log_file=log_file) as on_event:
        found = api.search(
            source,
            api.build_recipe(**wanted),
            on_event=on_event,
            **settings,
            **budget,
        )
    if output is not None and found.recipe is not None:
        flags.write_recipe(output, found.recipe)
    return Answer(found, lambda console: _draw(console, found, output))


def _draw(console: Console, found: SearchResult, output: Path | None) -> None:
    points = [*found.frontier, *found.uniform]
    points += [] if found.chosen is None else [found.chosen]
    rows = [
        (f"{point.bits_per_weight:.3f}", bytes_text(point.file_bytes),
         number_text(point.damage), _what(point, found))
        for point in sorted(points, key=lambda point: (point.bits_per_weight, point.damage))
    ]  # fmt: skip
    draw.table(console, ("bits>", "weight files>", "damage>", ""), rows)
    console.print("damage: summed KL of each layer's change alone, nats a token: to compare by")
    if found.chosen is not None:
        grids = ((grid, str(count)) for grid, count in found.chosen.grids.items())
        draw.table(console, ("chosen", "linears>"), grids)
        draw.facts(console, "Most damage", _most(found))
    draw.warnings(console, found.notes)
    measured = sum(sum(unit.measured) for unit in found.units)
    console.print(
        f"{measured} KLs measured on {escape(found.calibration)}; {seconds_text(found.seconds)}; "
        f"kept in {escape(found.table)}",
        soft_wrap=True,
    )
    if output is not None:
        console.print(f"recipe: {escape(str(output))}")
        console.print(f"next:   pocketlm compress MODEL -o out --recipe {escape(str(output))}")


def _what(point: Point, found: SearchResult) -> str:
    if point is found.chosen:
        return "← chosen"
    return "" if point.label == "allocated" else f"uniform: {point.label}"


def _most(found: SearchResult) -> dict[str, str]:
    """The units that cost most as chosen."""
    chosen = [(unit, unit.chosen) for unit in found.units if unit.chosen is not None]
    worst = sorted(chosen, key=lambda pair: -pair[0].damages[pair[1]])[:WORST]
    grids = [(unit, unit.grids[c], unit.damages[c]) for unit, c in worst]
    return {
        unit.name: f"{'kept' if grid is None else f'{grid.bits} bits'}: {number_text(damage)}"
        for unit, grid, damage in grids
    }
