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
    gguf = {
        "llama_cpp_python": "0.3", "texts": 9, "new_tokens": 8, "same_ids": 8, "same_answers": 6,
        "partings": [{"logit_gap": 0.01}, {"logit_gap": 0.02}],
    }  # fmt: skip
    (tmp_path / "export.json").write_text(json.dumps(found))
    (tmp_path / "llama_cpp.json").write_text(json.dumps(gguf))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    speed = export.export_speed()
    assert "| 7B: merging onto original | 3.0 s (4.0) | 1.50 | 66 MB |" in speed
    assert "in brackets the others" in speed
    assert "0.1 to 0.4 of the cores busy" in speed
    proof = export.export_proof()
    assert "| same most likely token | 99.00% | 99.00% |" in proof
    assert "90 positions of held-out rows" in proof
    assert "token ids for 8 of 9 texts" in proof
    assert "of 8 tokens for 6 of 8; where they part" in proof
    assert "at most 0.02 apart" in proof


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


def test_the_table_of_faults_says_what_was_left_out_and_what_did_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tables import common, trust

    tally = {"injected": 9, "survived": 8, "steps_lost": 7, "most_steps_lost": 2, "left_with": {}}
    chaos = {
        "faults": {"kill": tally, "one-of-two": tally}, "corrupted": {"trainer.json, emptied": 3},
        "skipped": {"disk-full": "needs the right to mount"}, "failures": ["x"], "resumes": 17,
        "rounds": {"1": 2, "2": 1}, "bits_different": 0, "bits_compared": 3000, "minutes": 61.2,
        "runs": {"1": {"model": "smollm2"}, "2": {"model": "tiny"}},
    }  # fmt: skip
    window = {"passed": False, "stopped": "no wheel", "tests": ["a", "b"], "versions": {}}
    memory = {
        "lengths": 7, "at_known_lengths": {"steps": 50, "bytes_per_step": -300.0},
        "after_warm_up": {"steps": 240, "last_quarter_bytes": 7.1e8, "growth": 0.0021},
    }  # fmt: skip
    (tmp_path / "window-oldest.json").write_text(json.dumps(window))
    (tmp_path / "quickstart.json").write_text(json.dumps({}))
    (tmp_path / "soak-memory.json").write_text(json.dumps(memory))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert trust.trust().startswith("- **Memory**")
    (tmp_path / "chaos.json").write_text(json.dumps(chaos))
    table = trust.trust()
    assert "| killed (SIGKILL) | 9 | 8 | 7 | 2 |" in table
    assert "| one of two processes killed | 9 |" in table
    assert "61 minutes of smollm2 and tiny (2 processes): 18 faults, 1 not survived;" in table
    assert "17 resumptions, 3 runs brought to their end;" in table
    assert "of their adapters' 3,000 bits 0 differ from runs left alone." in table
    assert "Left out: disk-full, needs the right to mount." in table
    assert (
        "over 240 steps of batches of 7 lengths the trainer's resident memory, what stays for the "
        "next step in it, was 710 MB in the last quarter, +0.21% on the second quarter's; -0.3 kB "
        "a step over the 50 whose" in table
    )
    assert "2 test files DO NOT pass (no wheel)" in table
    assert "Fuzzing" not in table
    assert "Bad inputs" not in table


def test_the_table_of_attention_shows_speed_spread_and_the_distance_from_fp64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tables import attention, common

    figures = {
        "seconds": {"ours": 0.0125, "torch": 0.02}, "times_faster": 1.6, "spread": [1.5, 1.7],
        "error": {"ours": 0.004, "torch": 0.007},
    }  # fmt: skip
    found = {"dtype": "bf16", "threads": 2, "repeats": 15, "shapes": {"tiny, 1 x 8": figures}}
    (tmp_path / "attention.json").write_text(json.dumps(found))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    table = attention.attention()
    assert "| tiny, 1 x 8 | 12.5 ms (0.40%) | 20.0 ms (0.70%) | 1.60 (1.50 to 1.70) |" in table
    assert "bf16, 2 threads: medians of 15 calls" in table


def test_the_sentence_on_loading_is_there_before_and_after_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tables import common, step

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert "not been measured yet" in step.load()
    seconds = {"bitsandbytes": 50.0, "quantize": 10.0, "first": 12.0, "second": 2.0}
    found = {
        "threads": 2, "quantized_weights": 968_884_224, "seconds": seconds,
        "seconds_of_rounds": {way: [took] * 3 for way, took in seconds.items()},
    }  # fmt: skip
    (tmp_path / "load.json").write_text(json.dumps(found))
    said = step.load()
    assert "1.0 billion quantized weights is loaded on 2 cores in 10.0 s" in said
    assert "alone: 50.0 s" in said
    assert "the first time in 12.0 s, then in 2.0 s. Medians of 3 rounds." in said
