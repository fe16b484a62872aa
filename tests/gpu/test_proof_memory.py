"""What the proof leaves on a card, and how much of it a layer at a time takes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.base.device_memory import memory_left
from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.export import plain, turns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
CARD = torch.device("cuda", 0)
ROW = {"input_ids": torch.arange(64), "labels": torch.arange(64)}


def test_what_a_model_let_go_of_counts_as_left_on_the_card(smollm2: Path) -> None:
    before = memory_left(CARD).card_bytes
    model = load_base(smollm2, AutoModelForCausalLM, BaseSpec("nf4"), CARD)
    held = torch.cuda.memory_allocated(CARD)
    assert memory_left(CARD).card_bytes <= before - held
    del model
    assert memory_left(CARD).card_bytes > before - held / 2


def test_layer_by_layer_a_card_never_holds_half_of_the_export(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto").eval()
    model.config.use_cache = False
    whole = sum(parameter.nbytes for parameter in model.parameters())
    torch.cuda.reset_peak_memory_stats(CARD)
    before = torch.cuda.memory_allocated(CARD)
    parts = turns.MappedParts(model, None, CARD)
    found = turns.run_in_turns(
        1, lambda _: plain.compared_logits(model, ROW, shift=True, device=CARD)[0],
        parts.parts, load=parts.load, unload=parts.unload,
    )  # fmt: skip
    assert [logits.shape[0] for logits in found] == [63]
    # The largest part is the table of embeddings, a fifth of this model; logits take some 30 MB.
    assert torch.cuda.max_memory_allocated(CARD) - before < whole / 2
