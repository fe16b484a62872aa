"""Answers of a causal model to the prompts of a file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer import UserError, generate, load_trained, train
from qlora_trainer.cli.app import app
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.run.evaluate import predict_file

Make = Callable[..., RunConfig]

QUESTION = {"role": "user", "content": "What is 3 plus 3?"}
EXAMPLE = {"prompt": [QUESTION], "completion": [{"role": "assistant", "content": "It is 6."}]}
ROWS = {  # the same question in every format, without an answer
    "messages": {"messages": [QUESTION]},
    "sharegpt": {"conversations": [{"from": "human", "value": "What is 3 plus 3?"}]},
    "prompt-completion": {"prompt": [QUESTION]},
    "alpaca": {"instruction": "What is 3 plus 3?"},
    "text": {"text": "What is 3 plus 3?"},
}


def predictions(file: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in file.read_text().splitlines()]


def test_prompts_of_a_file_are_answered_as_if_they_were_typed(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    folder = train(run).folder
    trained = load_trained(folder)
    expected = generate(trained, ["What is 3 plus 3?"], max_new_tokens=6)
    out, data = tmp_path / "deep" / "out.jsonl", tmp_path / "prompts.jsonl"
    for row in ROWS.values():
        data.write_text(json.dumps(row) + "\n")
        assert predict_file(folder, str(data), out, max_new_tokens=6, overwrite=True) == 1
        assert predictions(out) == expected
    # Rows with answers are asked the same: the answer is not shown.
    rows = run.data.train[0].path
    assert predict_file(folder, rows, out, max_new_tokens=6, overwrite=True) == 24
    assert predictions(out)[3] == expected[0]
    assert all("rows.jsonl" in json.loads(line)["where"] for line in out.read_text().splitlines())
    # A template and examples are turns of the same chat.
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps(EXAMPLE) + "\n")
    asked = {"role": "user", "content": "Q: What is 3 plus 3?"}
    turns = [asked, {"role": "assistant", "content": "It is 6."}, asked]
    shown = generate(trained, [turns], max_new_tokens=6)
    assert shown != expected
    more = ["--prompt-template", "Q: {prompt}", "--examples", str(examples), "--max-new-tokens"]
    predicting = ["predict", str(folder), "--data", str(data), "--out", str(out), *more, "6"]
    app([*predicting, "--overwrite"], standalone_mode=False)
    assert predictions(out) == shown
    capsys.readouterr()
    app(["generate", str(folder), "What is 3 plus 3?", *more, "6"], standalone_mode=False)
    assert shown[0] in capsys.readouterr().out
    before = out.read_text()
    data.write_text('{"prompt": "a"}\n{"prompt": 5}\n{"instruction": "b"}\n')
    with pytest.raises(UserError, match=r"(?s)prompts.jsonl:2.*prompts.jsonl:3"):
        predict_file(folder, str(data), out, overwrite=True)
    assert out.read_text() == before
