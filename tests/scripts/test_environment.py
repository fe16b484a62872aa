import re
import sys
import tomllib

import environment
import pytest
from environment import (
    CONSTRAINTS,
    CONTAINED,
    has_working_pip,
    pinned_version,
    read_stamp,
    request_digest,
    with_contained,
    write_stamp,
)
from steps import REPOSITORY, Stop, run_step


def test_a_finished_install_is_remembered_with_its_extras(tmp_path):
    assert read_stamp(tmp_path) == ("", frozenset())
    write_stamp(tmp_path, "abc", {"dev"})
    assert read_stamp(tmp_path) == ("abc", frozenset({"dev"}))


@pytest.mark.parametrize("content", ["", "[]", '{"digest": "abc"}', "\x00\x00"])
def test_a_damaged_stamp_is_not_trusted(tmp_path, content):
    (tmp_path / "qlora-install.json").write_text(content)
    assert read_stamp(tmp_path) == ("", frozenset())


def test_a_changed_pin_asks_for_a_new_install(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]")
    pins = tmp_path / "scripts" / "constraints.txt"
    pins.write_text("torch==2.13.0\n")
    first = request_digest(tmp_path)
    assert request_digest(tmp_path) == first
    pins.write_text("torch==2.13.1\n")
    assert request_digest(tmp_path) != first


def test_a_half_made_environment_is_not_taken_for_one(tmp_path):
    assert has_working_pip(environment.Path(sys.executable))
    assert not has_working_pip(tmp_path / "bin" / "python")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/false\n")
    broken.chmod(0o755)
    assert not has_working_pip(broken)


def test_the_extra_that_holds_others_is_described_as_in_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    inside = re.search(r"qlora-trainer\[(.+?)\]", str(project["optional-dependencies"]["dev"]))
    assert {"dev": frozenset(inside.group(1).split(","))} == CONTAINED
    assert with_contained(frozenset({"dev"})) >= {"gguf"}


def test_every_requirement_is_pinned_once_and_names_no_place():
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    names = [re.match(r"[A-Za-z0-9._-]+==[0-9][^ ;+@/]*", line) for line in lines]
    assert all(names), "a line is no plain pin"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert len(pinned) == len(lines)
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
        assert name == "qlora-trainer" or re.sub(r"[-_.]+", "-", name).lower() in pinned


def test_a_missing_pin_of_torch_stops():
    with pytest.raises(Stop, match="pins no torch"):
        pinned_version("torch", "numpy==2.4.6\n")


def test_a_failing_step_stops_with_its_name_and_advice():
    with pytest.raises(Stop, match=r"(?s)Counting: failed with exit code 3.*Count again"):
        run_step("Counting", [sys.executable, "-c", "raise SystemExit(3)"], advice="Count again")


def test_the_oldest_python_is_the_one_the_package_takes():
    project = tomllib.loads((environment.REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">={}.{}".format(*environment.OLDEST_PYTHON)
