"""The README's tables are what was measured and declared, not what someone typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def test_the_readme_shows_the_recorded_numbers() -> None:
    command = [sys.executable, "scripts/readme_tables.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tables_of_exports_show_ratios_and_the_load_they_were_measured_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tables import common, export

    figures = {
        "positions": 90.0, "reference_perplexity": 2.5, "export_perplexity": 2.6, "mean_kl": 1e-3,
        "top1_agreement": 0.99, "relative_difference": 0.01,
    }  # fmt: skip
    jobs = {
        "copy": {"seconds": 2.0, "peak_private_bytes": 1e6, "cores_busy_elsewhere": 0.1},
        "original": {"seconds": 3.0, "peak_private_bytes": 66e6, "cores_busy_elsewhere": 0.4,
                     "seconds_of_rounds": [4.0, 3.0]},
    }  # fmt: skip
    found = {
        "7b": {"jobs": jobs},
        "proof": {
            "base": {"name": "tiny"}, "adapter": {"rank": 8}, "dtype": "fp16", "kept": "original",
            "rows": {"positions": 90, "from": "held-out rows"}, "transformers": "5",
            "ways": {"original": {"native": figures, "fp32": figures}},
        },
    }  # fmt: skip
    (tmp_path / "export.json").write_text(json.dumps(found))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    speed = export.export_speed()
    assert "| 7B: merging onto original | 3.0 s (4.0) | 1.50 | 66 MB |" in speed
    assert "in brackets the others" in speed
    assert "0.1 to 0.4 of the cores busy" in speed
    proof = export.export_proof()
    assert "| same most likely token | 99.00% | 99.00% |" in proof
    assert "90 positions of held-out rows" in proof


def test_the_table_of_tasks_says_random_weights_seeds_and_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tables import common, tasks

    case = {
        "task": "seq2seq-lm", "model": "t5", "weights": "random", "data": "django-en-de",
        "means": {"chrf": {"before": 1.0, "ours": 30.0, "peft": 40.0},
                  "bleu": {"before": 0.0, "ours": 9.96, "peft": 9.0}},
        "trained_share": 0.25, "seconds": 90.0, "runs": [{}, {}],
    }  # fmt: skip
    found = {"translation": case, "pictures": {"skipped": "no pictures here"}}
    (tmp_path / "tasks.json").write_text(json.dumps(found))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    table = tasks.tasks()
    assert "t5, random weights; django-en-de; mean of 2 seeds | chrF | 1.0 | 30.0 | 40.0" in table
    assert "| BLEU | 0.0 | 10.0 | 9.0 |" in table
    assert "25.0% | 1.5 |" in table
    assert "ours over PEFT's is 0.750" in table
    assert "`pictures` is not there: no pictures here." in table
