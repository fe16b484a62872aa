"""What the README and the architecture promise about the house is true of the tree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qlora_trainer.config.document import settings_table
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "qlora_trainer"


def test_help_starts_without_torch() -> None:
    code = "import sys; from qlora_trainer.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_file_says_its_idea_and_packages_are_empty(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert text == ""
    else:
        assert ast.get_docstring(ast.parse(text))


def test_top_level_is_what_the_architecture_says() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split()
    top = {name.split("/")[0] for name in listed}
    allowed = {"pyproject.toml", "qlora_trainer", "scripts", "tests", "profiles", "README.md"}
    allowed |= {"LICENSE", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_a_wheel_carries_every_room_and_the_profiles() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    named = set(settings["tool"]["setuptools"]["packages"])
    rooms = {f"qlora_trainer.{file.parent.name}" for file in PACKAGE.glob("*/__init__.py")}
    profiles = {"qlora_trainer.profiles.gpus", "qlora_trainer.profiles.models"}
    assert named == {"qlora_trainer"} | rooms | profiles


def test_no_pickle_is_ever_read() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")
        or (isinstance(node, ast.Import) and any(a.name == "pickle" for a in node.names))
    ]
    assert found == []


def test_every_setting_a_message_names_exists() -> None:
    # Rooms are no sections: a message naming `base.revision` sends its reader to nothing.
    sections = "model|adapter|data|train|evaluation|output|memory|task_settings|base|lora|training"
    known = {name for name, _, _ in settings_table()}
    known |= {"model.layers", "model.norm", "model.to", "model.save_pretrained"}  # of a model
    files = (".json", ".jsonl", ".parquet", ".safetensors", ".yaml")
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            for name in re.findall(rf"(?<![\w./*-])(?:{sections})\.[a-z]\w+", node.value):
                if name not in known and not name.endswith(files):
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}")
    assert wrong == []


def test_every_setting_has_help() -> None:
    assert all(help_line for _, _, help_line in settings_table())
