"""Rows to compare on when nobody held any out: paragraphs of our own, in several registers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def builtin_rows(
    folder: Path, config: Any, *, trust_remote_code: bool
) -> tuple[list[dict[str, Tensor]], tuple[str, ...]]:
    """Rows for a model that reads tokens, and the texts they were made from.

    A folder without a tokenizer gets token ids drawn evenly from the vocabulary: less telling, but
    still the same question to both sides.
    """
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
        return [{"input_ids": row, "labels": row} for row in ids], TEXTS
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (8, 48), generator=generator)
    return [{"input_ids": row, "labels": row} for row in drawn], ()
