"""Which grid embedding and head get, where a recipe names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.core.views import End
from pocketlm.engine.fitting import fitted_grid, fitting_note
from pocketlm.formats.capabilities import check_end


def choose_ends(ends: Sequence[End], recipe: Recipe, target: str) -> dict[str, QuantSpec]:
    """The fitted grid of embedding and head, where the recipe names them.

    A head that is tied shares the embedding's grid; where the recipe gives it another, or names it
    alone, the two are untied.
    """
    chosen: dict[str, QuantSpec] = {}
    for end in ends:
        spec = recipe.spec_for_end(end.name)
        apart = None if end.tied_name is None else recipe.spec_for_end(end.tied_name)
        for name, found in ((end.name, spec), (end.tied_name, apart)):
            if name is not None and found is not None and not (name != end.name and found == spec):
                chosen[name] = fitted_grid(found, end.shape[1], target)
    return chosen


def check_end_grid(
    end: End, chosen: Mapping[str, QuantSpec], recipe: Recipe, format_name: str, target: str
) -> dict[str, str]:
    """Refuses an embedding or head that the target cannot load; what to tell of it, by name."""
    notes: dict[str, str] = {}
    apart = end.tied_name is not None and end.tied_name in chosen
    if end.name in chosen:
        check_end(format_name, chosen[end.name], end.shape, target, end.name, embeds=end.embeds)
        if end.embeds:
            once = end.tied_name is not None and not apart
            said = ["the head is tied to it: both are stored once, compressed."] if once else []
            if target != "llama.cpp":
                said.append("transformers loads a compressed embedding after `import pocketlm.hf`.")
            if said:
                notes[end.name] = " ".join(said)
    if apart:
        assert end.tied_name is not None
        head = end.tied_name
        check_end(format_name, chosen[head], end.shape, target, head, embeds=False)
        notes[head] = f"it was tied to {end.name}: it is untied, so that the two count twice."
    for name in (end.name, end.tied_name):
        if name is None or name not in chosen:
            continue
        asked = recipe.spec_for_end(name)
        if asked is not None and asked != chosen[name]:
            why = fitting_note(asked, chosen[name], end.shape[1])
            notes[name] = f"{notes[name]} {why}" if name in notes else why
    return notes
