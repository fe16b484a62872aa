"""What happens to examples longer than `max_seq_len`, and an exact count of what it costs.

`raise` (the default) refuses them, `truncate` cuts their end, `drop` leaves them out. Cutting takes
the end-of-turn with it: an answer that was cut is trained without an end, so a model never learns
to stop in the middle of a sentence. Such answers are counted apart, because they hurt most.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qlora_trainer.data.encode import Example
from qlora_trainer.data.faults import Fault, FaultLog
from qlora_trainer.errors import UserError

OVER_LENGTH = ("raise", "truncate", "drop")


@dataclass
class LengthPolicy:
    """Fits examples to `max_seq_len` and counts."""

    max_seq_len: int
    over_length: str
    rows: int = 0
    long_rows: int = 0
    lost_tokens: int = 0
    lost_trained_tokens: int = 0
    cut_answers: int = 0
    longest: int = 0
    first_long: list[str] = field(default_factory=list)
    long_lengths: Counter[int] = field(default_factory=Counter)

    def fit(self, example: Example, where: str, faults: FaultLog) -> Example | None:
        """The example as it is kept, or None; under `truncate`, an untrained rest is a fault."""
        self.rows += 1
        length = len(example.input_ids)
        self.longest = max(self.longest, length + example.lost_tokens)
        if length <= self.max_seq_len and not example.too_long:
            self.long_rows += example.lost_tokens > 0  # its encoder has cut it
            self.lost_tokens += example.lost_tokens
            self.lost_trained_tokens += example.lost_trained_tokens
            self.cut_answers += example.lost_trained_tokens > 0
            return example
        self.long_rows += 1
        self.long_lengths[length] += 1
        if len(self.first_long) < 20:
            self.first_long.append(f"{where}: {length} tokens")
        if self.over_length != "truncate":
            self.lost_tokens += length
            self.lost_trained_tokens += sum(end - start for start, end in example.trained)
            return None
        limit = self.max_seq_len
        trained = tuple((a, min(b, limit)) for a, b in example.trained if a < limit)
        lost = sum(b - a for a, b in example.trained) - sum(b - a for a, b in trained)
        self.lost_tokens += length - limit
        self.lost_trained_tokens += lost
        self.cut_answers += lost > 0
        if not trained:
            problem = (
                f"after cutting {length} tokens to data.max_seq_len = {limit} nothing is trained"
            )
            remedy = "raise data.max_seq_len, shorten the prompt, or set data.over_length: drop"
            faults.add(Fault(where, problem, remedy, "nothing trained after cutting"))
            return None
        return Example(
            example.input_ids[:limit], trained, example.merged_join, example.control_tokens
        )

    def check(self) -> None:
        """Refuse long rows under `raise`.

        Raises:
            UserError: There are some; it says which, and which settings would help.
        """
        if self.over_length != "raise" or not self.long_rows:
            return
        share = 100 * self.long_rows / self.rows
        ways = (
            f"data.max_seq_len: {self.longest} holds all"
            + self._nearly_all()
            + "; data.over_length: truncate cuts their ends "
            f"({sum(n * (t - self.max_seq_len) for t, n in self.long_lengths.items())} tokens); "
            f"data.over_length: drop leaves them out ({self.lost_tokens} tokens)"
        )
        raise UserError.from_faults(
            f"data.max_seq_len = {self.max_seq_len}: {self.long_rows} of {self.rows} rows "
            f"({share:.1f} %) are longer. {ways}. The first",
            self.first_long,
        )

    def _nearly_all(self) -> str:
        """` (N holds 99 %)` if that is clearly less than the longest."""
        over = 0
        for length in sorted(self.long_lengths, reverse=True):
            if over + self.long_lengths[length] > 0.01 * self.rows:
                return f" ({length} holds 99 %)" if length < 0.8 * self.longest else ""
            over += self.long_lengths[length]
        return ""

    def counts(self) -> dict[str, Any]:
        """The counts for the gate's report."""
        return {
            "max_seq_len": self.max_seq_len,
            "over_length": self.over_length,
            "long_rows": self.long_rows,
            "lost_tokens": self.lost_tokens,
            "lost_trained_tokens": self.lost_trained_tokens,
            "cut_answers": self.cut_answers,
            "longest": self.longest,
        }
