"""docs/results/benchmarks.md and the README's figure from the stored results.

    python -m benchmarks.lab.page [--check]

writes the page and its plots from benchmarks/results alone. ``--check`` says whether the page is up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from benchmarks.common.tables import write_text


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.lab.page import headline, page, plots

    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not up to date")
    args = parser.parse_args(argv)
    path, text = page.PAGE, page.page(page.RESULTS)
    if args.check:
        current = path.is_file() and path.read_text(encoding="utf-8") == text
        missing = [
            name for name in re.findall(r"\]\((\.\./_static/[^)]*)\)", text) if not (path.parent / name).is_file()
        ]
        print(f"{path} is {'' if current else 'not '}up to date; plots missing: {', '.join(missing) or 'none'}")
        return int(not current or bool(missing))
    write_text(path, text)
    for written in (path, *plots.draw(page.RESULTS), *headline.draw(page.RESULTS)):
        print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
