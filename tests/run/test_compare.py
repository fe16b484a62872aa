"""The same questions asked without training, after examples, and of the adapter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer import train
from qlora_trainer.cli.app import app
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.run.compare import compare_ways
from qlora_trainer.run.prompts import Question, ask_with, read_template

Make = Callable[..., RunConfig]


def test_examples_of_a_chat_are_turns_after_its_system_message() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 3"}]
    asked = ask_with(Question(chat, "6"), "Sum: {prompt}", [Question(chat, "6")])
    assert [(turn["role"], turn["content"]) for turn in asked if isinstance(turn, dict)] == [
        ("system", "Be brief."), ("user", "Sum: 3 + 3"), ("assistant", "6"),
        ("user", "Sum: 3 + 3"),
    ]  # fmt: skip
    assert chat[1]["content"] == "3 + 3"


def test_a_template_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold \{prompt\} once"):
        read_template("Sum:")
    (tmp_path / "template.txt").write_text("Sum: {prompt}")
    assert read_template(str(tmp_path / "template.txt")) == "Sum: {prompt}"


def test_zero_shot_few_shot_and_tuned_stand_in_one_table(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    folder = train(run).folder
    rows = str(run.data.train[0].path)
    with pytest.raises(UserError, match="few-shot needs it"):
        compare_ways(folder, rows, ["few-shot"])
    with pytest.raises(UserError, match="name some of zero-shot"):
        compare_ways(folder, rows, ["tuned", "best"])
    examples = tmp_path / "examples.jsonl"
    examples.write_text((Path(rows).read_text() + "\n") * 20)
    with pytest.raises(UserError, match=r"prompt 1 has \S+ tokens, .* 512 positions .* fewer exam"):
        compare_ways(folder, rows, ["tuned", "few-shot"], examples=str(examples))
    assert not (folder / "evaluation" / "compare.json").exists()
    examples.write_text("\n".join(Path(rows).read_text().splitlines()[:2]))
    app(
        ["evaluate", str(folder), "--data", rows, "--compare", "zero-shot,few-shot,tuned",
         "--examples", str(examples), "--prompt-template", "Q: {prompt}", "--rows", "3",
         "--max-new-tokens", "4"],
        standalone_mode=False,
    )  # fmt: skip
    table = json.loads((folder / "evaluation" / "compare.json").read_text())
    assert list(table) == ["zero-shot", "few-shot", "tuned"]
    assert all(row["rows"] == 3 for row in table.values())
    lines = (folder / "evaluation" / "compare.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0])["answer"] == "It is 0."
    assert "few-shot" in capsys.readouterr().out
