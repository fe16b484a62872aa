"""Pairs to tokens: the source's are `input_ids`, the target's a column of their own.

Both sides are tokenized as the tokenizer says (`text_target`: Marian has another vocabulary for it,
mBART another language token), special tokens included. A target always ends with EOS, or the model
would never learn to stop; a tokenizer that does not add it gets it here. What a prediction is
scored against is the text that was given, not what is left of it after tokenizing.

    B rows, S source tokens, T target tokens
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.each import encode_each, for_each
from qlora_trainer.data.encode import IGNORED, Example
from qlora_trainer.data.faults import RowError
from qlora_trainer.data.identity import identity_hash
from qlora_trainer.data.padding import pad_rows, padded
from qlora_trainer.data.pairs import Pair, recognise_pair_format, to_pair
from qlora_trainer.data.rows import Findings
from qlora_trainer.errors import UserError


class PairEncoder:
    """Turns records into pairs of token lists for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer with EOS and padding tokens.
        max_source_tokens: Longest source (`data.max_seq_len`).
        max_target_tokens: Longest target.
        over_length: `raise`, `truncate` or `drop`.
        prefix: Put before every source, as T5 was trained (`translate English to German: `).
        labelled: Records have targets.

    Raises:
        UserError: The tokenizer lacks a token that is needed.
    """

    columns: Mapping[str, str] = MappingProxyType({"target": "int32"})

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_source_tokens: int,
        max_target_tokens: int,
        over_length: str = "raise",
        prefix: str = "",
        labelled: bool = True,
    ) -> None:
        for name, why in (("eos", "no target could end"), ("pad", "no two rows fit in a batch")):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise UserError(
                    f"the tokenizer has no {name.upper()} token, so {why}; set `{name}_token` in "
                    "the model folder's tokenizer_config.json"
                )
        self.tokenizer, self.prefix, self.labelled = tokenizer, prefix, labelled
        self.max_source_tokens, self.max_target_tokens = max_source_tokens, max_target_tokens
        self.over_length = over_length
        self.eos_id: int = tokenizer.eos_token_id
        self.special_ids = frozenset(tokenizer.all_special_ids)

    @property
    def identity(self) -> str:
        """A hash of all that decides what a record becomes."""
        parts = {
            "languages": [getattr(self.tokenizer, f"{side}_lang", None) for side in ("src", "tgt")],
            "limits": [self.max_source_tokens, self.max_target_tokens, self.over_length],
            "prefix": self.prefix,
            "labelled": self.labelled,
        }
        return identity_hash(parts, self.tokenizer)

    def recognise(self, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
        """Name the format of the first records; see `pairs.recognise_pair_format`."""
        return recognise_pair_format(records, columns, with_target=self.labelled)

    def encode_rows(
        self, records: Sequence[Mapping[str, Any]], format: str
    ) -> list[list[Example] | RowError]:
        """Bring records to pairs and tokenize those that fit, in two calls."""
        pairs = for_each(records, lambda record: to_pair(record, format, with_target=self.labelled))
        return encode_each(pairs, self._tokenize, self._example)

    def _tokenize(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        if not pairs:
            return []
        plain = {"return_attention_mask": False, "verbose": False}
        sources = self.tokenizer([self.prefix + pair.source for pair in pairs], **plain)
        if not self.labelled:
            return [(list(ids), []) for ids in sources["input_ids"]]
        targets = self.tokenizer(text_target=[pair.target for pair in pairs], **plain)
        return [
            (list(source), self._ended(target))
            for source, target in zip(sources["input_ids"], targets["input_ids"], strict=True)
        ]

    def _ended(self, target: Sequence[int]) -> list[int]:
        # mBART and NLLB put the language behind EOS, so it need not be the very last.
        return list(target) if self.eos_id in target[-2:] else [*target, self.eos_id]

    def _says_nothing(self, ids: Sequence[int]) -> bool:
        """Whether nothing but special tokens and spaces is left of a text."""
        if self.tokenizer.unk_token_id not in ids:
            return self.special_ids.issuperset(ids)
        return not self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _example(self, pair: Pair, tokens: tuple[list[int], list[int]]) -> list[Example]:
        source, target = tokens
        sides = {"source": source, **({"target": target} if self.labelled else {})}
        if empty := [name for name, ids in sides.items() if self._says_nothing(ids)]:
            raise RowError(
                f"the tokenizer knows no character of `{' and '.join(empty)}`",
                "take a model of this language, or drop the row",
                "unknown characters",
            )
        lost = lost_target = 0
        too_long = len(target) > self.max_target_tokens
        if too_long and self.over_length == "raise":
            raise RowError(
                f"its target has {len(target)} tokens, task_settings.max_target_len = "
                f"{self.max_target_tokens}",
                f"{len(target)} or more would hold it, data.over_length: truncate cuts its end, "
                "data.over_length: drop leaves the row out",
                "long target",
            )
        if self.over_length == "truncate":
            lost = lost_target = max(0, len(target) - self.max_target_tokens)
            target, too_long = target[: self.max_target_tokens], False
            if over := max(0, len(source) - self.max_source_tokens):
                lost += over
                ending = [source[-1]] if source[-1] in self.special_ids else []
                source = [*source[: self.max_source_tokens - len(ending)], *ending]
        example = Example(
            source,
            columns={"target": target},
            reference=pair.target if self.labelled else None,
            lost_tokens=lost,
            lost_trained_tokens=lost_target,
            too_long=too_long,
        )
        return [example]

    def collate(self, dataset: EncodedDataset, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Tensors of one micro-batch, both sides padded on the right.

        Returns:
            `input_ids` and `attention_mask` (B, S); with targets `labels` (B, T), -100 after each
            target's end. They are not shifted: position t is what the decoder shall say at t.
        """
        batch = padded([dataset.input_ids(index) for index in rows], self.tokenizer.pad_token_id)
        if self.labelled:
            targets = [dataset.column(index, "target") for index in rows]
            batch["labels"] = pad_rows(targets, IGNORED)
        return batch

    def findings(self, dataset: EncodedDataset) -> Findings:
        """How long targets are, and which were cut or merely repeat their source."""
        if not self.labelled:
            return Findings()
        targets = [dataset.column(index, "target") for index in range(len(dataset))]
        lengths = np.array([len(target) for target in targets])
        found = Findings(
            facts=[
                ("target tokens", f"{int(lengths.sum()):,}"),
                (
                    "target length",
                    f"median {int(np.median(lengths))}, longest {int(lengths.max())}, limit "
                    f"{self.max_target_tokens}",
                ),
            ]
        )
        cut = [index for index, ids in enumerate(targets) if self.eos_id not in ids[-2:]]
        if cut:
            found.warnings.append(
                f"targets cut to task_settings.max_target_len, which are trained without an end: "
                f"{len(cut)} (first: {dataset.where(cut[0])})"
            )
        same = [i for i, ids in enumerate(targets) if np.array_equal(ids, dataset.input_ids(i))]
        if same:
            found.warnings.append(
                f"rows whose target is their source: {len(same)} (first: "
                f"{dataset.where(same[0])}); the model learns to copy"
            )
        return found

    def pieces(self, dataset: EncodedDataset, index: int) -> list[tuple[str, bool]]:
        """Source and target as the tokenizer gives them back."""
        source = self.tokenizer.decode(dataset.input_ids(index).tolist())
        target = dataset.column(index, "target").tolist() if self.labelled else []
        return [(source, False), (" -> ", False), (self.tokenizer.decode(target), True)]

    def reference(self, dataset: EncodedDataset, index: int) -> Any:
        """The target's text as it was given."""
        return dataset.reference(index)

    def model_settings(self) -> dict[str, Any]:
        """Nothing: the model is as its checkpoint says."""
        return {}
