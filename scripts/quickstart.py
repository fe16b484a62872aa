"""From a clone to a trained adapter: a real model in 4 bits learns real data.

    python scripts/quickstart.py [--restart]

Makes `.venv`, brings SmolLM2-135M-Instruct and human-rated film reviews, shows the data gate,
trains by `profiles/quickstart.yaml`, reports what was learned (held-out loss, accuracy and sample
answers, before and after), and merges the adapter into a checkpoint proven to equal it. A second
run finds everything done and only reports again; an interrupted training goes on where it stopped.
The run folder is `runs/quickstart`. Standard library only: what needs torch runs as a program of
`.venv`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from assets import prepare_assets
from environment import prepare_environment
from steps import REPOSITORY, Stop, run_step, say, seconds_in_words, stop_with_message

PROFILE = Path("profiles") / "quickstart.yaml"
RUN_FOLDER = REPOSITORY / "runs" / "quickstart"
MERGED = REPOSITORY / "runs" / "quickstart-merged"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",  # everything is on disk by now
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


def quickstart(*, restart: bool) -> dict[str, float]:
    """Run every step and return the seconds of each.

    Raises:
        Stop: A step failed.
    """
    seconds = {}
    began = time.monotonic()
    python = prepare_environment(("gguf",))
    seconds["install"] = time.monotonic() - began
    began = time.monotonic()
    prepare_assets(python)
    seconds["assets"] = time.monotonic() - began

    qlora: list[str | Path] = [python, "-m", "qlora_trainer"]
    seconds["check"] = run_step(
        "Looking at the data before training", [*qlora, "check", PROFILE], environment=SETTINGS
    )
    if (RUN_FOLDER / "result.json").is_file() and not restart:
        say(f"\nTrained already: {RUN_FOLDER}. With --restart it is trained anew.")
    else:
        seconds["train"] = run_step(
            "Training a QLoRA adapter",
            [*qlora, "train", PROFILE, *(["--restart"] if restart else [])],
            environment=SETTINGS,
            advice="An interrupted training is resumed by the same command.",
        )
    report = RUN_FOLDER / "film-reviews.json"
    seconds["compare"] = run_step(
        "Comparing the answers before and after",
        [python, REPOSITORY / "scripts" / "film_reviews.py", RUN_FOLDER, "--json", report],
        environment=SETTINGS,
    )
    seconds["export"] = run_step(
        "Merging the adapter into an fp16 checkpoint, and proving it",
        [*qlora, "export", RUN_FOLDER, "--out", MERGED, "--overwrite"],
        environment=SETTINGS,
    )
    (RUN_FOLDER / "quickstart-seconds.json").write_text(
        json.dumps(seconds, indent=2) + "\n", encoding="utf-8"
    )
    return seconds


def main() -> int:
    """Command line: the quickstart."""
    parser = argparse.ArgumentParser(description="From a clone to a trained adapter.")
    parser.add_argument("--restart", action="store_true", help="train anew")
    try:
        seconds = quickstart(restart=parser.parse_args().restart)
    except Stop as error:
        return stop_with_message(error)
    after_install = sum(seconds.values()) - seconds["install"]
    say(
        f"\nInstall {seconds_in_words(seconds['install'])}, "
        f"everything after it {seconds_in_words(after_install)}.\n"
        f"The adapter and all that belongs to the run: {RUN_FOLDER}\n"
        f"The merged checkpoint, for any program that reads transformers': {MERGED}\n"
        f"Ask it something: {venv_command()} generate runs/quickstart 'Name a fruit.' --compare"
    )
    return 0


def venv_command() -> str:
    """How the installed command is called from the repository's root."""
    return r".venv\Scripts\qlora" if sys.platform == "win32" else ".venv/bin/qlora"


if __name__ == "__main__":
    sys.exit(main())
