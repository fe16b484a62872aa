"""Streamed layers: the bits of a whole model, at most two on the device, copies as promised."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_trainer.base.layer_stream import HostStore, stream_of, streamed_layers
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.base.transfers import Transfers
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.loss_path import LossPath
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.step import seed_random
from qlora_trainer.training.techniques import Techniques, apply_techniques

CPU = torch.device("cpu")
LAYERS = 5
PLAIN = BaseSpec("nf4", compute_dtype=torch.float32)
CONFIG = LlamaConfig(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
IDS = torch.arange(1, 25).view(2, 12)


class Watched(Transfers):
    """Real copies, counted."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.copies = 0

    def to_device(self, *args: Any) -> Any:
        self.copies += 1
        return super().to_device(*args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(path)
    return path


def adapted(folder: Path, *, stream: bool, dropout: float = 0.0, **spec: Any) -> Any:
    held = replace(PLAIN, stream_layers=stream)
    model = load_base(folder, AutoModelForCausalLM, held, CPU)
    adapter = AdapterSpec(rank=2, alpha=4, dropout=dropout, **spec)
    inject_adapter(model, adapter, dtype=torch.float32, seed=0)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    task = CausalLM(LossPath(True, ""))
    model.train()
    model.zero_grad()
    for index in range(2):
        seed_random(1, 2, index)
        ids = IDS + index
        task.loss_sum(model, task.prepare({"input_ids": ids, "labels": ids})).backward()
    return {n: p.grad.clone() for n, p in adapter_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("plan", ["recompute", "offload"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("fast", [False, True])
def test_streaming_changes_no_bit_of_any_gradient(
    folder: Path, plan: Any, dropout: float, fast: bool
) -> None:
    found = []
    for stream in (False, True):
        model = adapted(folder, stream=stream, dropout=dropout)
        apply_techniques(model, Techniques(fused_mlp=fast, tiled_norms=fast, fused_qkv=fast))
        plan_activations(model, decoder_layers(model), plan)
        found.append(gradients(model))
    whole, streamed = found
    assert whole.keys() == streamed.keys()
    assert len(whole) == LAYERS * 7 * 2
    assert all(torch.equal(whole[name], streamed[name]) for name in whole)


def test_two_layers_at_most_and_the_next_one_always_on_its_way(folder: Path) -> None:
    model = adapted(folder, stream=True)
    plan_activations(model, decoder_layers(model), "recompute")
    stream = stream_of(model)
    assert stream is not None
    assert isinstance(stream.store, HostStore)
    watched = stream.store.transfers = Watched()
    present: list[list[int]] = []
    for _, layer in decoder_layers(model):
        layer.mlp.register_forward_pre_hook(lambda *_: present.append(stream.present))
    gradients(model)
    up, down = [[0, 1], [1, 2], [2, 3], [3, 4], [3, 4]], [[3, 4], [2, 3], [1, 2], [0, 1], [0, 1]]
    assert present == 2 * (up + down)
    # the first pass brings all; each later one finds the two where it turns round
    assert watched.copies == LAYERS + 3 * (LAYERS - 2)


def test_what_is_away_is_no_number(folder: Path) -> None:
    model = adapted(folder, stream=True)
    stream = stream_of(model)
    assert stream is not None
    stream.bring(0)
    first, last = (model.model.layers[i].input_layernorm.weight for i in (0, LAYERS - 1))
    assert torch.equal(first, torch.ones(64))
    assert last.shape == (64,)
    assert last.untyped_storage().nbytes() == 4
    assert bool(last.isnan().all())
    projection = model.model.layers[LAYERS - 1].mlp.up_proj.base
    assert bool(projection.dense_weight().isnan().all())


def test_evaluation_and_generation_keep_their_bits(folder: Path) -> None:
    whole, streamed = (adapted(folder, stream=stream).eval() for stream in (False, True))
    with torch.no_grad():
        expected, found = whole(input_ids=IDS).logits, streamed(input_ids=IDS).logits
    assert torch.equal(expected, found)
    written = [m.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
               for m in (whole, streamed)]  # fmt: skip
    assert torch.equal(*written)


def test_layers_below_the_lowest_adapter_come_once_a_pass(folder: Path) -> None:
    whole, streamed = (adapted(folder, stream=s, layers=(3, 4)) for s in (False, True))
    for model in (whole, streamed):
        plan_activations(model, decoder_layers(model), "recompute")
    expected, found = gradients(whole), gradients(streamed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_streamed_module_cannot_be_trained_in_full(folder: Path) -> None:
    with pytest.raises(UserError, match=r"layers.0.input_layernorm comes and goes with its layer"):
        adapted(folder, stream=True, modules_to_save=("layers.0.input_layernorm",))


def test_what_cannot_be_streamed_is_refused() -> None:
    model: Any = AutoModelForCausalLM.from_config(CONFIG)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match="layers of LlamaForCausalLM share weights"):
        streamed_layers(model)
    with pytest.raises(UserError, match="Linear has no stack of layers"):
        streamed_layers(torch.nn.Linear(2, 2))
