"""The proof's two models: whole where they fit, a layer at a time where not, and never more."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from qlora_trainer.base.device_memory import Memory, memory_left
from qlora_trainer.base.load import BaseSpec
from qlora_trainer.base.machine import host_memory_bytes
from qlora_trainer.errors import UserError
from qlora_trainer.export import plain, turns
from qlora_trainer.export.export import builtin_proof
from qlora_trainer.export.fresh import last_words
from qlora_trainer.export.holding import (
    Holding,
    beside_weights_bytes,
    choose_export_holding,
    choose_holding,
    export_needs,
    reference_needs,
)
from qlora_trainer.export.merged import prepare
from qlora_trainer.export.proof import ProofRequest
from qlora_trainer.export.reference import trained_in_parts
from tests.export import tiny

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30
SEVEN_BILLION = {"weight": (7 * 10**9, True)}
# Llama 3.1 8B: embeddings and head of 128,256 rows stay in 16 bit.
EIGHT_BILLION = {"layers": (6_979_000_000, True), "embeddings and head": (1_051_000_000, False)}
ROWS = [{"input_ids": torch.arange(512), "labels": torch.arange(512)}]


def test_layers_are_taken_one_by_one_where_the_model_does_not_fit_and_it_is_said():
    said = []
    request = ProofRequest([], say=said.append)

    def chosen(precisions, request=request, possible=True):
        return choose_holding(
            request, reference_needs(SEVEN_BILLION, BaseSpec("nf4"), precisions, CPU),
            export_needs(7 * 10**9, torch.float16, precisions, CPU), Memory(6 * 10**9),
            by_layer_possible=possible,
        )  # fmt: skip

    native = reference_needs(SEVEN_BILLION, BaseSpec("nf4"), ("native",), CPU)
    assert native.host_bytes == pytest.approx(7e9 * 0.516)
    assert chosen(("native",)) == Holding("model", "model")
    assert said == []
    both = ("native", "fp32")
    assert chosen(both) == Holding("model", "layer")
    assert said == [
        "running the export layer by layer: the export as a whole needs about 26.1 GiB of memory, "
        "5.6 GiB are available"
    ]
    assert chosen(both, replace(request, by="model")) == Holding("model", "model")
    assert chosen(both, replace(request, by="layer")) == Holding("layer", "layer")
    with pytest.raises(UserError, match=r"layer by layer \(as asked\): the base is packed"):
        chosen(both, replace(request, by="layer"), possible=False)


@pytest.mark.parametrize(
    ("free_gib", "expected"),
    [(24, Holding("model", "model")), (16, Holding("model", "layer")),
     (8, Holding("model", "layer")), (5, Holding("layer", "layer"))],
)  # fmt: skip
def test_on_a_card_its_own_free_memory_decides_however_much_ram_there_is(free_gib, expected):
    said = []
    request = ProofRequest(ROWS, device=CARD, say=said.append)
    beside = beside_weights_bytes(ROWS, 128_256, torch.bfloat16)
    found = choose_holding(
        request, reference_needs(EIGHT_BILLION, BaseSpec("nf4"), ("native",), CARD, beside),
        export_needs(8_030_000_000, torch.float16, ("native",), CARD, beside),
        Memory(256 * GIB, free_gib * GIB), by_layer_possible=True,
    )  # fmt: skip
    assert found == expected
    what = "base + adapter" if expected.reference == "layer" else "the export"
    assert len(said) == (expected.export == "layer")
    assert all(f"{what} as a whole needs" in line for line in said)
    assert all("of the memory of cuda:0" in line for line in said)


def test_a_packed_base_is_opened_whole_and_only_its_export_taken_by_layers():
    request = ProofRequest(ROWS, device=CARD)
    export = Memory(0, 16 * GIB)

    def chosen(free_gib):
        left = Memory(64 * GIB, free_gib * GIB)
        return choose_holding(request, Memory(0, 7 * GIB), export, left, by_layer_possible=False)

    assert chosen(12) == Holding("model", "layer")
    with pytest.raises(UserError, match=r"packed in 4 bits.*--proof-by model.*--no-proof"):
        chosen(6)


def test_an_export_is_mapped_on_a_cpu_and_two_bytes_a_weight_on_a_card():
    native, both = ("native",), ("native", "fp32")
    assert export_needs(1000, torch.float16, native, CPU) == Memory(0)
    assert export_needs(1000, torch.float16, native, CARD) == Memory(0, 2000)
    assert export_needs(1000, torch.float32, native, CARD, 7) == Memory(0, 4007)
    assert export_needs(1000, torch.float16, both, CPU) == Memory(4000)
    assert export_needs(1000, torch.float16, both, CARD, 7) == Memory(4000, 4007)
    asked = ProofRequest([], device=CARD, by="model")
    assert choose_export_holding(asked, "the file", Memory(0, 2), Memory(0, 1)) == "model"


def test_logits_of_the_longest_row_count_three_times():
    short = {"input_ids": torch.arange(9), "labels": torch.arange(9)}
    most = beside_weights_bytes([short, *ROWS], 1000, torch.bfloat16)
    assert most - beside_weights_bytes([], 0, torch.bfloat16) == 512 * 1000 * (2 + 2 + 4)
    picture = {"pixel_values": torch.zeros(3, 8, 8), "labels": torch.tensor(1)}
    assert beside_weights_bytes([picture], 10, torch.float32) == 10 * 12 + GIB


def test_without_a_card_what_is_left_is_the_ram_that_is_available():
    left = memory_left(CPU)
    assert left.card_bytes == 0
    assert 0 < left.host_bytes <= host_memory_bytes()[0]


def ended(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )  # fmt: skip


def test_a_comparison_that_ran_out_of_memory_names_the_way_out():
    card_full = ended(
        "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')"
    )
    words = last_words(card_full, "model")
    assert "ran out of memory (torch.OutOfMemoryError: CUDA out of memory. Tried to" in words
    assert words.endswith("or compare layer by layer (--proof-by layer)")
    assert last_words(card_full, "layer").endswith("or leave the proof out (--no-proof)")
    host_full = ended("import torch; torch.empty(2**60, dtype=torch.uint8)")
    assert "--proof-by layer" in last_words(host_full, "model")
    killed = ended("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "was killed" in last_words(killed, "model")
    assert "--proof-by layer" in last_words(killed, "model")
    other = last_words(ended("raise KeyError('rope_theta')"), "model")
    assert "KeyError: 'rope_theta'" in other
    assert "--proof-by" not in other


def loaded_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in tensors if t.device.type != "meta")


@pytest.mark.parametrize("side", ["reference", "export"])
def test_layer_by_layer_nothing_of_one_part_is_there_when_the_next_one_comes(bench, side):
    source = bench.source()
    source = replace(source, spec=BaseSpec("nf4", compute_dtype=torch.bfloat16))
    request = builtin_proof(source)
    if side == "reference":
        prepared = prepare(
            source.base_folder, source.adapter_folder, source.model_class, source.spec, dtype="bf16"
        )
        model, parts = trained_in_parts(source, prepared.adapter, CPU)
    else:
        model = tiny.load(source.base_folder)
        model.config.use_cache = False
        parts = turns.MappedParts(model, lambda _: torch.bfloat16, CPU)
    outside, taken = loaded_bytes(model), []

    def load(part: str) -> None:
        assert loaded_bytes(model) == outside
        parts.load(part)
        taken.append((part, loaded_bytes(model) - outside))

    def run(number: int) -> torch.Tensor:
        return plain.compared_logits(model, request.rows[number], shift=True, device=CPU)[0]

    found = turns.run_in_turns(
        len(request.rows), run, parts.parts, load=load, unload=parts.unload
    )  # fmt: skip
    assert len(list(found)) == len(request.rows)
    assert loaded_bytes(model) == outside
    assert {name for name, _ in taken} == set(parts.parts)
    assert len(taken) == len(parts.parts)  # once for all rows
    assert all(size > 0 for _, size in taken)
    assert outside < min(size for name, size in taken if ".layers." in name)
