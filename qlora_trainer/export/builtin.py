"""Rows to compare on when nobody held any out: paragraphs of our own, in several registers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.base.picture_size import processed_size

TEXTS = (
    "The ferry leaves the harbour at six, when the fog still lies on the water and the gulls are "
    "the only ones awake. By the time it reaches the island the sun has burned through, and the "
    "bakery on the quay has opened its shutters. Nobody hurries here. The post arrives twice a "
    "week, the doctor once, and the newspaper whenever somebody remembers to bring one along.",
    "User: How do I stop a pan from rusting?\nAssistant: Dry it on the stove straight after "
    "washing, then rub a thin film of oil over the whole surface while it is still warm. Heat it "
    "for a few minutes more until it just begins to smoke, and let it cool. If rust has already "
    "appeared, scrub it away with steel wool first and repeat the oiling two or three times.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n"
    "    if len(ordered) % 2:\n        return ordered[middle]\n"
    "    return (ordered[middle - 1] + ordered[middle]) / 2\n\n\n"
    'print(median([3, 1, 2]))  # prints 2\nprint(median([4.5, "x"]))  # raises TypeError\n',
    "Water boils at 100 degrees Celsius at sea level, but only because the pressure of the air "
    "above it is about 101.3 kilopascals. On a mountain of 3000 metres the pressure is lower, so "
    "the molecules escape more easily and the water boils near 90 degrees. That is why beans take "
    "longer to cook there, and why a pressure cooker, which does the opposite, saves so much time.",
    "1. Unpack all parts and check them against the list.\n2. Fasten the legs (A) to the frame (B) "
    "with four screws each; do not tighten them yet.\n3. Turn the table over. If it wobbles, "
    "loosen the screws, press the frame down and tighten them crosswise.\n4. Keep the hex key: "
    "you will need it again after a month of use.",
    "Le marché se tient chaque samedi sur la place. On y vend des pommes, du fromage et du pain. "
    "Der Zug nach Hamburg fährt heute von Gleis sieben und hat zehn Minuten Verspätung. "
    "El museo cierra los lunes, pero el jardín está abierto todo el año.",
    "The committee met on 14 March 2019 and approved the budget of 2.4 million by nine votes to "
    "two. Ms Okafor asked that the minutes record her objection: the estimate for heating, she "
    "said, assumed prices that had not been seen since 2016. The chair replied that a reserve of "
    "five per cent had been set aside for exactly this purpose, and moved to the next item.",
    '{"name": "sensor-7", "readings": [21.4, 21.6, null, 22.0], "ok": false, "note": "third '
    'reading lost: cable"}\n{"name": "sensor-8", "readings": [19.9, 20.1, 20.0, 20.2], "ok": true}',
)


RANDOM_SEED = 0
_RANDOM_ROWS = 8
_MOST_TOKENS = 128  # of a text; all of them are shorter for the usual tokenizers


@dataclass(frozen=True)
class BuiltinRows:
    """Inputs nobody had to bring.

    Attributes:
        rows: Without a batch dimension; `labels` only where the inputs are their own labels.
        rows_from: What they are, for the report.
        texts: What the rows were made from, if texts.
        token_ids: Of `texts`.
    """

    rows: list[dict[str, Tensor]]
    rows_from: str
    texts: tuple[str, ...] = ()
    token_ids: tuple[list[int], ...] = ()


def builtin_rows(
    folder: Path, model: Any, *, causal: bool, trust_remote_code: bool
) -> BuiltinRows | None:
    """Rows for a model that reads tokens or pictures; None for any other.

    A folder without a tokenizer gets token ids drawn evenly from the vocabulary, a model of
    pictures pixels drawn from a normal distribution: less telling, but still the same question to
    both sides.

    Args:
        folder: The base's, with its tokenizer.
        model: Of its class, without weights.
        causal: The inputs are their own labels.
        trust_remote_code: Whether the tokenizer may bring its own Python.
    """
    config = model.config
    if model.main_input_name == "pixel_values":
        return BuiltinRows(_pixels(folder, config), "random pixels")
    text = config.get_text_config()
    if model.main_input_name != "input_ids" or not hasattr(text, "vocab_size"):
        return None
    most = min(_MOST_TOKENS, int(getattr(text, "max_position_embeddings", None) or _MOST_TOKENS))
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        ids = tuple(list(tokenizer(text)["input_ids"]) for text in TEXTS)
        rows = [torch.tensor(row[:most]) for row in ids]
        return BuiltinRows(_labelled(rows, model, causal), "built-in text", TEXTS, ids)
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    drawn = torch.randint(0, text.vocab_size, (_RANDOM_ROWS, min(48, most)), generator=generator)
    return BuiltinRows(_labelled(list(drawn), model, causal), "random token ids")


def _labelled(rows: list[Tensor], model: Any, causal: bool) -> list[dict[str, Tensor]]:
    """Each text predicts itself, or, read by an encoder, the start of the next one."""
    if getattr(model.config, "is_encoder_decoder", False):
        if model.get_output_embeddings() is None:
            return [{"input_ids": _ended(row, model.config.eos_token_id)} for row in rows]
        following = [*rows[1:], rows[0]]
        return [
            {"input_ids": row, "labels": next_row[:32]}
            for row, next_row in zip(rows, following, strict=True)
        ]
    return [{"input_ids": row, "labels": row} if causal else {"input_ids": row} for row in rows]


def _ended(row: Tensor, eos: Any) -> Tensor:
    """A row that ends with its end of sentence: there classifiers of BART and T5 look."""
    row = row.clone()
    if isinstance(eos, int):
        row[-1] = eos
    return row


def _pixels(folder: Path, config: Any) -> list[dict[str, Tensor]]:
    size: Any = processed_size(folder) or getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    channels = int(getattr(config, "num_channels", None) or 3)
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    drawn = torch.randn(_RANDOM_ROWS, channels, height, width, generator=generator)
    return [{"pixel_values": picture} for picture in drawn]
