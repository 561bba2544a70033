"""What goes into the benchmarks: the original model, and calibration tokens for both tools.

The original is the demo model without the 4-bit grid of the GGUF file that it comes from (design,
part 8): an ordinary Hugging Face directory, written beforehand. Calibration windows are the ones
that `pocketlm compress` samples itself; the peer gets the same ones as a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import DATA, SCRATCH

SAMPLES, SEQ_LEN, SEED = 64, 1024, 0


@dataclass(frozen=True)
class Inputs:
    """Where the inputs lie.

    Attributes:
        original: Hugging Face directory.
        calibration: Text file.
        test: Text file.
    """

    original: Path = SCRATCH / "original"
    calibration: Path = DATA / "wikitext2-train.txt"
    test: Path = DATA / "wikitext2-test.txt"

    def check(self) -> None:
        """Ends the script if one is missing."""
        for path in (self.original / "config.json", self.calibration, self.test):
            if not path.exists():
                raise SystemExit(
                    f"{path} is missing. The original and the texts are no part of the "
                    "repository: see benchmarks/README.md."
                )

    def tokens_file(self, samples: int = SAMPLES, seq_len: int = SEQ_LEN) -> Path:
        """The calibration windows that `pocketlm compress` samples itself, as .npy."""
        import numpy

        from pocketlm.calibration.texts import load_text
        from pocketlm.calibration.windows import token_windows
        from pocketlm.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.original)
        text = load_text(self.calibration, tokenizer=tokenizer)
        windows = token_windows(tokenizer, text, samples, seq_len, SEED)
        file = SCRATCH / f"tokens-{windows.sha256[:12]}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        numpy.save(file, windows.tokens_NT.numpy())
        return file

    def compress_arguments(
        self, output: Path, threads: int, bits: int = 4, method: str = "gptq"
    ) -> list[str]:
        """The arguments of `pocketlm compress` for the figures: symmetric, groups of 64."""
        return [
            "compress", str(self.original), "--output", str(output),
            "--method", method, "--bits", str(bits), "--group-size", "64", "--sym",
            "--calibration", str(self.calibration),
            "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--seed", str(SEED),
            "--device", "cpu", "--threads", str(threads), "--restart", "--json",
        ]  # fmt: skip


def peer_command(
    python: Path, inputs: Inputs, tokens: Path, output: Path, threads: int, *more: str
) -> list[str]:
    """The command line of llm-compressor's run, by its own environment's interpreter."""
    script = Path(__file__).with_name("peers") / "llmcompressor_run.py"
    return [
        str(python), str(script), str(inputs.original), str(output),
        "--tokens", str(tokens), "--threads", str(threads), "--overwrite", *more,
    ]  # fmt: skip
