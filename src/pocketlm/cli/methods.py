"""The methods of the catalog with their options and defaults."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console

from pocketlm.cli.options import Json
from pocketlm.cli.output import Answer


def run(json: Json = False) -> Answer:
    """List the methods, what each does and its options.

    Example: [bold]pocketlm methods[/bold]
    """
    from pocketlm.catalog import known_methods, method_class

    found = [_describe(name, method_class(name)) for name in sorted(known_methods())]
    return Answer({"methods": found}, lambda console: _draw(console, found))


def _describe(name: str, method: Any) -> dict[str, Any]:
    step = method.model_construct()  # defaults alone: some methods have options that must be given
    defaults = step.model_dump(mode="json")
    options = {key: defaults.get(key, "must be given") for key in method.model_fields}
    return {
        "name": name,
        "kind": step.kind,
        "summary": (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " "),
        "needs": [need.__name__ for need in step.needs],
        "preserves": sorted(step.preserves),
        "makes": sorted(step.makes),
        "options": options,
    }


def _draw(console: Console, found: list[dict[str, Any]]) -> None:
    for method in found:
        console.print(f"[bold]{method['name']}[/bold]  {method['kind']} step", end="")
        console.print(f", needs {', '.join(method['needs'])}" if method["needs"] else "")
        console.print(f"  {method['summary']}", markup=False)
        for key, default in method["options"].items():
            console.print(f"    {key} = {default}", style="dim", markup=False)
