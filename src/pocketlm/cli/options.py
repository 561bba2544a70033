"""The flags, each written once: verbs name them as the types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_RECIPE, _DATA, _MACHINE = "What to do", "Calibration", "Machine and files"
_TASKS = "Tasks"

Source = Annotated[
    str,
    typer.Argument(
        help="A directory, a hub id, a .gguf file, or smollm2-135m.", show_default=False
    ),
]
Model = Annotated[
    str,
    typer.Argument(help="A compressed artifact, or any model source.", show_default=False),
]
Models = Annotated[
    list[str], typer.Argument(help="Artifacts or models, two or more.", show_default=False)
]
Artifact = Annotated[
    Path, typer.Argument(help="A directory that compress wrote.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", "--output_dir", help="Where the artifact goes.", show_default=False
    ),
]

# What to do
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="A preset or a YAML file.", rich_help_panel=_RECIPE),
]
Method = Annotated[
    str | None,
    typer.Option("--method", help="See `pocketlm methods`.", rich_help_panel=_RECIPE),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        help="W2A16 … W8A16, NVFP4, MXFP4, FP8_BLOCK, NF4, Q4_K_M …: see docs/methods.md.",
        rich_help_panel=_RECIPE,
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        help="4: bits of every code, 2 to 8. 3.5 or 4.0: budget of real bits a weight, scales "
        "counted, spent where they matter.",
        rich_help_panel=_RECIPE,
    ),
]
BudgetBits = Annotated[
    str | None,
    typer.Option(
        "--bits", help="Budget: average real bits of the linears, such as 3.5, scales counted."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        help="Budget: bytes of the weight files, such as 90MB, spent where they matter.",
        rich_help_panel=_RECIPE,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        "--group_size",
        help="Columns that share a scale; -1: the whole row.",
        rich_help_panel=_RECIPE,
    ),
]
Sym = Annotated[
    bool, typer.Option("--sym", help="Symmetric grid (the default).", rich_help_panel=_RECIPE)
]
Asym = Annotated[
    bool, typer.Option("--asym", help="Grid with a zero point.", rich_help_panel=_RECIPE)
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        help="Prune: 0.5, a share of zeros, or N:M such as 2:4. Alone: sparsegpt, values stay "
        "floats; with --scheme or --bits: before quantization.",
        rich_help_panel=_RECIPE,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        help="Leave these alone: a name, Linear, re:… or a glob; repeatable.",
        rich_help_panel=_RECIPE,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        help="The engine that will load it: transformers, vllm, llama.cpp (or gguf), pocketlm.",
        rich_help_panel=_RECIPE,
    ),
]

# Calibration
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        "--dataset",
        help="builtin, a .txt/.jsonl/.parquet file, hf:org/name, or self: the model writes it.",
        rich_help_panel=_DATA,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", "--nsamples", min=1, help="How many windows.", rich_help_panel=_DATA),
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", "--seqlen", min=2, help="Tokens of a window.", rich_help_panel=_DATA),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the sampled windows.", rich_help_panel=_DATA)]

# Machine and files
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:1.", rich_help_panel=_MACHINE),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Of the tensors that are kept: float32, bfloat16, float16; default: as they are.",
        rich_help_panel=_MACHINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads; default: all.", rich_help_panel=_MACHINE),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        help="Where unfinished work lies; default: OUTPUT.pocketlm-work.",
        rich_help_panel=_MACHINE,
    ),
]
ActivationBudget = Annotated[
    str | None,
    typer.Option(
        "--activation-budget",
        help="Memory for calibration activations, such as 4GiB; the rest goes to disk.",
        rich_help_panel=_MACHINE,
    ),
]
SearchMinutes = Annotated[
    float | None,
    typer.Option(
        "--search-minutes",
        min=0,
        help="What measuring where bits matter may take, beyond one KL a layer; default: 30.",
        rich_help_panel=_MACHINE,
    ),
]
SearchDir = Annotated[
    Path | None,
    typer.Option(
        "--search-dir",
        help="Where its findings are kept for every later budget; default: the user's cache.",
        rich_help_panel=_MACHINE,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on where a run stopped (default).", rich_help_panel=_MACHINE),
]
Restart = Annotated[
    bool,
    typer.Option("--restart", help="Throw away what is there.", rich_help_panel=_MACHINE),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel=_MACHINE),
]
LogFile = Annotated[
    Path | None,
    typer.Option("--log-file", help="Append every event here.", rich_help_panel=_MACHINE),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=_MACHINE),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Of a hub model.", rich_help_panel=_MACHINE),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python files that come with the model.",
        rich_help_panel=_MACHINE,
    ),
]

RecipeFile = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Where the recipe goes, a .yaml file.", show_default=False),
]

# Evaluation
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        help="Where findings are kept; default: the user's cache.",
        rich_help_panel=_MACHINE,
    ),
]
Against = Annotated[str | None, typer.Option("--against", help="The original.", show_default=False)]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="builtin, a .txt/.jsonl/.parquet file, or hf:org/name; default: the builtin text's "
        "evaluation half.",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", "--samples", "--nsamples", min=1, help="Windows at most.")
]
EvalSeqLen = Annotated[
    int, typer.Option("--seq-len", "--seqlen", min=2, help="Tokens of a window.")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Tasks of lm-eval, such as hellaswag,piqa,arc_easy,gsm8k; needs pocketlm[eval].",
        rich_help_panel=_TASKS,
    ),
]
TaskDir = Annotated[
    Path | None,
    typer.Option(
        "--task-dir",
        help="YAML files that define them, such as benchmarks/tasks; default: lm-eval's own, "
        "which come from the hub.",
        rich_help_panel=_TASKS,
    ),
]
TaskData = Annotated[
    Path | None,
    typer.Option(
        "--task-data",
        help="Directory of the data files that the YAML files name.",
        rich_help_panel=_TASKS,
    ),
]
Items = Annotated[
    int | None,
    typer.Option("--items", min=1, help="Of each task at most.", rich_help_panel=_TASKS),
]
Margin = Annotated[
    float,
    typer.Option(
        "--margin",
        min=0.0,
        help="The loss of a task's score that is tolerated.",
        rich_help_panel=_TASKS,
    ),
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        help="A bound such as 'kl<0.05', 'top1>=0.9', 'perplexity_ratio<1.01' or "
        "'hellaswag_change>-0.02'; repeatable. The far end of the 95 % interval decides: exit code "
        "4 where a gate fails, 5 where the interval holds the bound.",
        show_default=False,
    ),
]
Speed = Annotated[
    bool, typer.Option("--speed/--no-speed", help="Measure tokens/s and memory as well.")
]

# Generation
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")
]
DrawSeed = Annotated[int, typer.Option("--seed", help="Of what is drawn at a temperature.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
]
