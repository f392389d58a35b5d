"""docs/benchmarks.md from all stored results.

    python -m benchmarks.lab.page [--check]

writes the page and its plots out of benchmarks/results alone. ``--check`` says whether the page is the one of what is stored.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.tables import write_text


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.lab.page import page as report_page

    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.page", description=(__doc__ or "").split(":")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if the page is not up to date"
    )
    args = parser.parse_args(argv)
    path = report_page.PAGE
    if args.check:
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            text = report_page.page(report_page.RESULTS, Path(directory)).replace(
                Path(directory).name, "_static/benchmarks"
            )
        current = path.is_file() and path.read_text(encoding="utf-8") == text
        missing = [name for name in re.findall(r"\]\((_static/[^)]*)\)", text) if not (path.parent / name).is_file()]
        print(
            f"{path} is {'as' if current else 'not as'} stored results have it; plots missing: {', '.join(missing) or 'none'}"
        )
        return int(not current or bool(missing))
    write_text(path, report_page.page(report_page.RESULTS, path.parent / "_static" / "benchmarks"))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
