"""Chats rendered by the tokenizer's own template, with the characters that are trained.

The trained characters of an assistant turn are found in one of two ways:

- the template marks them with `{% generation %}`, or
- rendering the messages before the turn, with the generation prompt, gives a prefix of the whole
  text, and rendering up to and including the turn gives a longer one: the turn is between them.
  This is exactly what the model will have to write when it is asked.

A template may write a turn differently once others follow (Qwen3 drops earlier thinking, Mistral
moves the system prompt to the last user turn). Then one text cannot hold every turn as the model
will have to write it, so the chat is split: one text per assistant turn, each ending with it. A
turn that still cannot be found is refused, never guessed.

The end-of-turn token belongs to the turn; white space the template puts after it does not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data.faults import RowError
from qlora_trainer.data.messages import Chat, Shape
from qlora_trainer.data.template_text import special_pattern, with_fixed_date

# What a template's own expressions may raise; its sandbox lets it reach nothing else.
_REFUSALS = (
    jinja2.TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError,
    RecursionError, MemoryError, NotImplementedError, AssertionError,
)  # fmt: skip
LOSS_ON = ("assistant", "last", "completion", "all")


@dataclass(frozen=True)
class Rendered:
    """A text, the character spans trained in it, and whether EOS must be appended and trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    append_eos: bool


class ChatTemplate:
    """The tokenizer's template (or a named one) and what it renders.

    Args:
        tokenizer: A transformers tokenizer.
        template: Text of the template.
        variables: Further template variables, such as `enable_thinking`.
    """

    def __init__(
        self, tokenizer: Any, template: str, variables: Mapping[str, Any] | None = None
    ) -> None:
        self.text = with_fixed_date(template)
        self.variables = dict(variables or {})
        self.marks_generation = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        self._values = {**tokenizer.special_tokens_map, **self.variables}
        self._special = special_pattern(tokenizer)

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, loss_on: str
    ) -> list[Rendered]:
        """Render a chat and find its trained characters.

        Returns:
            One text, or one per trained turn if the template rewrites earlier turns.

        Raises:
            RowError: The template refuses the chat, leaves a part of it out, or a turn cannot be
                found in what it renders.
        """
        weights = [message.get("weight", 1) for message in messages]
        messages = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        if loss_on == "all":
            text = self._text(messages, tools)
            self._check_whole(text, messages, tools)
            return [Rendered(text, ((0, len(text)),), not self._ends_with_special(text))]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and weights[i]]
        # A first turn without anything before it answers nothing: it is context.
        turns = [i for i in turns if i > 0]
        if not turns:
            raise RowError(
                "no assistant turn to train (the only one opens the chat, or all have weight 0)",
                "put a user turn first or drop the row",
                "nothing trained",
            )
        if loss_on in ("last", "completion"):
            turns = turns[-1:]
        messages = messages[: turns[-1] + 1]  # turns after the last answer are asked of nobody
        text, marked = self._marked(messages, tools)
        self._check_whole(text, messages, tools)
        if len(turns) > 1 and self._rewrites(text, messages, tools, turns):
            rendered = []
            for turn in turns:
                part = messages[: turn + 1]
                rendered.append(self._one(*self._marked(part, tools), part, tools, [turn]))
            return rendered
        return [self._one(text, marked, messages, tools, turns)]

    def prompt(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        """The chat up to where an answer begins.

        Raises:
            RowError: The template refuses the chat.
        """
        return self._text(messages, tools, add_generation_prompt=True)

    def holds_control(self, shape: Shape) -> bool:
        """Whether a chat's messages hold special tokens as text, which the model takes for real."""
        return isinstance(shape, Chat) and any(
            self._special.search(message["content"]) for message in shape.messages
        )

    def _rewrites(
        self, text: str, messages: list[dict[str, Any]], tools: Any, turns: Sequence[int]
    ) -> bool:
        """Whether a trained turn reads differently once the turns after it are there."""
        return any(
            not text.startswith(self._text(messages[: turn + 1], tools)) for turn in turns[:-1]
        )

    def _one(
        self,
        text: str,
        marked: list[tuple[int, int]],
        messages: list[dict[str, Any]],
        tools: Any,
        turns: Sequence[int],
    ) -> Rendered:
        spans = []
        for turn in turns:
            if self.marks_generation:
                start, end = self._marked_span(text, marked, messages, turn)
            else:
                start, end = self._prefix_span(text, messages, tools, turn)
            self._check_turn(text[start:end], messages[turn], turn)
            spans.append((start, end))
        has_end = self._ends_with_special(text[spans[-1][0] : spans[-1][1]])
        if not has_end:  # what follows (white space at most) is kept, so that EOS comes right after
            spans[-1] = (spans[-1][0], len(text))
        else:  # nothing after the last end of turn is trained or asked for
            text = text[: spans[-1][1]]
        return Rendered(text, tuple(spans), not has_end)

    def _prefix_span(
        self, text: str, messages: list[dict[str, Any]], tools: Any, turn: int
    ) -> tuple[int, int]:
        before = self._text(messages[:turn], tools, add_generation_prompt=True)
        upto = text if turn == len(messages) - 1 else self._text(messages[: turn + 1], tools)
        if not text.startswith(before) or len(upto) <= len(before):
            pairs = enumerate(zip(before, text, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(text)))
            raise RowError(
                f"messages[{turn}]: the chat template does not write the answer where its own "
                f"generation prompt ends (it asks with {before[shared:][:60]!r}, the row reads "
                f"{text[shared:][:60]!r})",
                "give the answer the form the template expects (for example its thinking), or name "
                "a template with {% generation %} markers under `model.chat_template`",
                "generation prompt",
            )
        return len(before), self._end_of_turn(text, len(before), len(upto))

    def _marked_span(
        self,
        text: str,
        marked: list[tuple[int, int]],
        messages: list[dict[str, Any]],
        turn: int,
    ) -> tuple[int, int]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marked) != len(answers):
            raise RowError(
                f"the chat template marks {len(marked)} generated parts for {len(answers)} "
                "assistant turns",
                "mend its {% generation %} markers or name another under `model.chat_template`",
                "generation markers",
            )
        start, end = marked[answers.index(turn)]
        after = self._special.match(text, end)  # markers often leave the end of turn outside
        return start, self._end_of_turn(text, start, after.end() if after else end)

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """`end`, without the white space after the special token that ends the turn."""
        ends = [match.end() for match in self._special.finditer(text, start, end)]
        return ends[-1] if ends and not text[ends[-1] : end].strip() else end

    def _ends_with_special(self, text: str) -> bool:
        end = self._end_of_turn(text, 0, len(text))
        return any(match.end() == end for match in self._special.finditer(text[:end]))

    def _check_whole(self, text: str, messages: list[dict[str, Any]], tools: Any) -> None:
        """Refuse a template that silently leaves out tools or what the user or system said."""
        remedy = "name a template that has a place for it under `model.chat_template`"
        for index, message in enumerate(messages):
            said = message["role"] in ("system", "developer", "user") and message["content"].strip()
            if said and said not in text:
                role = message["role"]
                raise RowError(
                    f"the chat template leaves out messages[{index}] ({role})", remedy, "left out"
                )
        for tool in tools or ():
            if str(tool["function"].get("name", "")) not in text:
                raise RowError("the chat template leaves out `tools`", remedy, "tools left out")

    def _check_turn(self, trained: str, message: dict[str, Any], turn: int) -> None:
        """Refuse a span that lacks the end of its answer, which would be a wrong mask."""
        words = re.split(r"</think>", message["content"])[-1].strip()
        missing = bool(words) and words not in trained
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if missing or any(name not in trained for name in calls):
            what = "its tool calls" if not missing else "its text"
            raise RowError(
                f"messages[{turn}]: the chat template renders the answer without {what}",
                "name a template that renders it under `model.chat_template`",
                "answer left out",
            )

    def _text(self, messages: Any, tools: Any, *, add_generation_prompt: bool = False) -> str:
        return self._render(messages, tools, add_generation_prompt, marks=False)[0]

    def _marked(self, messages: Any, tools: Any) -> tuple[str, list[tuple[int, int]]]:
        return self._render(messages, tools, False, marks=self.marks_generation)

    def _render(
        self, messages: Any, tools: Any, add_generation_prompt: bool, *, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, marked = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **self._values,
            )
        except jinja2.TemplateSyntaxError as error:
            raise RowError(
                f"the chat template is no valid Jinja (its line {error.lineno}: {error.message}), "
                "here and for every other chat",
                "mend it, or name another under `model.chat_template`",
                "broken template",
                everywhere=True,
            ) from error
        except _REFUSALS as error:
            raise RowError(
                f"the chat template refuses the row ({error})",
                "change the row's roles or their order, or name another template under "
                "`model.chat_template`",
                "template refuses",
            ) from error
        return texts[0], marked[0] if marks else []
