"""The names in `pocketlm` itself."""

from __future__ import annotations

import importlib

import pytest

import pocketlm
from pocketlm.core.errors import ConfigError


@pytest.mark.parametrize("name", ["evaluate", "search"])
def test_a_function_stays_where_a_folder_has_its_name(name: str):
    folder = importlib.import_module(f"pocketlm.{name}.results")
    assert folder.__name__ == f"pocketlm.{name}.results"
    assert callable(getattr(pocketlm, name))


def test_a_whole_number_is_no_budget():
    with pytest.raises(ConfigError, match="a whole number is the width of every code"):
        pocketlm.search("absent", bits=4)
    with pytest.raises(ConfigError, match="Give one of them"):
        pocketlm.search("absent", bits=3.5, size=10)
