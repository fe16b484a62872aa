import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.memory.report import parts_of, write_report
from tests.memory.models import run_shape, tiny_config


@pytest.fixture(scope="module")
def page():
    card = read_gpu("rtx-3060-12gb")
    run = simulate_run(tiny_config("llama"), run_shape(), card)
    found = run.on(card, with_timeline=True)
    tight = replace(found, fits=False)
    return write_report(
        {"one <row>": found, "four rows": tight},
        title="Llama & a card",
        measured_bytes={"four rows": found.reserved_bytes},
    )


def test_a_bar_is_as_long_as_the_total():
    card = read_gpu("rtx-3060-12gb")
    found = simulate_run(tiny_config("llama"), run_shape(), card).on(card)
    assert sum(parts_of(found).values()) == found.total_bytes


def test_the_page_is_whole_and_asks_the_network_for_nothing(page):
    assert page.count("<svg") == 2
    assert "one &lt;row&gt;" in page
    assert "Llama &amp; a card" in page
    assert "does not fit" in page
    assert not re.search(r"https?://|<script|url\(", page)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_renders_in_a_browser(page, tmp_path):
    file, picture = tmp_path / "report.html", tmp_path / "report.png"
    file.write_text(page, encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={picture}",
         "--window-size=420,1400", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert picture.is_file(), done.stderr
    assert picture.stat().st_size > 10_000
