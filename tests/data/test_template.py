"""Masks are right for every family of templates: what is trained is decoded and compared."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from qlora_trainer.data.encode import Encoder
from qlora_trainer.data.faults import RowError
from qlora_trainer.data.messages import Chat
from qlora_trainer.data.template_text import BUILT_IN
from qlora_trainer.errors import UserError
from tests.data import templates
from tests.data.conftest import byte_level, metaspace

USER = {"role": "user", "content": "Is this good?"}
YES = {"role": "assistant", "content": "yes"}
AGAIN = {"role": "user", "content": "And this?"}
NO = {"role": "assistant", "content": "no, not at all"}
SYSTEM = {"role": "system", "content": "You are terse."}

HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def encode(encoder, messages, tools=None):
    """The examples of one chat; a fault is raised."""
    (result,) = encoder.encode([Chat([dict(message) for message in messages], tools)])
    if isinstance(result, RowError):
        raise result
    return result


def trained_texts(tokenizer, example):
    """Decoded text of each trained range, read off the labels alone."""
    texts, run = [], []
    for label in [*example.labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def llama3(template=templates.LLAMA3):
    tokenizer = byte_level(HEADERS, bos=HEADERS[0], eos="<|eot_id|>", add_bos=True)
    return with_template(tokenizer, template)


def gemma():
    specials = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return with_template(metaspace(specials, bos="<bos>", eos="<eos>"), templates.GEMMA)


def mistral(template=templates.MISTRAL):
    return with_template(metaspace(["<s>", "</s>"], bos="<s>", eos="</s>"), template)


def qwen3():
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    return with_template(tokenizer, templates.QWEN3)


def chatml(template=templates.CHATML):
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    return with_template(tokenizer, template)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (chatml(), ["yes<|im_end|>", "no, not at all<|im_end|>"]),
        (chatml(templates.MARKED_CHATML), ["yes<|im_end|>", "no, not at all<|im_end|>"]),
        (chatml(templates.MARKED_WORDS), ["yes<|im_end|>", "no, not at all<|im_end|>"]),
        (chatml(BUILT_IN["chatml"]), ["yes<|im_end|>", "no, not at all<|im_end|>"]),
        (llama3(), ["yes<|eot_id|>", "no, not at all<|eot_id|>"]),
        (gemma(), ["yes<end_of_turn>", "no, not at all<end_of_turn>"]),
        (mistral(), ["yes</s>", "no, not at all</s>"]),
        (mistral(BUILT_IN["alpaca"]), ["yes</s>", "no, not at all</s>"]),
    ],
    ids=["chatml", "marked", "marked-words", "built-in", "llama3", "gemma", "mistral", "alpaca"],
)
def test_every_answer_and_its_end_of_turn_is_trained_and_nothing_else(tokenizer, expected):
    (example,) = encode(Encoder(tokenizer), [USER, YES, AGAIN, NO])
    assert [text.strip() for text in trained_texts(tokenizer, example)] == expected


@pytest.mark.parametrize("loss_on", ["last", "completion"])
def test_last_trains_the_last_answer_only(loss_on):
    tokenizer = llama3()
    (example,) = encode(Encoder(tokenizer, loss_on=loss_on), [USER, YES, AGAIN, NO])
    assert trained_texts(tokenizer, example) == ["no, not at all<|eot_id|>"]


def test_all_trains_every_token_but_the_first():
    (example,) = encode(Encoder(llama3(), loss_on="all"), [USER, YES])
    assert example.labels[0] == -100
    assert example.labels[1:] == example.input_ids[1:]


@pytest.mark.parametrize("tokenizer", [llama3(), gemma(), mistral()], ids=["llama3", "gemma", "m"])
def test_a_chat_begins_with_exactly_one_bos(tokenizer):
    (example,) = encode(Encoder(tokenizer), [USER, YES])
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id


def test_a_chat_that_would_begin_with_two_bos_is_refused():
    tokenizer = with_template(llama3(), "{{ bos_token }}" + templates.LLAMA3)
    with pytest.raises(RowError, match="two BOS"):
        encode(Encoder(tokenizer), [USER, YES])


def test_the_ids_are_those_the_tokenizer_gives_at_inference():
    tokenizer = chatml()
    (example,) = encode(Encoder(tokenizer), [USER, YES, AGAIN, NO])
    prompt = tokenizer.apply_chat_template(
        [USER, YES, AGAIN], add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt) - 1] == -100
    assert example.labels[len(prompt)] != -100
    assert not example.merged_join


def test_a_prompt_cut_differently_before_its_answer_is_counted():
    """GPT-2's rule makes two line breaks one token at the end of a text but two before a word."""
    tokenizer = llama3()
    (example,) = encode(Encoder(tokenizer), [USER, YES])
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: len(prompt)] != prompt
    assert example.merged_join


def test_a_pad_token_equal_to_eos_hides_no_eos():
    tokenizer = chatml()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (example,) = encode(Encoder(tokenizer), [USER, YES])
    assert example.labels[-1] == tokenizer.eos_token_id


def test_gemma_refuses_a_system_prompt_in_its_own_words():
    with pytest.raises(RowError, match="System role not supported"):
        encode(Encoder(gemma()), [SYSTEM, USER, YES])


def test_qwen3_drops_earlier_thinking_so_the_chat_is_split_one_example_per_answer():
    tokenizer = qwen3()
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    first, second = encode(Encoder(tokenizer), [USER, thought, AGAIN, NO])
    assert trained_texts(tokenizer, first) == ["<think>\nhm\n</think>\n\nyes<|im_end|>"]
    assert trained_texts(tokenizer, second) == ["<think>\n\n</think>\n\nno, not at all<|im_end|>"]
    # the second one sees the first answer as inference will show it: without its thinking
    assert "hm" not in tokenizer.decode(second.input_ids)


def test_qwen3_without_thinking_trains_the_words_after_its_generation_prompt():
    tokenizer = qwen3()
    encoder = Encoder(tokenizer, chat_template_kwargs={"enable_thinking": False})
    (example,) = encode(encoder, [USER, YES])
    assert trained_texts(tokenizer, example) == ["yes<|im_end|>"]


def test_qwen3_last_needs_no_split():
    tokenizer = qwen3()
    (example,) = encode(Encoder(tokenizer, loss_on="last"), [USER, YES, AGAIN, NO])
    assert trained_texts(tokenizer, example) == ["<think>\n\n</think>\n\nno, not at all<|im_end|>"]


def test_a_system_prompt_that_moves_to_the_last_user_turn_is_found_out():
    tokenizer = mistral(templates.MISTRAL_V3)
    first, second = encode(Encoder(tokenizer), [SYSTEM, USER, YES, AGAIN, NO])
    assert "You are terse.\n\nIs this good?" in tokenizer.decode(first.input_ids)
    assert "You are terse.\n\nAnd this?" in tokenizer.decode(second.input_ids)
    assert [text.strip() for text in trained_texts(tokenizer, first)] == ["yes</s>"]
    assert [text.strip() for text in trained_texts(tokenizer, second)] == ["no, not at all</s>"]


def test_an_answer_not_written_after_the_generation_prompt_is_refused():
    opened = templates.CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    with pytest.raises(RowError, match="where its own generation prompt ends"):
        encode(Encoder(chatml(opened)), [USER, YES])


def test_a_template_that_leaves_out_the_answer_is_refused():
    emptied = templates.CHATML.replace("message['content'] +", "message['content'][:0] +")
    with pytest.raises(RowError, match="leaves out"):
        encode(Encoder(chatml(emptied)), [USER, YES])


def test_markers_that_do_not_cover_every_answer_are_refused():
    once = templates.MARKED_CHATML.replace(
        "{% if message['role'] == 'assistant' %}",
        "{% if message['role'] == 'assistant' and loop.last %}",
    )
    with pytest.raises(RowError, match="marks 1 generated parts for 2"):
        encode(Encoder(chatml(once)), [USER, YES, AGAIN, NO])


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    ],
}
RESULT = {"role": "tool", "content": '{"temperature": 20}'}


def test_tool_calls_are_rendered_and_trained_and_results_are_not():
    tokenizer = qwen3()
    examples = encode(Encoder(tokenizer), [USER, CALL, RESULT, YES], TOOLS)
    texts = [text for example in examples for text in trained_texts(tokenizer, example)]
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert any(call in text and text.endswith("<|im_end|>") for text in texts)
    assert any("yes" in text for text in texts)
    assert not any("temperature" in text for text in texts)
    assert '"name": "get_weather"' in tokenizer.decode(examples[0].input_ids)


def test_a_template_without_a_place_for_tools_is_refused():
    with pytest.raises(RowError, match="leaves out `tools`"):
        encode(Encoder(chatml()), [USER, YES], TOOLS)


def test_a_template_that_drops_tool_calls_is_refused():
    with pytest.raises(RowError, match="without its tool calls"):
        encode(Encoder(chatml()), [USER, CALL])


def test_messages_of_weight_zero_are_context():
    tokenizer = chatml()
    (example,) = encode(Encoder(tokenizer), [USER, {**YES, "weight": 0}, AGAIN, NO])
    assert trained_texts(tokenizer, example) == ["no, not at all<|im_end|>"]


def test_an_answer_that_opens_the_chat_is_context():
    tokenizer = chatml()
    (example,) = encode(Encoder(tokenizer), [YES, USER, NO])
    assert trained_texts(tokenizer, example) == ["no, not at all<|im_end|>"]


def test_a_question_nobody_answers_is_left_out():
    tokenizer = chatml()
    (example,) = encode(Encoder(tokenizer), [USER, YES, AGAIN])
    assert tokenizer.decode(example.input_ids).endswith("yes<|im_end|>")


def test_a_template_without_end_of_turn_gets_eos_trained(plain_tokenizer):
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = with_template(plain_tokenizer, bare)
    (example,) = encode(Encoder(tokenizer), [USER, YES])
    assert trained_texts(tokenizer, example) == [" yes\n</s>"]
    assert example.merged_join  # "assistant: " ends with the space that belongs to " yes"
    assert example.labels[-1] == tokenizer.eos_token_id


def test_a_dated_template_gives_the_same_tokens_tomorrow():
    tokenizer = llama3(templates.LLAMA31_DATED)
    (example,) = encode(Encoder(tokenizer), [USER, YES])
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(example.input_ids)


def test_a_tokenizer_without_template_needs_one_named(plain_tokenizer):
    with pytest.raises(RowError, match="no chat template") as caught:
        encode(Encoder(plain_tokenizer), [USER, YES])
    assert "chatml" in caught.value.remedy
    (example,) = encode(Encoder(plain_tokenizer, chat_template="alpaca"), [USER, YES])
    assert trained_texts(plain_tokenizer, example) == ["yes</s>"]


def test_a_template_is_read_from_a_file(tmp_path, plain_tokenizer):
    path = tmp_path / "mine.jinja"
    path.write_text(BUILT_IN["alpaca"])
    (example,) = encode(Encoder(plain_tokenizer, chat_template=str(path)), [USER, YES])
    assert trained_texts(plain_tokenizer, example) == ["yes</s>"]
    with pytest.raises(UserError, match="neither a built-in name"):
        Encoder(plain_tokenizer, chat_template="chatmml")


def test_a_slow_tokenizer_is_masked_by_prefixes():
    tokenizer = with_template(ByT5Tokenizer(), BUILT_IN["alpaca"])
    assert not tokenizer.is_fast
    (example,) = encode(Encoder(tokenizer), [USER, YES, AGAIN, NO])
    assert trained_texts(tokenizer, example) == ["yes</s>", "no, not at all</s>"]


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=40
).filter(lambda text: text.strip())


@settings(deadline=None, max_examples=150)
@given(answers=st.lists(WORDS, min_size=1, max_size=3), question=WORDS)
def test_any_text_at_all_is_masked_exactly(answers, question):
    tokenizer = chatml()
    messages = []
    for answer in answers:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    (example,) = encode(Encoder(tokenizer), messages)
    assert trained_texts(tokenizer, example) == [f"{answer}<|im_end|>" for answer in answers]


def test_the_real_smollm2_template_trains_answers_and_end_of_turn(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    (example,) = encode(Encoder(tokenizer), [USER, YES, AGAIN, NO])
    assert trained_texts(tokenizer, example) == ["yes<|im_end|>", "no, not at all<|im_end|>"]
    assert (
        example.input_ids
        == tokenizer.apply_chat_template([USER, YES, AGAIN, NO], return_dict=False)[:-1]
    )  # its template ends with a line break that nothing asks for
