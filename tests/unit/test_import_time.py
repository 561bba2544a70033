"""What `import pocketlm` and `pocketlm --help` load, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "scipy", "matplotlib")
REPORT = f"import sys; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"


def loaded_after(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()


def test_import_loads_nothing_heavy():
    assert loaded_after("import pocketlm; pocketlm.__version__") == []


def test_the_names_are_there_without_being_imported():
    assert loaded_after("import pocketlm; assert 'compress' in pocketlm.__all__") == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compress", "--help"], ["nonsense"]]
)
def test_help_and_mistakes_load_nothing_heavy(arguments: list[str]):
    assert loaded_after(f"from pocketlm.cli.main import run\nrun({arguments!r})") == []


def test_contradicting_flags_end_before_anything_heavy():
    arguments = ["compress", "model", "-o", "out", "--scheme", "W4A16", "--bits", "3"]
    code = f"from pocketlm.cli.main import run\nassert run({arguments!r}) == 2"
    assert loaded_after(code) == []


def test_help_takes_little_processor_time():
    code = (
        "import time\nfrom pocketlm.cli.main import run\n"
        "run(['--help'])\nprint(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 0.5
