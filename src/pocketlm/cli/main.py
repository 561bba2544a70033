"""The entry point: finds the verb, imports only that one, and turns its end into an exit code.

Exit codes: 0 done; 1 a bug of ours; 2 an input or artifact that the user must change; 3 memory,
disk or numerics gave out during the work; 4 a gate failed, 5 a gate is inconclusive (`eval
--gate`); 130 stopped with Ctrl-C.
`pocketlm --help` imports no verb and no torch.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from pocketlm.cli import failures, interrupt, output
from pocketlm.core.errors import ConfigError, nearest

VERBS: dict[str, str] = {
    "inspect": "What is in a model: blocks, groups, folds, sizes, what would be left out.",
    "plan": "What compressing would cost and give: bytes, memory, disk, time.",
    "compress": "Compress a model. Resumes by itself.",
    "search": "Where bits matter: the best grid for each layer within a budget.",
    "export": "Write an artifact in another form, such as a dense checkpoint.",
    "verify": "Prove that an artifact is whole and loads as it should.",
    "eval": "Perplexity, and the divergence from the original.",
    "compare": "Evaluate several models on the same text.",
    "bench": "How fast a model runs here, beside what the machine allows.",
    "roofline": "What a device allows: the bound of each operator, from config.json alone.",
    "bisect": "Which layers hurt most, and what keeping them would cost.",
    "report": "The before/after table and report.html of an artifact.",
    "generate": "Answer one prompt.",
    "chat": "Talk to a model.",
    "serve": "Answer OpenAI's clients, with a page to chat.",
    "methods": "The methods and their options.",
    "doctor": "What this machine has, and which kernels run on it.",
}

# typer does not name its usage errors in public; this is what all of them derive from.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit code.
    """
    as_json = "--json" in arguments
    verb = arguments[0] if arguments and not arguments[0].startswith("-") else None
    try:
        answer = _call(verb, arguments, as_json)
        if answer is None:  # --help, --version
            return 0
        return output.emit(answer, as_json)
    except BrokenPipeError:  # `pocketlm … | head`: nobody listens any more
        sys.stderr.close()
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return failures.report_interrupt(verb, as_json)
    except UsageError as error:
        return failures.report(_as_config_error(error, verb), as_json)
    except Exception as error:
        return failures.report(error, as_json)


def _call(verb: str | None, arguments: Sequence[str], as_json: bool) -> output.Answer | None:
    if verb is not None and verb not in VERBS:
        raise ConfigError(f"unknown verb '{verb}'.", where="pocketlm", remedy=nearest(verb, VERBS))
    # With --json, standard output belongs to the answer: what libraries print goes to stderr.
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with interrupt.twice_exits(), quiet:
        result = _app(verb)(list(arguments), prog_name="pocketlm", standalone_mode=False)
    if result == interrupt.EXIT_CODE:  # newer typer turns Ctrl-C into this
        raise KeyboardInterrupt
    return result if isinstance(result, output.Answer) else None


def _app(verb: str | None) -> typer.Typer:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
    )
    app.callback()(_root)
    for name, line in VERBS.items():
        if name == verb:
            module = importlib.import_module(f"pocketlm.cli.{name}")
            app.command(name)(module.run)
        else:
            app.command(name, help=line)(_not_imported)
    return app


def _not_imported() -> None:
    """Stands in the list of verbs for those not called."""


def _version(wanted: bool) -> None:
    if wanted:
        from pocketlm import __version__

        typer.echo(f"pocketlm {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compress a language model, in the format your engine loads, with the measurements.

    Start with: [bold]pocketlm compress Qwen/Qwen3-8B -o out[/bold]
    """


def _as_config_error(error: Any, verb: str | None) -> ConfigError:
    command = "pocketlm" if verb is None else f"pocketlm {verb}"
    return ConfigError(error.format_message(), where=command, remedy=f"See `{command} --help`.")


if __name__ == "__main__":
    main()
