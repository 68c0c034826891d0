"""Right values of statistics, computed by other libraries."""

import gzip
import json

import pytest


@pytest.fixture(scope="session")
def expected(data_dir):
    """Groups of inputs and right values; each names the library that computed it."""
    return json.loads((data_dir / "feedback" / "expected.json").read_text())


@pytest.fixture(scope="session")
def pandalm(data_dir):
    """Pairs of responses with three human labels: 0 for a tie, else the better one, 1 or 2."""
    with gzip.open(data_dir / "labels" / "pandalm_3annotators.jsonl.gz") as file:
        return [json.loads(line) for line in file]
