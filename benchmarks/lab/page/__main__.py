"""docs/results/benchmarks.md, CSV files of the suite's figures, and the README's figure, from the stored results.

    python -m benchmarks.lab.page [--check]

reads benchmarks/results alone. ``--check`` says whether page and CSV files are up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common.tables import write_text


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.lab.page import headline, page

    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not up to date")
    args = parser.parse_args(argv)
    texts = {page.PAGE: page.page(page.RESULTS)}
    texts |= {file.with_suffix(".csv"): page.suite_csv(file) for file in sorted(page.RESULTS.glob("*/suite*.json"))}
    if args.check:
        old = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
        print("\n".join(f"{path} is not up to date" for path in old) or "all are up to date")
        return int(bool(old))
    for written in (*(write_text(path, text) for path, text in texts.items()), *headline.draw(page.RESULTS)):
        print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
