"""What do GGUF files lose, ours beside llama-quantize's with an importance matrix?

Both start from the same F32 file and the same text: llama-quantize gets the mean squared inputs of
each linear on the windows that our run calibrates on. Both files are read by one reader and scored
in float32 on the same windows of WikiText-2 test. Figures: our KL below the peer's (the upper end
of our interval below the lower end of its), file sizes within 0.5 %, types equal tensor by tensor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import SCRATCH, environment, must, pocketlm, publish, run_child, table
from inputs import Inputs
from losses import score

SIZES = 0.005
PEER = Path(__file__).with_name("peers") / "llama_quantize_run.py"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--mix", nargs="*", default=["Q4_K_M", "Q3_K_M"])
    parser.add_argument("--ours", type=Path, nargs="*", default=[], help="artifacts, one a mix")
    parser.add_argument("--peer-python", default=sys.executable, help="has llama-cpp-python")
    parser.add_argument("--peer", type=Path, nargs="*", default=[], help="its files, one a mix")
    parser.add_argument("--method", nargs="*", default=[], help="further chains of ours, as clip")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def importance(arguments: argparse.Namespace, inputs: Inputs) -> Path:
    """The mean squared input of each linear's columns, under llama.cpp's names, as .npz.

    What the program llama-imatrix gathers: of the original model, all tokens alike.
    """
    import numpy
    import torch
    from transformers import AutoModelForCausalLM

    from pocketlm.models.gguf_names import gguf_names

    tokens_file = inputs.tokens_file(arguments.samples, arguments.seq_len)
    path = SCRATCH / f"imatrix-{tokens_file.stem}.npz"
    if path.exists():
        return path
    model = AutoModelForCausalLM.from_pretrained(inputs.original, dtype=torch.float32)
    model.eval().to(arguments.device)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> None:
        def add(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            squares_I = given[0].detach().double().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, 0) + squares_I

        model.get_submodule(name).register_forward_pre_hook(add)

    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    for name in linears:
        watch(name)
    tokens_NT = torch.from_numpy(numpy.load(tokens_file))
    with torch.inference_mode():
        for tokens_T in tokens_NT:
            model.model(tokens_T[None].to(arguments.device))
    spelled = gguf_names(model.config, [f"{name}.weight" for name in linears])
    count = tokens_NT.numel()
    numpy.savez(
        path,
        **{
            spelled[f"{name}.weight"]: (sums[name] / count).float().cpu().numpy()
            for name in linears
        },
    )
    return path


def export(source: Path, to: str, output: Path) -> Path:
    """A GGUF file of a model or an artifact."""
    output.unlink(missing_ok=True)
    must(run_child(pocketlm("export", source, "--to", to, "-o", output)), f"export to {to}")
    return output


def compress(arguments: argparse.Namespace, inputs: Inputs, mix: str, method: str) -> Path:
    """Our artifact for a mixture."""
    output = SCRATCH / f"gguf-{mix}-{method}"
    must(
        run_child(
            pocketlm(
                "compress", inputs.original, "-o", output, "--scheme", mix, "--method", method,
                "--target", "gguf", "--calibration", inputs.calibration,
                "--samples", arguments.samples, "--seq-len", arguments.seq_len, "--seed", 0,
                "--device", arguments.device, "--threads", arguments.threads, "--restart", "--json",
            )
        ),
        "pocketlm compress",
    )  # fmt: skip
    return output


def quantize(arguments: argparse.Namespace, base: Path, mix: str, matrix: Path) -> Path:
    """The peer's file."""
    output = SCRATCH / f"peer-{mix}.gguf"
    command = [arguments.peer_python, PEER, base, output, mix, "--imatrix", matrix]
    must(run_child([*command, "--threads", str(arguments.threads)]), "llama-quantize")
    return output


def types(path: Path) -> dict[str, int]:
    """Tensor → number of its type."""
    from pocketlm.models.bytes import PositionalFile
    from pocketlm.models.gguf_header import read_header

    return {tensor.name: tensor.kind for tensor in read_header(PositionalFile(path)).tensors}


def main() -> int:
    """Prints the table; exit code 1 where a figure is missed."""
    arguments = parse()
    inputs = Inputs(original=arguments.original)
    inputs.check()
    files: dict[str, dict[str, Path]] = {}
    base, matrix = SCRATCH / "original-f32.gguf", None
    for place, mix in enumerate(arguments.mix):
        if arguments.peer:
            peer = arguments.peer[place]
        else:
            if matrix is None:
                matrix = importance(arguments, inputs)
                export(inputs.original, "gguf:F32", base)
            peer = quantize(arguments, base, mix, matrix)
        made = {"llama-quantize, imatrix": peer}
        artifacts = {"gptq": arguments.ours[place]} if arguments.ours else {}
        for method in ("gptq", *arguments.method):
            artifact = artifacts.get(method) or compress(arguments, inputs, mix, method)
            made[f"ours, {method}"] = export(artifact, "gguf", SCRATCH / f"{artifact.name}.gguf")
        files[mix] = made

    import torch

    from pocketlm.evaluate.quality import evaluate_model
    from pocketlm.models import open_model

    torch.set_num_threads(arguments.threads)
    scores = score(
        inputs.original, inputs.test, arguments.eval_seq_len, arguments.windows, arguments.device
    )
    rows, result, met = [], {"environment": environment(arguments.threads), "mixes": {}}, True
    for mix, made in files.items():
        found, peer = {}, made["llama-quantize, imatrix"]
        for label, path in made.items():
            model = open_model(path, device=arguments.device, compute_dtype=torch.float32)
            found[label] = evaluate_model(model, scores.windows, scores)
            print(f"{mix} {label}: {found[label].seconds:.0f} s", file=sys.stderr)
            divergence = found[label].divergence
            assert divergence is not None, "an original was given"
            loss, kl = divergence.loss_over_original, divergence.kl_mean
            rows.append(
                (mix, label, f"{path.stat().st_size:,}",
                 f"{kl.value:.5f} ({kl.low:.5f}-{kl.high:.5f})",
                 f"{loss.value:.5f} ({loss.low:.5f}-{loss.high:.5f})",
                 f"{divergence.top1_agreement.value:.4f}")
            )  # fmt: skip
        ours, theirs = (found[label].divergence for label in ("ours, gptq", next(iter(made))))
        assert ours is not None
        assert theirs is not None
        size = made["ours, gptq"].stat().st_size / peer.stat().st_size
        other = {n for n, kind in types(peer).items() if types(made["ours, gptq"]).get(n) != kind}
        good = ours.kl_mean.high < theirs.kl_mean.low and abs(size - 1) <= SIZES and not other
        met = met and good
        result["mixes"][mix] = {
            "kl_ratio": ours.kl_mean.value / theirs.kl_mean.value,
            "size_ratio": size,
            "types_that_differ": sorted(other),
            "met": good,
            "reports": {
                label: report.model_dump(mode="json", exclude={"divergence": {"worst_tokens"}})
                for label, report in found.items()
            },
        }
    scores.close()
    header = ("mix", "file", "bytes", "KL (95 %)", "loss over original (95 %)", "top-1")
    said = [
        f"{mix}: KL {one['kl_ratio']:.3f} times the peer's, {one['size_ratio']:.4f} times its "
        f"bytes, {len(one['types_that_differ'])} tensors of another type: "
        f"{'met' if one['met'] else 'missed'}."
        for mix, one in result["mixes"].items()
    ]
    shown = "\n".join([table(header, rows), "", *said])
    publish("GGUF: KL beside llama-quantize", shown, result, arguments.record)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
