"""The console script's start. It lies beside the package, since importing that raises where an environment variable is wrong."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from stablelora_kernels.cli import main as command_line
    except ValueError as error:
        print(f"stablelora-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return command_line()
