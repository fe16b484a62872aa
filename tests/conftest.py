"""Shared fixtures: the real small model and data, brought once by `scripts/assets.py`."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M-Instruct checkpoint (bf16, several shards)."""
    folder = REPOSITORY / ".cache" / "models" / "smollm2"
    if not (folder / "config.json").is_file():
        pytest.fail("the test model is missing; run `python scripts/test.py`, which brings it")
    return folder
