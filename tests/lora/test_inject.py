"""An adapter on a model: only it learns, it can be switched off, and what never ran is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import (
    adapted_layers,
    adapter_parameters,
    adapters_disabled,
    inject_adapter,
    reset_reached,
    unreached_layers,
    zero_initialised_factor,
)
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.lora.trained import tied_groups, trained_copies

Make = Callable[..., nn.Module]
Logits = Callable[[nn.Module], torch.Tensor]
Stir = Callable[[nn.Module], None]


def spec(targets: Any = "all-linear", **more: Any) -> AdapterSpec:
    return AdapterSpec(rank=4, alpha=8, target_modules=targets, **more)


def step(model: nn.Module, **more: Any) -> None:
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2]) if type(model).__name__.startswith("Bert") else ids
    model(input_ids=ids, labels=labels, **more).loss.backward()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_only_the_adapter_is_trainable_and_every_zero_factor_gets_a_gradient(
    tiny: Make, name: str
) -> None:
    model = tiny(name)
    saved = ("classifier",) if name == "bert" else ()
    names = inject_adapter(model, spec(modules_to_save=saved), dtype=torch.float32)
    assert list(adapted_layers(model)) == names
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == adapter_parameters(model)
    assert len(trainable) == 2 * len(names) + (2 if saved else 0)
    step(model)
    for layer in adapted_layers(model).values():
        assert zero_initialised_factor(layer)[1].grad.any()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for copied in trained_copies(model).values():
        assert all(p.grad.any() for p in copied.parameters())


def test_gradient_checkpointing_leaves_every_gradient_as_it_is(tiny: Make) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny("llama").train()
        inject_adapter(model, spec(dropout=0.2), dtype=torch.float32)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        step(model, use_cache=False)
        gradients.append({n: p.grad for n, p in adapter_parameters(model).items()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_values_depend_on_the_seed_not_on_what_else_is_adapted(tiny: Make) -> None:
    many, few, other = tiny("llama"), tiny("llama"), tiny("llama")
    inject_adapter(many, spec(), dtype=torch.float32, seed=1)
    inject_adapter(few, spec(("v_proj",)), dtype=torch.float32, seed=1)
    inject_adapter(other, spec(("v_proj",)), dtype=torch.float32, seed=2)
    name = "model.layers.1.self_attn.v_proj.lora_A"
    a, b, c = (adapter_parameters(model)[name] for model in (many, few, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_patterns_set_rank_and_scale_by_module(tiny: Make) -> None:
    model = tiny("llama")
    wanted = spec(
        ("q_proj", "v_proj"), rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\..*": 1}
    )
    inject_adapter(model, wanted, dtype=torch.float32)
    layers = adapted_layers(model)
    assert layers["model.layers.0.self_attn.v_proj"].rank == 2
    assert layers["model.layers.0.self_attn.v_proj"].scale == 4
    assert layers["model.layers.1.self_attn.q_proj"].scale == 0.25
    assert layers["model.layers.1.self_attn.v_proj"].lora_A.shape == (2, 32)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {}),
        ("llama", {"modules_to_save": ("lm_head",)}),
        ("llama tied", {"modules_to_save": ("lm_head", "embed_tokens")}),
        ("bert", {"modules_to_save": ("classifier",)}),
    ],
)
def test_disabled_the_model_is_its_base_bit_for_bit_and_comes_back(
    tiny: Make, logits: Logits, stir: Stir, name: str, more: dict[str, Any]
) -> None:
    model = tiny(name)
    base = logits(model)
    inject_adapter(model, spec(**more), dtype=torch.float32)
    stir(model)
    tuned = logits(model)
    assert not torch.allclose(base, tuned)
    reset_reached(model)
    with adapters_disabled(model):
        assert torch.equal(logits(model), base)
    assert unreached_layers(model) == list(adapted_layers(model))
    assert torch.equal(logits(model), tuned)
    with pytest.raises(RuntimeError, match="inside"), adapters_disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), tuned)


def test_an_adapter_never_reached_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + self.idle.weight.sum()  # reads the weight, passes the adapter by

    model = Half()
    inject_adapter(model, spec(), dtype=torch.float32)
    model(torch.randn(2, 4))
    assert unreached_layers(model) == ["idle"]
    reset_reached(model)
    assert unreached_layers(model) == ["used", "idle"]


def test_one_of_two_tied_modules_is_refused_with_the_reason(tiny: Make) -> None:
    model = tiny("llama tied")
    assert tied_groups(model) == [["model.embed_tokens", "lm_head"]]
    with pytest.raises(UserError, match=r"lm_head shares its weight with model\.embed_tokens"):
        inject_adapter(model, spec(modules_to_save=("lm_head",)), dtype=torch.float32)
    assert not adapted_layers(model)
    assert not trained_copies(model)


def test_an_adapter_on_one_of_two_tied_modules_is_told_of(
    tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    inject_adapter(tiny("llama tied"), spec(("embed_tokens",)), dtype=torch.float32)
    assert "model.embed_tokens, lm_head share one weight" in caplog.text
    caplog.clear()
    inject_adapter(tiny("llama tied"), spec(), dtype=torch.float32)
    assert not caplog.text


def test_both_tied_modules_train_as_one(tiny: Make, logits: Logits) -> None:
    model = tiny("llama tied")
    wanted = spec(("q_proj",), modules_to_save=("embed_tokens", "lm_head"))
    inject_adapter(model, wanted, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [n for n in adapter_parameters(model) if "lora" not in n]
    assert names == ["model.embed_tokens.weight"]
    step(model)
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16])
def test_full_precision_copies_of_half_precision_modules_cast_at_their_border(
    tiny: Make, compute: torch.dtype
) -> None:
    model = tiny("llama").to(compute)
    wanted = spec(modules_to_save=("lm_head", "model.norm", "embed_tokens"))
    inject_adapter(model, wanted, dtype=torch.float32)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    step(model)
    assert seen == [compute]
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())
    assert model.lm_head.weight.grad.any()
    assert model.model.embed_tokens.weight.grad.any()


def test_originals_stay_out_of_the_model_s_parameters(tiny: Make) -> None:
    model = tiny("llama")
    before = sum(p.numel() for p in model.parameters())
    inject_adapter(model, spec(("q_proj",), modules_to_save=("lm_head",)), dtype=torch.float32)
    factors = sum(p.numel() for n, p in adapter_parameters(model).items() if "lora" in n)
    assert sum(p.numel() for p in model.parameters()) == before + factors
    assert "lm_head.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("lm_haed",), r"'lm_haed' matches no module; nearest: lm_head"),
        (("layers",), r"model\.layers is a container"),
        (("rotary_emb",), r"rotary_emb has no parameters to train"),
        (("gate_proj",), r"gate_proj is held in 4 bits and cannot be trained in full"),
    ],
)
def test_modules_that_cannot_be_trained_in_full_are_refused(
    tiny: Make, names: tuple[str, ...], match: str
) -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.gate_proj = NF4Linear.quantize(
            layer.mlp.gate_proj.weight,
            None,
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
        )
    with pytest.raises(UserError, match=match):
        inject_adapter(model, spec(("q_proj",), modules_to_save=names), dtype=torch.float32)
    assert not adapted_layers(model)


def test_a_weightless_model_takes_an_adapter_and_trains(tiny: Make) -> None:
    with torch.device("meta"):
        model = tiny("llama").bfloat16()
    inject_adapter(model, spec(modules_to_save=("lm_head",)), dtype=torch.bfloat16)
    parameters = adapter_parameters(model)
    assert all(p.is_meta for p in parameters.values())
    # Not the whole model: transformers reads values of position ids to find packed sequences.
    hidden = torch.zeros(2, 7, 32, dtype=torch.bfloat16, device="meta")
    with adapters_disabled(model):
        model.lm_head(model.model.layers[1].mlp(hidden))
    model.lm_head(model.model.layers[1].mlp(hidden)).sum().backward()
    reached = [n for n in parameters if n.startswith(("model.layers.1.mlp", "lm_head"))]
    assert all(parameters[n].grad.shape == parameters[n].shape for n in reached)


def test_the_training_mode_of_the_model_is_kept(tiny: Make) -> None:
    for training in (False, True):
        model = tiny("llama").train(training)
        inject_adapter(model, spec(modules_to_save=("lm_head",)), dtype=torch.float32)
        assert {m.training for m in model.modules()} == {training}


def test_a_bad_spec_names_every_value() -> None:
    with pytest.raises(UserError) as error:
        AdapterSpec(rank=0, alpha=0, dropout=1.0, rank_pattern={"q_proj(": 0})
    text = str(error.value)
    for part in ("rank = 0", "alpha = 0", "dropout = 1.0", "rank_pattern['q_proj(']", "'q_proj('"):
        assert part in text
    assert "5 faults" in text or "6 faults" in text
