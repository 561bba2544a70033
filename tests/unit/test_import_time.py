"""What `import pocketlm` and `pocketlm --help` load, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "scipy", "matplotlib")
REPORT = f"import sys; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"


def loaded_after(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()


def test_import_and_names_load_nothing_heavy():
    code = "import pocketlm; pocketlm.__version__; assert 'compress' in pocketlm.__all__"
    assert loaded_after(code) == []


def test_help_and_mistakes_load_nothing_heavy():
    """All of them one after the other: each adds to what is loaded."""
    code = "from pocketlm.cli.main import run\n"
    contradicting = ["compress", "model", "-o", "out", "--scheme", "W4A16", "--bits", "3"]
    for arguments, ending in (
        (["--help"], 0), (["--version"], 0), (["compress", "--help"], 0), (["nonsense"], 2),
        (contradicting, 2),
    ):  # fmt: skip
        code += f"assert run({arguments!r}) == {ending}, {arguments!r}\n"
    assert loaded_after(code) == []


def test_help_takes_little_processor_time():
    code = (
        "import time\nfrom pocketlm.cli.main import run\n"
        "run(['--help'])\nprint(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 0.5
