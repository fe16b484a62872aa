"""Write the README's tables from what was measured and declared, so that none is written by hand.

    python scripts/readme_tables.py [--check]

Every `<!-- table: NAME -->` ... `<!-- end table -->` of the README is filled from the settings'
declarations or from the JSON files in `scripts/results/`, which the benchmarks write; who fills
which stands in `TABLES`, one file of `scripts/tables/` a subject. `--check` changes nothing and
fails where the README differs; a test runs it. Needs the package installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tables.attention import attention, attention_fp32
from tables.export import export_proof, export_speed
from tables.fits import fits
from tables.head import head_fp32
from tables.lengths import lengths
from tables.memory import memory, profile_cost
from tables.quickstart import quickstart
from tables.settings import settings
from tables.step import load, step, step_ablation, step_alone, step_fp32
from tables.tasks import tasks
from tables.trust import trust

README = Path(__file__).resolve().parents[1] / "README.md"

TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "quickstart": quickstart,
    "fits": fits,
    "lengths": lengths,
    "memory": memory,
    "profile-cost": profile_cost,
    "step": step,
    "step-fp32": step_fp32,
    "step-ablation": step_ablation,
    "step-alone": step_alone,
    "load": load,
    "attention": attention,
    "attention-fp32": attention_fp32,
    "head-fp32": head_fp32,
    "tasks": tasks,
    "trust": trust,
    "export-proof": export_proof,
    "export-speed": export_speed,
}


def filled(readme: str) -> str:
    """The README with every table made anew.

    Raises:
        KeyError: The README asks for a table nobody makes.
    """

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end table -->)"
    return re.sub(pattern, fill, readme, flags=re.S)


def main() -> int:
    """Command line: write, or check."""
    parser = argparse.ArgumentParser(description="Fill the README's tables.")
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if before == after:
        return 0
    if check:
        print("README.md is not what scripts/readme_tables.py makes; run it", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
