"""Techniques go on together, change no loss, and tell what they could not be put on."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_trainer.base import tiled_attention
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.tiled_attention import use_tiled_attention
from qlora_trainer.lora.fuse import FusedGatedMLP
from qlora_trainer.lora.inject import adapted_layers
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.step import train_step
from qlora_trainer.training.techniques import Techniques, apply_techniques
from tests.training.tiny import CPU, adapted_llama, batch, optimizer_for

ALL = Techniques(fused_mlp=True, mlp_tile_tokens=16, tiled_norms=True, fused_qkv=True)


def losses(model: torch.nn.Module, steps: int = 8, *, chunked: bool = True) -> list[float]:
    task, optimizer = CausalLM.for_model(model, chunked=chunked), optimizer_for(model)
    model.train()
    found = []
    for step in range(steps):
        window = [task.prepare(batch(3, 20, seed=5))]
        result = train_step(
            model, window, task=task, optimizer=optimizer, learning_rate=1e-2, device=CPU, step=step
        )
        found.append(float(result.loss))
    return found


def test_a_run_with_all_techniques_has_the_losses_of_the_plain_run() -> None:
    plain = adapted_llama(layers=3)
    expected = losses(plain)
    model = adapted_llama(layers=3)
    assert apply_techniques(model, ALL) == []
    plan_activations(model, decoder_layers(model), "offload")
    found = losses(model)
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize("others", [Techniques(), ALL])
def test_what_is_on_by_itself_can_be_turned_off(others: Techniques) -> None:
    expected = losses(adapted_llama(layers=3), steps=3)
    model = adapted_llama(layers=3)
    apply_techniques(model, replace(others, fused_linear=False))
    layers = adapted_layers(model).values()
    assert layers
    assert not any(layer.fused for layer in layers)
    assert losses(model, steps=3, chunked=False) == pytest.approx(expected, rel=1e-4)
    task = CausalLM.for_model(model, chunked=False)
    assert task.loss_path.reason.startswith("train.chunked_loss is off")


def test_only_layers_that_keep_their_activations_keep_what_gate_and_up_give() -> None:
    expected = losses(adapted_llama(layers=3), steps=2)
    for plan, keeping in ((["recompute"] * 3, 0), (["recompute", "keep", "keep"], 2)):
        model = adapted_llama(layers=3)
        apply_techniques(model, Techniques(fused_mlp=True, mlp_keeps_inner=True))
        plan_activations(model, decoder_layers(model), plan)
        mlps = [module for module in model.modules() if isinstance(module, FusedGatedMLP)]
        assert sum(not mlp.is_recomputed for mlp in mlps) == keeping
        assert losses(model, steps=2) == pytest.approx(expected, rel=1e-4)


def test_probabilities_are_kept_where_asked_for_and_change_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(tiled_attention._TOKENS, torch.float32, range(2, 10**6))
    expected = losses(adapted_llama(layers=3), steps=3)
    for plan in (["keep"] * 3, ["recompute", "keep", "keep"], ["recompute"] * 3):
        model = adapted_llama(layers=3)
        assert use_tiled_attention(model)
        notes = apply_techniques(model, Techniques(attention_keeps_probabilities=True))
        assert notes == []
        plan_activations(model, decoder_layers(model), plan)
        assert losses(model, steps=3) == pytest.approx(expected, rel=1e-4)
    model = adapted_llama(layers=3)
    (note,) = apply_techniques(model, Techniques(attention_keeps_probabilities=True))
    assert note.startswith("train.attention_keeps_probabilities: attention does not run in tiles")


def test_a_model_we_do_not_know_keeps_its_plain_path_said_aloud() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))
    notes = apply_techniques(model, ALL)
    assert notes == [
        "train.fused_mlp: 2 MLPs of 2 keep the plain path: GPT2MLP is no layout we know",
        "train.fused_qkv: 2 attentions of 2 keep the plain path: "
        "GPT2Attention is no layout we know",
        "train.tiled_norms: 5 norms of 5 keep the plain path: LayerNorm is no norm we know",
    ]


def test_nothing_is_touched_when_nothing_is_on() -> None:
    model = adapted_llama()
    before = [type(module) for module in model.modules()]
    assert apply_techniques(model, Techniques()) == []
    assert [type(module) for module in model.modules()] == before
