import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from matplotlib.image import imread as read_picture

from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.memory.picture_data import COLOURS, one_step, parts_of, stretches, thinned
from qlora_trainer.memory.plots import draw_bars, draw_timeline
from qlora_trainer.memory.report import write_report
from qlora_trainer.memory.report_tables import Pair
from qlora_trainer.units import format_bytes
from tests.memory.models import run_shape, tiny_config


@pytest.fixture(scope="module")
def run():
    card = read_gpu("rtx-3060-12gb")
    simulated = simulate_run(tiny_config("llama"), run_shape(), card)
    return simulated.on(card, budget_bytes=450 * 2**20, with_timeline=True)


@pytest.fixture(scope="module")
def page(run):
    found = run
    tight = replace(found, fits=False)
    return write_report(
        {"one <row>": found, "four rows": tight},
        title="Llama & a card",
        measured_bytes={"four rows": found.reserved_bytes},
    )


def test_a_bar_is_as_long_as_the_total(run):
    assert sum(parts_of(run).values()) == run.total_bytes
    on_windows = replace(run, paged_on_card=True, paged_bytes=1000)
    assert sum(parts_of(on_windows).values()) == on_windows.total_bytes == run.total_bytes + 1000


def test_the_page_is_whole_and_asks_the_network_for_nothing(page):
    assert page.count('class="bar"') == 2
    assert page.count("<polyline") == 2
    assert "one &lt;row&gt;" in page
    assert "Llama &amp; a card" in page
    assert "does not fit" in page
    assert '<meta name="viewport"' in page
    assert "@media print" in page
    assert not re.search(r"https?://|<script|url\(|@import", page)


def test_the_step_shown_is_one_whole_step(run):
    step = one_step(run)
    assert [phase for phase, _, _ in stretches(step)][-1] == "optimizer step"
    assert len([s for s in stretches(step) if s[0] == "optimizer step"]) == 1
    assert max(thinned(step, 50))[0] == max(step)[0]


def test_host_ram_and_disk_stand_on_the_page(run, page):
    for phase in ("rehearsal", "save", "merge"):
        assert f"<span>{phase}</span>" in page
        assert format_bytes(run.host_bytes_by_phase[phase]) in page
    for artefact, size in run.disk_peak_bytes.items():
        assert f"<span>{artefact}</span>" in page
        assert format_bytes(size) in page
    assert format_bytes(run.host_peak_bytes) in page


def test_predicted_stands_beside_measured():
    page = write_report({}, title="t", pairs=[Pair("peak <a>", 2**20, 2**19)])
    assert "peak &lt;a&gt;" in page
    assert "+100.00%" in page


def test_pictures_are_drawn_with_what_was_measured(run, tmp_path):
    draw_bars({"one": run}, tmp_path / "bars.png", title="t", measured_bytes={"one": 2**20})
    draw_timeline(run, tmp_path / "timeline.png", title="t")
    for name in ("bars", "timeline"):
        assert len(colours_of(tmp_path / f"{name}.png")) > 10


def colours_of(picture):
    pixels = read_picture(picture)[..., :3]
    return {tuple(c) for c in (pixels[::7, ::7] * 255).astype(int).reshape(-1, 3).tolist()}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_renders_in_a_browser_without_error_or_network(page, tmp_path, width):
    errors, requests = open_in_browser(page, tmp_path, width)
    assert errors == []
    assert requests == []
    shown = colours_of(tmp_path / "r.png")
    for part in ("base weights", "optimizer states"):
        assert tuple(int(COLOURS[part][i : i + 2], 16) for i in (1, 3, 5)) in shown


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_page_that_errs_or_asks_the_network_is_seen_to(tmp_path):
    bad = '<img src="http://example.org/a.png"><script>nothing.here()</script>'
    errors, requests = open_in_browser(f"<html><body>{bad}</body></html>", tmp_path, 400)
    assert "nothing is not defined" in errors[0]
    assert "http://example.org/a.png" in requests[0]


def open_in_browser(page, folder, width):
    """Console errors, and requests of the page (the browser has some of its own)."""
    file, net = folder / "r.html", folder / "net.json"
    file.write_text(page, encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={net}",
         "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
         f"--screenshot={folder / 'r.png'}", f"--window-size={width},1600", file.as_uri()],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (folder / "r.png").is_file(), done.stderr
    events = net.read_text(encoding="utf-8", errors="replace").splitlines()
    return (
        [line for line in done.stderr.splitlines() if "CONSOLE" in line],
        [line for line in events if re.search(r'"initiator":"(file:|null)[^\n]*"url":"http', line)],
    )
