"""How much memory does a model of 8 billion parameters take, and does `plan` know it beforehand?

Writes a Llama-3-8B-shaped checkpoint (bfloat16, 32 blocks, untied head, 16 GB; random weights),
runs `pocketlm plan` and `pocketlm compress` in child processes, and reads VmHWM of the process
tree. Figure: RTN of all 32 blocks in at most 3 GiB.
With --gptq-blocks N the checkpoint has N such blocks and GPTQ runs on them: the peak must lie
within 20 % of what `plan` predicted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from harness import SCRATCH, environment, must, pocketlm, publish, run_child, table
from synthetic import Shape, write_llama

FIGURE_GIB = 3.0
TOLERANCE = 0.2
GIB = 2**30


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=SCRATCH / "llama-3-8b-shaped")
    parser.add_argument("--blocks", type=int, default=32, help="of the RTN run; 0 leaves it out")
    parser.add_argument("--gptq-blocks", type=int, default=0, help="of the GPTQ run")
    parser.add_argument("--samples", type=int, default=8, help="GPTQ calibration windows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and artifact on disk")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, method: str, blocks: int) -> dict[str, float | str]:
    """Writes the checkpoint, predicts, compresses, cleans up.

    Returns:
        Figures of the run; GiB and seconds.
    """
    shape = Shape(blocks=blocks)
    directory = arguments.directory.with_name(f"{arguments.directory.name}-{blocks}")
    output = directory.with_name(directory.name + f"-{method}")
    # the checkpoint, then finished blocks and the shards made of them: a third of it each at most
    needed = int(shape.bytes_stored() * 1.8)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(SCRATCH).free
    if free < needed:
        raise SystemExit(f"{SCRATCH}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")
    print(f"writing {shape.bytes_stored() / 1e9:.1f} GB to {directory}", file=sys.stderr)
    write_llama(directory, shape)
    shutil.rmtree(output, ignore_errors=True)
    settings = ["--method", method, "--bits", "4", "--group-size", str(arguments.group_size)]
    settings += ["--threads", str(arguments.threads), "--device", "cpu"]
    if method == "gptq":
        settings += ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]
    pinned = {"OMP_NUM_THREADS": str(arguments.threads)}
    plan = must(run_child(pocketlm("plan", directory, *settings, "--json"), pinned), "plan")
    planned = float(plan.last_json()["peak_ram_bytes"])
    print(f"planned {planned / GIB:.2f} GiB; compressing", file=sys.stderr)
    command = pocketlm("compress", directory, "-o", output, *settings, "--restart", "--json")
    finished = must(run_child(command, pinned), "compress")
    said = finished.last_json()
    stored = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if not arguments.keep:
        shutil.rmtree(output)
        shutil.rmtree(directory)
    return {
        "method": method,
        "blocks": blocks,
        "checkpoint_gib": shape.bytes_stored() / GIB,
        "artifact_gib": stored / GIB,
        "peak_gib": finished.peak_bytes / GIB,
        "planned_gib": planned / GIB,
        "said_gib": float(said["peak_ram_bytes"]) / GIB,
        "seconds": finished.seconds,
    }


def main() -> int:
    """Exit code 1 where a figure is missed."""
    arguments = parse()
    runs, verdicts = [], []
    if arguments.blocks:
        run = measure(arguments, "rtn", arguments.blocks)
        met = float(run["peak_gib"]) <= FIGURE_GIB
        verdicts.append(met)
        run["verdict"] = f"at most {FIGURE_GIB} GiB: {'met' if met else 'missed'}"
        runs.append(run)
    if arguments.gptq_blocks:
        run = measure(arguments, "gptq", arguments.gptq_blocks)
        off = float(run["peak_gib"]) / float(run["planned_gib"]) - 1
        verdicts.append(abs(off) <= TOLERANCE)
        run["verdict"] = (
            f"{off:+.0%} of the plan, 20 % allowed: {'met' if verdicts[-1] else 'missed'}"
        )
        runs.append(run)
    header = ("run", "checkpoint GiB", "artifact GiB", "peak GiB", "planned GiB", "s", "figure")
    rows = [
        (f"{run['method']}, {run['blocks']} blocks", f"{run['checkpoint_gib']:.2f}",
         f"{run['artifact_gib']:.2f}", f"{run['peak_gib']:.2f}", f"{run['planned_gib']:.2f}",
         f"{run['seconds']:.0f}", run["verdict"])
        for run in runs
    ]  # fmt: skip
    shown = f"{table(header, rows)}\n\nPeak: VmHWM of the process tree."
    if arguments.gptq_blocks:
        shown += f" GPTQ with {arguments.samples} windows of {arguments.seq_len} tokens."
    result = {"environment": environment(arguments.threads), "runs": runs}
    publish("Memory of a Llama-3-8B-shaped model", shown, result, arguments.record)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
