"""The README's tables are what was measured and declared, not what someone typed."""

import subprocess
import sys

from tests.conftest import REPOSITORY


def test_the_readme_shows_the_recorded_numbers() -> None:
    command = [sys.executable, "scripts/readme_tables.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
