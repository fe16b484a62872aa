"""What the data is, seen before anything heavy starts: counts, balance, copies, three examples.

What cannot be trained on was refused while the rows were encoded. What is left here is what a
person should look at: tokens trained and masked, what truncation cost, rows that are copies of
others or stand in the evaluation too, answers that do not end. The report is plain data; colouring
is the command line's business.
"""

import itertools
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np

from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.order import hash_order
from qlora_trainer.data.packing import pack
from qlora_trainer.data.report import (
    GateReport,
    LengthSummary,
    PackingSummary,
    PartReport,
    Sample,
    find_copies,
    find_warnings,
)
from qlora_trainer.data.rows import RowEncoder

__all__ = ["GateReport", "PartReport", "Sample", "decode_pieces", "inspect_data", "inspect_rows"]

_SHORT_ANSWER_TOKENS = 8
_DRAWN_FOR_ONE = 10  # sentences without an entity are many
_MOST_LABELS = 100  # more distinct short answers than this are no classes
_Array = np.ndarray[Any, np.dtype[Any]]


def inspect_data(
    train: EncodedDataset,
    tokenizer: Any,
    *,
    evaluation: EncodedDataset | None = None,
    packing_capacity: int | None = None,
    stop_ids: Collection[int] = (),
    samples: int = 3,
) -> GateReport:
    """Look through encoded data.

    Args:
        train: Training examples.
        tokenizer: The one they were encoded with.
        evaluation: Evaluation examples.
        packing_capacity: Tokens of a packed row, if packing is on.
        stop_ids: Ids generation stops at besides EOS (`generation_config.eos_token_id`).
        samples: How many examples to show.
    """
    shared, first_shared = _shared(train, evaluation)
    last_ids, labels = _answers(train, tokenizer)
    ends = {int(tokenizer.eos_token_id), *stop_ids}
    specials = ends | set(tokenizer.all_special_ids)
    specials |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end_id = last_ids.most_common(1)[0][0]
    report = GateReport(
        train=_part(train),
        evaluation=_part(evaluation) if evaluation is not None else None,
        packing=_packing(train, packing_capacity) if packing_capacity else None,
        labels=labels,
        end_of_turn=tokenizer.decode([end_id]),
        unended_rows=sum(count for token, count in last_ids.items() if token not in specials),
        shared_rows=shared,
        first_shared=first_shared,
        samples=_samples(train, tokenizer, samples),
        warnings=[],
    )
    stops = end_id in ends
    report.warnings.extend(find_warnings(report, tokenizer, stops=stops or end_id not in specials))
    return report


def inspect_rows(
    train: EncodedDataset,
    encoder: RowEncoder,
    *,
    evaluation: EncodedDataset | None = None,
    samples: int = 3,
) -> GateReport:
    """Look through encoded data of a task that is not next-token prediction.

    Args:
        train: Training examples.
        encoder: What made them; knows what there is to see.
        evaluation: Evaluation examples.
        samples: How many examples to show.
    """
    shared, first_shared = _shared(train, evaluation)
    found = encoder.findings(train)
    report = GateReport(
        train=_part(train),
        evaluation=_part(evaluation) if evaluation is not None else None,
        packing=None,
        labels=found.labels,
        end_of_turn="",
        unended_rows=0,
        shared_rows=shared,
        first_shared=first_shared,
        samples=_telling(train, encoder, samples),
        warnings=[],
        facts=found.facts,
    )
    report.warnings.extend([*find_copies(report), *found.warnings])
    return report


def _part(dataset: EncodedDataset) -> PartReport:
    counts = dataset.counts
    used = np.unique(dataset.rows)
    copies, first_copies = _copies(dataset, used)
    tokens, trained = int(dataset.lengths.sum()), int(dataset.trained_counts.sum())
    truncates = counts["over_length"] == "truncate"
    return PartReport(
        rows=len(dataset),
        distinct_rows=len(used) - copies,
        tokens=tokens,
        trained_tokens=trained,
        masked_tokens=tokens - trained,
        lengths=_lengths(dataset.lengths),
        long_rows=counts["long_rows"],
        truncated_rows=counts["long_rows"] if truncates else 0,
        dropped_rows=0 if truncates else counts["long_rows"],
        lost_tokens=counts["lost_tokens"],
        lost_trained_tokens=counts["lost_trained_tokens"],
        cut_answers=counts["cut_answers"],
        copies=copies,
        first_copies=first_copies,
        sources=list(counts["sources"]),
        fingerprint=dataset.fingerprint,
    )


def _lengths(lengths: _Array) -> LengthSummary:
    marks = np.percentile(lengths, [50, 95, 99], method="higher").astype(int).tolist()
    longest = int(lengths.max())
    edges = [0]
    while edges[-1] <= longest:  # powers of two: short chats and long documents in one picture
        edges.append(max(16, edges[-1] * 2))
    filled, _ = np.histogram(lengths, edges)
    bars = list(zip(edges[:-1], edges[1:], filled.tolist(), strict=True))
    return LengthSummary(
        int(lengths.min()), marks[0], float(lengths.mean()), marks[1], marks[2], longest, bars
    )


def _copies(dataset: EncodedDataset, used: _Array) -> tuple[int, list[tuple[str, str]]]:
    """Stored rows that repeat an earlier one, whatever the weights."""
    hashes = dataset.store.hashes[used]
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    copies = np.flatnonzero(original != np.arange(len(used)))
    where = dataset.store.where
    pairs = [(where(int(used[original[i]])), where(int(used[i]))) for i in copies[:5]]
    return len(copies), pairs


def _shared(
    train: EncodedDataset, evaluation: EncodedDataset | None
) -> tuple[int, list[tuple[str, str]]]:
    if evaluation is None:
        return 0, []
    hashes, first = np.unique(train.hashes, return_index=True)
    both = np.flatnonzero(np.isin(evaluation.hashes, hashes))
    pairs = []
    for index in both[:5].tolist():
        twin = int(first[np.searchsorted(hashes, evaluation.hashes[index])])
        pairs.append((evaluation.where(index), train.where(twin)))
    return len(both), pairs


def _answers(dataset: EncodedDataset, tokenizer: Any) -> tuple[Counter[int], list[tuple[str, int]]]:
    """How often each token ends a row's training, and the balance of short answers."""
    last: Counter[int] = Counter()
    short: Counter[bytes] = Counter()
    for index in range(len(dataset)):
        ids, trained = dataset.input_ids(index), dataset.trained(index)
        start, end = trained[-1]
        last[int(ids[end - 1])] += 1
        if end - start <= _SHORT_ANSWER_TOKENS and len(short) <= _MOST_LABELS:
            short[ids[start:end].tobytes()] += 1
    if len(short) > _MOST_LABELS or short.total() < 0.8 * len(dataset):
        return last, []
    if len(short) > 0.5 * short.total():
        return last, []  # hardly an answer comes twice: no classes
    texts: Counter[str] = Counter()
    for content, count in short.items():
        ids = np.frombuffer(content, np.int32).tolist()
        texts[tokenizer.decode(ids, skip_special_tokens=True).strip()] += count
    return last, texts.most_common()


def _packing(dataset: EncodedDataset, capacity: int) -> PackingSummary:
    rows = len(pack(dataset.lengths, capacity))
    return PackingSummary(rows, capacity, float(dataset.lengths.sum()) / (rows * capacity))


def _samples(dataset: EncodedDataset, tokenizer: Any, count: int) -> list[Sample]:
    return [
        Sample(dataset.where(i), decode_pieces(tokenizer, dataset.input_ids(i), dataset.trained(i)))
        for i in _drawn(dataset, count)
    ]


def _telling(dataset: EncodedDataset, encoder: RowEncoder, count: int) -> list[Sample]:
    """Examples in which something is marked, where there are such among some that are drawn."""
    drawn = _drawn(dataset, _DRAWN_FOR_ONE * count)
    found = [Sample(dataset.where(i), encoder.pieces(dataset, i)) for i in drawn]
    found.sort(key=lambda sample: not any(marked for _, marked in sample.pieces))  # stable
    return found[:count]


def _drawn(dataset: EncodedDataset, count: int) -> list[int]:
    """Examples drawn by hash among those of at most median length, so that they can be read."""
    readable = np.flatnonzero(dataset.lengths <= np.median(dataset.lengths))
    drawn = readable[hash_order(len(readable), 0)[:count]]
    return sorted(int(index) for index in drawn)


def decode_pieces(
    tokenizer: Any, input_ids: _Array, trained: list[tuple[int, int]]
) -> list[tuple[str, bool]]:
    """The text of an example in pieces, alternating between masked and trained.

    Pieces are differences of decoded prefixes: a piece decoded by itself would lose a leading
    space with some tokenizers.
    """
    cuts = [0, *(bound for span in trained for bound in span), len(input_ids)]
    ids = input_ids.tolist()
    texts = [
        tokenizer.decode(ids[:cut], clean_up_tokenization_spaces=False) if cut else ""
        for cut in cuts
    ]
    pieces = [
        (after[len(before) :], number % 2 == 1)
        for number, (before, after) in enumerate(itertools.pairwise(texts))
    ]
    return [piece for piece in pieces if piece[0]]
