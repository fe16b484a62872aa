"""Every format is recognised and brought to the same shapes."""

import json

import pytest

from qlora_trainer.data.faults import RowError
from qlora_trainer.data.formats import FORMATS, recognise_format, rename, to_shape
from qlora_trainer.data.messages import Chat, PlainText, Prompted

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}

RECORDS = {
    "text": {"text": "once upon a time"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "messages": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_by_its_fields(name):
    assert recognise_format([RECORDS[name], RECORDS[name]], {}) == name
    assert recognise_format([{**RECORDS[name], "id": 7, "source": "x"}], {}) == name


def test_named_columns_are_recognised_and_used():
    columns = {"prompt": "question", "completion": "answer"}
    record = {"question": "q", "answer": "a"}
    assert recognise_format([record], columns) == "prompt-completion"
    shape = to_shape(rename(record, columns), "prompt-completion", as_chat=False)
    assert shape == Prompted("q", "a")


def test_columns_can_trade_places():
    record = {"prompt": "a", "completion": "q"}
    renamed = rename(record, {"prompt": "completion", "completion": "prompt"})
    assert renamed == {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize("name", ["alpaca", "messages", "sharegpt"])
def test_chat_formats_give_the_same_chat(name):
    assert to_shape(RECORDS[name], name, as_chat=True) == Chat([QUESTION, ANSWER], None)


def test_text_is_plain():
    assert to_shape(RECORDS["text"], "text", as_chat=True) == PlainText("once upon a time")


def test_alpaca_without_template_is_the_standard_prompt():
    record = {"instruction": "Add {these}.", "input": "1 2", "output": "3"}
    shape = to_shape(record, "alpaca", as_chat=False)
    assert shape == Prompted(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n1 2\n\n### Response:\n",
        "3",
    )
    bare = to_shape({"instruction": "Say hi.", "output": "hi"}, "alpaca", as_chat=False)
    assert isinstance(bare, Prompted)
    assert "### Input" not in bare.prompt


def test_alpaca_with_template_is_a_chat_with_its_input_system_and_history():
    record = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["hi", "hello"]],
    }
    shape = to_shape(record, "alpaca", as_chat=True)
    assert isinstance(shape, Chat)
    assert [message["role"] for message in shape.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert shape.messages[3]["content"] == "Add.\n\n1 2"


def test_conversational_prompt_and_completion_train_the_completion_only():
    record = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}
    shape = to_shape(record, "prompt-completion", as_chat=True)
    assert isinstance(shape, Chat)
    assert [message.get("weight", 1) for message in shape.messages] == [0, 0, 0, 1]


def test_sharegpt_tools_and_calls_become_what_templates_take():
    call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "20"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "get_weather", "parameters": {}}]',
        "system": "s",
    }
    shape = to_shape(record, "sharegpt", as_chat=True)
    assert isinstance(shape, Chat)
    roles = [message["role"] for message in shape.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert shape.messages[2]["tool_calls"] == [{"type": "function", "function": function}]
    assert shape.tools == [
        {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    ]


def test_openai_tool_calls_with_arguments_as_text_are_parsed():
    function = {"name": "f", "arguments": '{"x": 1}'}
    call = {"id": "c1", "type": "function", "function": function}
    record = {
        "messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, ANSWER]
    }
    shape = to_shape(record, "messages", as_chat=True)
    assert isinstance(shape, Chat)
    parsed = {"name": "f", "arguments": {"x": 1}}
    assert shape.messages[1]["tool_calls"] == [{"id": "c1", "type": "function", "function": parsed}]


def test_text_parts_are_joined_and_messages_as_json_text_are_read():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "2"}]
    record = {"messages": json.dumps([{"role": "user", "content": parts}, ANSWER])}
    shape = to_shape(record, "messages", as_chat=True)
    assert isinstance(shape, Chat)
    assert shape.messages[0]["content"] == "q2"


def test_the_record_itself_is_left_as_it_was():
    record = {"messages": [dict(QUESTION), dict(ANSWER)], "system": "s"}
    before = json.dumps(record)
    to_shape(record, "messages", as_chat=True)
    assert json.dumps(record) == before


def test_a_system_message_no_prompt_has_a_place_for_is_not_left_out_in_silence():
    record = {"instruction": "q", "output": "a", "system": "Be brief."}
    with pytest.raises(RowError, match="`system` needs a chat template"):
        to_shape(record, "alpaca", as_chat=False)
    assert to_shape(record | {"system": ""}, "alpaca", as_chat=False).completion == "a"


def test_history_needs_pairs_and_a_template():
    record = {"instruction": "q", "output": "a", "history": [["only one"]]}
    with pytest.raises(RowError, match="pairs"):
        to_shape(record, "alpaca", as_chat=True)
    with pytest.raises(RowError, match="needs a chat template"):
        to_shape(record, "alpaca", as_chat=False)
