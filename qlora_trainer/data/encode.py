"""Rows to tokens and the positions that are trained.

The whole text is tokenized once, and the character spans that are trained are mapped to tokens by
the fast tokenizer's offsets: a token is trained if it covers a trained character. So no character
is lost or doubled where prompt and answer join. If the tokenizer cuts the prompt differently once
the answer follows (a token across the join, two line breaks that are one token at the end but two
before a word), the model is not trained on the tokens it will be asked with: the gate counts such
rows. Labels are made from positions, never from token ids: a pad id that equals EOS cannot hide an
EOS that must be learned.

BOS is put in front of raw text if the tokenizer does so, and never twice; a chat begins as its
template says. EOS ends raw text, and a chat whose template has no end-of-turn token.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from qlora_trainer.data.each import encode_each, for_each
from qlora_trainer.data.faults import RowError
from qlora_trainer.data.formats import recognise_format, to_shape
from qlora_trainer.data.identity import identity_hash
from qlora_trainer.data.messages import Chat, PlainText, Prompted, Shape
from qlora_trainer.data.spans import SpanTokenizer, Tokenized
from qlora_trainer.data.template import LOSS_ON, ChatTemplate, Rendered
from qlora_trainer.data.template_text import choose_template
from qlora_trainer.errors import UserError

IGNORED = -100  # the label of a position that is not trained, as everywhere in transformers
_Row = tuple[Shape, list[Rendered]]


@dataclass(frozen=True)
class Example:
    """Tokens and what is to be learned of them.

    Of a causal model that is some of the tokens themselves: half-open position ranges, position 0
    never. Other tasks keep what they learn in `columns`.

    Attributes:
        input_ids: (T,)
        trained: Ascending, disjoint `(start, end)`.
        merged_join: The prompt alone has other tokens than the prompt before its answer.
        control_tokens: A message holds special tokens in its text.
        columns: Further arrays of the row, by the names the encoder declares.
        reference: What a prediction is scored against and told with; any JSON value.
        lost_tokens: Cut off by an encoder that cuts for itself.
        lost_trained_tokens: Those of them that would have been learned.
        too_long: Over another limit than `data.max_seq_len`; dropped as what is over that one.
        file: Where the rest of it lies (a picture); its place, and so no part of its content.
    """

    input_ids: list[int]
    trained: tuple[tuple[int, int], ...] = ()
    merged_join: bool = False
    control_tokens: bool = False
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)
    reference: Any = None
    lost_tokens: int = 0
    lost_trained_tokens: int = 0
    too_long: bool = False
    file: str = ""

    @property
    def labels(self) -> list[int]:
        """(T,) The token ids at trained positions, else -100; aligned with `input_ids`."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.trained:
            labels[start:end] = self.input_ids[start:end]
        return labels


class Encoder:
    """Turns the shapes of `formats` into examples for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer with an EOS token.
        chat_template: A built-in name or a file; None takes the tokenizer's own.
        loss_on: One of `LOSS_ON`. `assistant`: every assistant turn; `last` and `completion`: the
            last turn, or the completion; `all`: every token. Plain text is always trained whole.
        chat_template_kwargs: Further variables of the chat template.

    Raises:
        UserError: `loss_on` or the template is unknown, or the tokenizer has no EOS.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        loss_on: str = "assistant",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if loss_on not in LOSS_ON:
            raise UserError(f"data.loss_on = {loss_on!r}: must be one of {', '.join(LOSS_ON)}")
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, so no answer could be taught to end; set "
                "`eos_token` in the model folder's tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        text = choose_template(tokenizer, chat_template)
        self.template = ChatTemplate(tokenizer, text, chat_template_kwargs) if text else None
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_ids = _bos_ids(tokenizer)
        self._spans = SpanTokenizer(tokenizer)

    columns: Mapping[str, str] = MappingProxyType({})  # tokens and trained ranges say it all

    @property
    def as_chat(self) -> bool:
        """Whether a chat template is there."""
        return self.template is not None

    def recognise(self, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
        """Name the format of the first records; see `formats.recognise_format`."""
        return recognise_format(records, columns)

    def encode_rows(
        self, records: Sequence[Mapping[str, Any]], format: str
    ) -> list[list[Example] | RowError]:
        """Bring records to their shapes and encode those that fit, in one tokenizer call."""
        rows = for_each(
            records, lambda row: self._rendered(to_shape(row, format, as_chat=self.as_chat))
        )
        return encode_each(rows, self._tokenize, self._examples)

    @property
    def identity(self) -> str:
        """A hash of all that decides what a row becomes."""
        template = self.template
        parts = {
            "loss_on": self.loss_on,
            "template": template.text if template else None,
            "variables": template.variables if template else None,
        }
        return identity_hash(parts, self.tokenizer)

    def encode(self, shapes: Sequence[Shape]) -> list[list[Example] | RowError]:
        """Encode rows in one tokenizer call.

        Returns:
            For each row its examples (several if the chat had to be split), or what is wrong.
        """
        return encode_each(for_each(shapes, self._rendered), self._tokenize, self._examples)

    def _rendered(self, shape: Shape) -> _Row:
        return shape, self._render(shape)

    def _tokenize(self, rows: Sequence[_Row]) -> Iterator[list[Tokenized]]:
        """Ids and trained spans of every part of each row."""
        tokenized = iter(self._spans.tokenize([part for _, parts in rows for part in parts]))
        return ([next(tokenized) for _ in parts] for _, parts in rows)

    def _examples(self, row: _Row, found: list[Tokenized]) -> list[Example]:
        shape, parts = row
        is_chat = isinstance(shape, Chat)
        control = self.template is not None and self.template.holds_control(shape)
        return [
            self._example(part, *ids, is_chat=is_chat, control=control)
            for part, ids in zip(parts, found, strict=True)
        ]

    def encode_prompt(
        self, prompt: str | list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The ids that ask for an answer, as training put them before it.

        Args:
            prompt: Messages (without a template their plain text is taken), or text as it is.
            tools: Offered in the chat.

        Raises:
            UserError: The template refuses the messages.
        """
        if self.template is not None and not isinstance(prompt, str):
            try:
                return self._spans.tokenize_alone(self.template.prompt(prompt, tools))
            except RowError as error:
                raise UserError(f"the prompt: {error.problem}; {error.remedy}") from error
        if not isinstance(prompt, str):
            prompt = "\n".join(message["content"] for message in prompt)
        return self._with_bos(self._spans.tokenize_alone(prompt))

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else [*self.bos_ids, *ids]

    def _render(self, shape: Shape) -> list[Rendered]:
        if isinstance(shape, PlainText):
            return [Rendered(shape.text, ((0, len(shape.text)),), True)]
        if isinstance(shape, Prompted):
            text = shape.prompt + shape.completion
            start = 0 if self.loss_on == "all" else len(shape.prompt)
            return [Rendered(text, ((start, len(text)),), True)]
        if self.template is None:
            raise RowError(
                "the tokenizer has no chat template, here and for every other chat",
                "name one: `model.chat_template: chatml` or `alpaca`, or a file",
                "no template",
                everywhere=True,
            )
        return self.template.render(shape.messages, shape.tools, self.loss_on)

    def _example(
        self,
        part: Rendered,
        ids: list[int],
        spans: list[tuple[int, int, bool]],
        *,
        is_chat: bool,
        control: bool,
    ) -> Example:
        before = len(ids)
        ids = ids if is_chat else self._with_bos(ids)
        shift = len(ids) - before
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and ids[:2] == [bos_id, bos_id]:
            raise RowError(
                "begins with two BOS tokens", "remove the BOS text from the row", "double BOS"
            )
        moved = [(start + shift, end + shift) for start, end, _ in spans]
        if part.append_eos:
            if ids[-1:] != [self.eos_id]:
                ids = [*ids, self.eos_id]
            moved[-1] = (moved[-1][0], len(ids))
        trained = tuple((max(start, 1), end) for start, end in moved if end > max(start, 1))
        if not trained:
            raise RowError(
                "nothing is trained in this row", "give it an answer or drop it", "nothing trained"
            )
        return Example(ids, trained, any(merged for _, _, merged in spans), control)


def _bos_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of raw text: BOS, or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def choose_pad_id(tokenizer: Any) -> int:
    """The id that fills rows; its value teaches nothing, since padding is never labelled."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
