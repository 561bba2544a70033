"""What is calibration worth when a linear has seen few tokens, as an expert may?

Linears of one block get Hessians of some hundred tokens, drawn at random from the first half of the
windows, and are compressed by the default chain; the error of their output is measured on the
second half. Three ways: no data at all; the sample as if it were large; the sample as the Hessian
gives it, leaning on its diagonal where tokens are few (core/stats.py, `shrunk_II`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import environment, publish, table
from inputs import SEED, Inputs


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--calibration", type=Path, default=Inputs.calibration)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3])
    parser.add_argument("--shares", type=float, nargs="*", default=[1 / 16, 1 / 4, 1, 2, 8, 16],
                        help="tokens as a multiple of the columns")  # fmt: skip
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--rows", type=int, default=256, help="of a weight, the first ones")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def main() -> int:
    """Prints a table."""
    arguments = parse()
    import torch

    from pocketlm.calibration.texts import load_text
    from pocketlm.calibration.windows import token_windows
    from pocketlm.catalog import build_step
    from pocketlm.core.measure import relative_error
    from pocketlm.core.spec import QuantSpec
    from pocketlm.core.state import LinearState, Statistics
    from pocketlm.core.stats import Hessian
    from pocketlm.models import open_model
    from pocketlm.recipes import CHAINS

    torch.set_num_threads(arguments.threads)
    model = open_model(arguments.original, device=arguments.device, compute_dtype=torch.float32)
    text = load_text(arguments.calibration)
    windows = token_windows(
        model.tokenizer(), text, arguments.samples, arguments.seq_len, SEED, model.context
    )
    chain = [build_step(step.method, step.options) for step in CHAINS["gptq"]]

    def gathered(x_TI: torch.Tensor) -> Hessian:
        stat = Hessian(x_TI.shape[-1], x_TI.device)
        stat.add(x_TI)
        return stat

    def error(weight_OI: torch.Tensor, bits: int, stat: Hessian, test_II: torch.Tensor) -> float:
        spec = QuantSpec.parse({"bits": bits, "group_size": 64})
        state = LinearState("linear", weight_OI, spec, torch.bfloat16)
        for step in chain:
            state = step.compress(state, Statistics(stat))
        assert state.current is not None
        return relative_error(weight_OI, state.current.dequantize(), test_II)

    rows, found = [], []
    with torch.no_grad():
        hidden_BTD, call = model.begin(windows.tokens_NT.to(model.device))
        for index in range(arguments.block):
            with model.block(index) as block:
                hidden_BTD = block.forward(hidden_BTD, call)
        with model.block(arguments.block) as block:
            run = block.start(hidden_BTD, call)
            while (pause := run.advance()) is not None:
                name = block.groups[pause.group].linears[0]
                weight_OI = block.linears[name].weight_OI()[: arguments.rows]
                x_TI = pause.inputs.reshape(-1, pause.inputs.shape[-1])
                columns, half = x_TI.shape[1], len(x_TI) // 2
                test_II = gathered(x_TI[half:]).matrix_II()
                order = torch.randperm(half, generator=torch.Generator().manual_seed(SEED))
                for bits in arguments.bits:
                    nothing = error(weight_OI, bits, Hessian(columns, x_TI.device), test_II)
                    for share in arguments.shares:
                        tokens = max(1, round(share * columns))
                        if tokens > half:
                            continue
                        stat = gathered(x_TI[order[:tokens].to(x_TI.device)])
                        large = gathered(x_TI[order[:tokens].to(x_TI.device)])
                        for _ in range(16):  # the same second moments, of 65,536 times the tokens
                            large.merge(large)
                        errors = (
                            nothing,
                            error(weight_OI, bits, large, test_II),
                            error(weight_OI, bits, stat, test_II),
                        )
                        found.append((name, bits, columns, tokens, *errors))
                        short = name.rpartition(".")[2]
                        cells = (f"{100 * value:.3f} %" for value in errors)
                        rows.append((short, bits, columns, f"{tokens} ({share:.3g} I)", *cells))
                        print(*rows[-1], file=sys.stderr, flush=True)
    header = ("linear", "bits", "columns I", "tokens", "no data", "as if many", "shrunk")
    shown = (
        f"{table(header, rows)}\n\nRelative squared error of the output on other windows, block "
        f"{arguments.block}, first {arguments.rows} rows, group 64; chain "
        f"{' → '.join(step.method for step in CHAINS['gptq'])}; {arguments.calibration.name}."
    )
    result = {"environment": environment(arguments.threads), "found": found}
    publish("Calibration with few tokens", shown, result, arguments.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
