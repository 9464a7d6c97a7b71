"""Paths of the repository and of the shared data next to it."""

import gzip
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def real_rows(name: str) -> list[dict]:
    """Rows of a set of the shared data; the test is skipped where it is not there."""
    path = SHARED / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"real data is not here: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
