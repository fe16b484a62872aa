"""The order of a run is a function of numbers; packed rows give the loss of unpacked ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from qlora_trainer.data.batches import ORDERS, BatchPlan, collate, row_layout
from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.encode import Example
from qlora_trainer.data.store import Store, StoreWriter, read_meta

VOCABULARY = 64
PAD = 0


def stored(folder, examples):
    """A data set of these (ids, trained) pairs, on disk as always."""
    with StoreWriter(folder) as writer:
        for number, (ids, trained) in enumerate(examples):
            writer.add(Example(list(ids), tuple(trained)), f"row {number}", 0)
        writer.finish({})
    store = Store(folder, read_meta(folder))
    return EncodedDataset(store, np.arange(len(store)), ("test",))


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(0)
    examples = []
    for length in (5, 17, 3, 30, 9, 12, 2, 21, 6, 11, 14):
        start = int(rng.integers(1, length))
        examples.append((rng.integers(1, VOCABULARY, length).tolist(), [(start, length)]))
    return stored(tmp_path / "store", examples)


LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=60)


@given(
    lengths=LENGTHS,
    size=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    packing=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_every_epoch_has_every_example_once_and_equally_many_micro_batches(
    lengths, size, order, packing, seed
):
    plan = BatchPlan(np.array(lengths), size, seed, packing, 32, order)
    rows, tokens = plan.largest_shape()
    for epoch in (0, 1, 5):
        batches = plan.epoch(epoch)
        assert len(batches) == len(plan)
        assert sorted(i for batch in batches for row in batch for i in row) == list(
            range(len(lengths))
        )
        assert sum(len(batch) < size for batch in batches) <= 1
        for batch in batches:
            assert 1 <= len(batch) <= rows
            assert max(sum(lengths[i] for i in row) for row in batch) <= tokens


def test_any_micro_batch_is_known_without_those_before_it():
    lengths = np.arange(1, 40)
    for packing in (False, True):
        whole = BatchPlan(lengths, 3, seed=7, packing=packing, capacity=64)
        numbers = range(3 * len(whole))
        in_order = [whole.micro_batch(number) for number in numbers]
        fresh = BatchPlan(lengths, 3, seed=7, packing=packing, capacity=64)
        assert [fresh.micro_batch(n) for n in reversed(numbers)] == in_order[::-1]


def test_epochs_and_seeds_differ():
    lengths = np.full(50, 4)
    for packing in (False, True):
        plans = [BatchPlan(lengths, 2, seed, packing, 16) for seed in (0, 1)]
        assert plans[0].epoch(0) != plans[0].epoch(1)
        assert plans[0].epoch(0) != plans[1].epoch(0)


def test_the_order_of_this_seed_never_changes():
    """Pinned: another order in another version would break exact resume."""
    plan = BatchPlan(np.arange(1, 9), 3, seed=42)
    assert plan.epoch(0) == [[[4], [3], [1]], [[2], [0], [5]], [[7], [6]]]


def test_packed_neighbours_change_between_epochs():
    plan = BatchPlan(np.full(40, 8), 1, packing=True, capacity=16)
    pairs = [{tuple(sorted(batch[0])) for batch in plan.epoch(epoch)} for epoch in (0, 1)]
    assert pairs[0] != pairs[1]


def test_by_length_pads_as_little_as_can_be():
    lengths = np.random.default_rng(1).integers(1, 500, 2001)

    def padded(plan):
        return sum(len(b) * max(lengths[r[0]] for r in b) for b in plan.epoch(0))

    least = sum(8 * int(longest) for longest in -np.sort(-lengths)[:2000:8]) + lengths.min()
    assert padded(BatchPlan(lengths, 8, order="by_length")) == least < 1.01 * lengths.sum()
    windows = BatchPlan(lengths, 8, order="by_length", mega_batch_mult=50)
    assert least < padded(windows) < 1.05 * lengths.sum() < padded(BatchPlan(lengths, 8))


def test_by_length_epochs_differ_in_order_and_in_neighbours():
    plan = BatchPlan(np.arange(400) // 20, 8, order="by_length")
    first, second = plan.epoch(0), plan.epoch(1)
    assert [len(batch) for batch in first] == [8] * 50
    assert {frozenset(r[0] for r in b) for b in first} != {
        frozenset(r[0] for r in b) for b in second
    }
    shortest_to_longest = sorted(first, key=lambda batch: batch[0][0])
    assert first not in (shortest_to_longest, shortest_to_longest[::-1])


def test_the_order_by_length_that_0_1_0_had_never_changes():
    """Pinned as 0.1.0 gave it, with two micro-batches sorted at once in place of its 50."""
    plan = BatchPlan(np.arange(1, 12), 2, seed=42, order="by_length", mega_batch_mult=2)
    assert plan.epoch(0) == [[[1], [0]], [[5]], [[7], [6]], [[10], [2]], [[9], [8]], [[4], [3]]]


def test_given_keeps_the_order():
    plan = BatchPlan(np.array([3, 1, 2]), 2, order="given")
    assert plan.epoch(0) == plan.epoch(1) == [[[0], [1]], [[2]]]


def test_positions_restart_and_the_first_label_of_every_example_is_ignored(tmp_path):
    dataset = stored(tmp_path / "s", [([5, 6, 7], [(0, 3)]), ([8, 9], [(0, 2)])])
    batch = collate(dataset, [[0, 1], [1]], pad_id=PAD, packed=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert "attention_mask" not in batch


def test_unpacked_rows_have_a_mask_only_where_there_is_padding(dataset):
    padded = collate(dataset, [[0], [2]], pad_id=PAD)
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert padded["labels"][1, 3:].tolist() == [-100, -100]
    assert "attention_mask" not in collate(dataset, [[0]], pad_id=PAD)


def test_a_width_is_rounded_up(dataset):
    batch = collate(dataset, [[0], [2]], pad_id=PAD, pad_to_multiple_of=8)
    assert batch["input_ids"].shape == (2, 8)


def test_flash_attention_and_the_unknown_get_one_flat_row(dataset):
    assert row_layout("sdpa") == row_layout("eager") == "rows"
    assert row_layout("flash_attention_2") == row_layout("kernels-community/x") == "flat"
    batch = collate(dataset, [[0, 2], [4]], pad_id=PAD, packed=True, layout="flat")
    assert batch["input_ids"].shape == (1, 5 + 3 + 9)


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # wide, so that leaked attention would show
}
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "mistral-window-8": MistralConfig(**TINY, sliding_window=8),
    "gemma2-window-8": Gemma2Config(**TINY, sliding_window=8),
    "gemma3-window-8": Gemma3TextConfig(**TINY, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


def loss_sum(model, batch):
    """Summed over trained tokens, in float64."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits[:, :-1].double()
    targets = batch["labels"][:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in CONFIGS
        for attention in ("sdpa", "eager")
        if (name, attention) != ("gemma2-window-8", "sdpa")  # transformers has no such pair
    ],
)
def test_packed_loss_equals_unpacked_loss(dataset, name, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation=attention, dtype=torch.float32
    ).eval()
    alone = sum(loss_sum(model, collate(dataset, [[i]], pad_id=PAD)) for i in range(len(dataset)))
    padded = loss_sum(model, collate(dataset, [[i] for i in range(len(dataset))], pad_id=PAD))
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=0)
    for layout in ("rows", "flat"):
        plan = BatchPlan(dataset.lengths, 3, packing=True, capacity=40)
        batches = [
            collate(dataset, rows, pad_id=PAD, packed=True, layout=layout, pad_to_multiple_of=8)
            for rows in plan.epoch(0)
        ]
        assert layout == "flat" or any((b["input_ids"] == PAD).any() for b in batches)
        packed = sum(loss_sum(model, batch) for batch in batches)
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)


def test_the_equality_above_would_fail_without_restarting_positions(dataset):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32).eval()
    alone = sum(loss_sum(model, collate(dataset, [[i]], pad_id=PAD)) for i in (0, 1))
    joined = collate(dataset, [[0, 1]], pad_id=PAD, packed=True)
    joined["position_ids"] = torch.arange(joined["input_ids"].shape[1])[None]
    with torch.no_grad():
        assert abs(float(loss_sum(model, joined) / alone) - 1) > 1e-3


def test_packed_gradients_equal_unpacked_gradients(dataset):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight
    plan = BatchPlan(dataset.lengths, 2, packing=True, capacity=40)
    for rows in plan.epoch(0):
        loss_sum(model, collate(dataset, rows, pad_id=PAD, packed=True)).backward()
    packed, weight.grad = weight.grad.clone(), None
    for index in range(len(dataset)):
        loss_sum(model, collate(dataset, [[index]], pad_id=PAD)).backward()
    torch.testing.assert_close(packed, weight.grad, rtol=1e-4, atol=1e-5)
