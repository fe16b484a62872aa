"""The gate's report as plain data, and the sentences that say what to look at in it."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LengthSummary:
    """Tokens per row. `histogram` holds (from, to, rows) with `to` excluded."""

    shortest: int
    median: int
    mean: float
    p95: int
    p99: int
    longest: int
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True)
class PartReport:
    """Rows and tokens of the training or the evaluation part.

    What was cut, dropped or read is counted per source, so for a part held out of the training
    sources it covers both parts.
    """

    rows: int
    distinct_rows: int
    tokens: int
    trained_tokens: int
    masked_tokens: int
    lengths: LengthSummary
    long_rows: int
    truncated_rows: int
    dropped_rows: int
    lost_tokens: int
    lost_trained_tokens: int
    cut_answers: int
    copies: int
    first_copies: list[tuple[str, str]]
    sources: list[dict[str, Any]]
    fingerprint: str


@dataclass(frozen=True)
class PackingSummary:
    """Packed rows per epoch and the share of their positions that holds tokens."""

    rows: int
    capacity: int
    efficiency: float


@dataclass(frozen=True)
class Sample:
    """One example as pieces of text, each with whether it is trained."""

    where: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class GateReport:
    """All that `qlora check` shows about the data.

    Attributes:
        train: The training part.
        evaluation: The evaluation part, if there is one.
        packing: Present if packing is on.
        labels: Distinct short answers and their rows, most frequent first; empty if the answers
            are not classes.
        end_of_turn: The token most answers end with.
        unended_rows: Rows whose last trained token does not end an answer.
        shared_rows: Evaluation rows that also stand in training.
        first_shared: Where the first of them are, in evaluation and training.
        samples: Three examples.
        warnings: What to look at, one sentence each.
        facts: What else there is to see of the task: name and value.
    """

    train: PartReport
    evaluation: PartReport | None
    packing: PackingSummary | None
    labels: list[tuple[str, int]]
    end_of_turn: str
    unended_rows: int
    shared_rows: int
    first_shared: list[tuple[str, str]]
    samples: list[Sample]
    warnings: list[str]
    facts: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain lists and dictionaries."""
        return asdict(self)


def find_copies(report: GateReport) -> list[str]:
    """Rows that stand in training more than once, or in the evaluation too."""
    train, found = report.train, []
    if report.shared_rows:
        evaluation, twin = report.first_shared[0]
        found.append(
            f"evaluation rows that also stand in training: {report.shared_rows} (first: "
            f"{evaluation} is {twin}); the held-out loss will flatter: remove them from one side"
        )
    if train.copies:
        original, copy = train.first_copies[0]
        found.append(
            f"exact copies among the training rows: {train.copies} (first: {copy} is {original}); "
            "to use rows more often, set the source's weight"
        )
    return found


def find_warnings(report: GateReport, tokenizer: Any, *, stops: bool) -> list[str]:
    """What a person should look at; `stops`: generation stops at the end of turn by itself."""
    train, found = report.train, find_copies(report)
    if train.truncated_rows:
        found.append(
            f"rows cut to data.max_seq_len: {train.truncated_rows}; "
            f"tokens lost: {train.lost_tokens}, "
            f"answers cut: {train.cut_answers}"
        )
    if train.dropped_rows:
        found.append(
            f"rows longer than max_seq_len and dropped: {train.dropped_rows}; tokens lost: "
            f"{train.lost_tokens}"
        )
    unended = report.unended_rows - train.cut_answers
    if unended > 0:
        found.append(
            f"rows that do not end with an end-of-turn or EOS token: {unended}; the model will not "
            "learn to stop: check the chat template"
        )
    if not stops:
        found.append(
            f"answers end with {report.end_of_turn!r}, which is not the tokenizer's EOS "
            f"({tokenizer.eos_token!r}): generation must be told to stop there"
        )
    if report.labels and report.labels[0][1] > 0.9 * train.rows:
        answer, rows = report.labels[0]
        found.append(f"{rows} of {train.rows} rows have the same answer {answer!r}")
    for source in train.sources:
        found.extend(_source_warnings(source))
    return found


def _source_warnings(source: dict[str, Any]) -> list[str]:
    path, found = source["path"], []
    if source["split_chats"]:
        found.append(
            f"{path}: chats split into one example per answer, since the chat template rewrites "
            f"earlier turns: {source['split_chats']} ({source['rows']} rows, {source['examples']} "
            "examples); `data.loss_on: last` trains the last answers only"
        )
    if source["merged_joins"]:
        found.append(
            f"{path}: rows whose prompt is cut into other tokens once its answer follows, so it is "
            f"not trained as it will be asked: {source['merged_joins']}; end prompts without white "
            "space and begin completions with it"
        )
    if source["control_rows"]:
        found.append(
            f"{path}: rows that hold special tokens such as the end of turn in their text: "
            f"{source['control_rows']}; the model reads them as the real ones"
        )
    return found
