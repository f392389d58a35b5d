"""A file like the sarcasm data set's, for tests."""

from __future__ import annotations

import json
from pathlib import Path


def write_headlines(path: Path, count: int) -> Path:
    texts = [f"headline number {i % count}" + " again" * (i % 5) for i in range(count + 3)]
    lines = [
        {"input": [{"content": "?"}, {"content": text}], "ideal": str(i % 2)}
        for i, text in enumerate(texts)
    ]
    path.write_text("\n".join(map(json.dumps, [*lines, *lines[:3]])))
    return path
