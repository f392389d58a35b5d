"""The command line, ``stablelora-kernels``: one module a command. ``import stablelora_kernels``
imports none of it.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType

from stablelora_kernels._version import __version__
from stablelora_kernels.cli import doctor
from stablelora_kernels.cli.common import CommandError, Report, failing
from stablelora_kernels.dispatch.settings import check_environment

PROGRAM = "stablelora-kernels"
# Each has HELP, a docstring that describes it, add_arguments(parser) and run(args, report) -> exit
# status.
COMMANDS: dict[str, ModuleType] = {
    "doctor": doctor,
}


def _wrapped(description: str) -> str:
    """Each paragraph of a description, wrapped to the terminal's width. argparse would join them."""
    wide = max(shutil.get_terminal_size().columns - 2, 11)
    return "\n\n".join(
        textwrap.fill(" ".join(part.split()), wide) for part in description.split("\n\n")
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Fused LoRA layers and the Stable-LoRA optimizer: checks from the command line.",
        epilog=f"'{PROGRAM} COMMAND --help' has a command's options. "
        "Exit status: 0 done, 1 tried and failed, 2 can't be tried, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )
    for name, module in COMMANDS.items():
        options = {"help": module.HELP, "description": _wrapped(module.__doc__ or "")}
        command = commands.add_parser(
            name, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, the process's own unless given, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # A question mark in place of what the terminal does not know, such as ‖, and of lone
        # surrogates in file names.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    running = PROGRAM
    try:
        with failing(ValueError):
            check_environment()
        args = _parser().parse_args(argv)
        running, report = f"{PROGRAM} {args.command}", Report(args.json)
        status: int = COMMANDS[args.command].run(args, report)
        report.finish()
        sys.stdout.flush()
        return status
    except SystemExit as exit_:
        # --help, --version or a usage error, which argparse has told.
        return int(exit_.code or 0)
    except (CommandError, PermissionError) as error:
        print(f"{running}: error: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    except KeyboardInterrupt:
        print(f"{running}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read this has enough, as "| head" has. Python would complain again as it closes
        # stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
