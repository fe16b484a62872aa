"""Techniques that only a card can show: copies beside the computing, tiles on the device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.base.packed_attention import example_lengths, use_packed_attention
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.loss_path import LossPath
from qlora_trainer.tasks.task import to_device
from qlora_trainer.training.activations import plan_activations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
LAYERS = 6
HIDDEN = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def trained_once(folder: Path, *, plan: Any, **held: Any) -> tuple[dict[str, Tensor], int]:
    """Gradients of one step, and the most memory it took on the card."""
    device = torch.device("cuda")
    spec = replace(BaseSpec("nf4", compute_dtype=torch.bfloat16), **held)
    model: Any = load_base(folder, AutoModelForCausalLM, spec, device)
    inject_adapter(model, AdapterSpec(rank=4, alpha=8), dtype=torch.bfloat16, seed=0)
    plan_activations(model, decoder_layers(model), plan)
    task = CausalLM(LossPath(True, ""))
    ids = torch.arange(256).view(2, 128)
    batch = to_device(task.prepare({"input_ids": ids, "labels": ids}), device)
    model.train()
    torch.cuda.reset_peak_memory_stats()
    task.loss_sum(model, batch).backward()
    torch.cuda.synchronize()
    gradients = {
        name: p.grad.cpu() for name, p in adapter_parameters(model).items() if p.grad is not None
    }
    return gradients, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("plan", ["recompute", "offload"])
def test_streamed_layers_train_as_whole_ones_in_less_memory(folder: Path, plan: Any) -> None:
    whole, needed = trained_once(folder, plan=plan)
    streamed, less = trained_once(folder, plan=plan, stream_layers=True)
    assert whole.keys() == streamed.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(streamed[name], gradient, rtol=1e-2, atol=1e-4)
    layer = HIDDEN * HIDDEN * (2 + 1 + 3 * 4) // 2  # bytes of one in NF4, without its scales
    assert needed - less > (LAYERS - 3) * layer  # two of them are there at a time


def test_a_head_of_the_host_gives_the_same_gradients(folder: Path) -> None:
    whole, _ = trained_once(folder, plan="recompute")
    lent, _ = trained_once(folder, plan="recompute", head_on_host=True)
    assert whole.keys() == lent.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(lent[name], gradient, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_head_multiplies_on_the_card_as_on_the_cpu(bits: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(256, 1000, bias=False)
    made = QuantizedHead.quantize(
        head, bits=bits, block_size=64, dtype=torch.float32, tile_elements=2**16
    )
    x = torch.randn(7, 256)
    here = made.product(x, None)
    gradient = made.input_gradient(here)
    there = made.to("cuda")
    product = there.product(x.cuda(), None)
    torch.testing.assert_close(product.cpu(), here, rtol=1e-3, atol=1e-3)
    back = there.input_gradient(here.cuda())
    torch.testing.assert_close(back.cpu(), gradient, rtol=1e-3, atol=1e-3)


def test_packed_examples_at_once_are_the_examples_alone(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    lengths = [40, 1, 70, 17]
    rows = torch.arange(sum(lengths), device="cuda").split(lengths)
    alone = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in rows], dim=1)
    assert use_packed_attention(model)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    given = {"input_ids": torch.cat(rows)[None], "position_ids": positions.cuda()}
    masked = {**given, "attention_mask": example_lengths(positions)}
    packed = model(**masked, use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=5e-2, atol=5e-2)
