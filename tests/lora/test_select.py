"""Target selection takes what is meant and refuses everything else by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import inject_adapter
from qlora_trainer.lora.select import head_modules, select_modules
from qlora_trainer.lora.spec import AdapterSpec

Make = Callable[..., nn.Module]


def spec(targets: Any = "all-linear", **more: Any) -> AdapterSpec:
    return AdapterSpec(rank=4, alpha=8, target_modules=targets, **more)


def endings(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


@pytest.mark.parametrize(
    ("model", "expected", "count"),
    [
        ("llama", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", 21),
        ("llama tied", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", 21),
        ("gpt2", "c_attn c_fc c_proj", 8),
        ("bert", "dense key query value", 13),
    ],
)
def test_all_linear_is_every_linear_but_heads_and_embeddings(
    tiny: Make, model: str, expected: str, count: int
) -> None:
    names = select_modules(tiny(model), spec())
    assert endings(names) == expected.split()
    assert len(names) == count


def test_heads_are_found_outside_the_backbone_and_by_name(tiny: Make) -> None:
    assert head_modules(tiny("llama")) == ["lm_head"]
    assert "classifier" in head_modules(tiny("bert"))
    plain = nn.ModuleDict({"body": nn.Linear(2, 2), "score": nn.Linear(2, 2)})
    assert select_modules(plain, spec()) == ["body"]


@pytest.mark.parametrize("model", ["gemma3", "t5", "qwen3 classifier", "roberta"])
def test_all_linear_spares_heads_of_other_architectures(model: str) -> None:
    import transformers as tf

    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 16, "vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8}
    with torch.device("meta"):
        made: dict[str, Callable[[], nn.Module]] = {
            "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**small, **more)),
            "t5": lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40)
            ),
            "qwen3 classifier": lambda: tf.Qwen3ForSequenceClassification(
                tf.Qwen3Config(**small, **more)
            ),
            "roberta": lambda: tf.RobertaForSequenceClassification(
                tf.RobertaConfig(**small, intermediate_size=16, vocab_size=40)
            ),
        }
        names = select_modules(made[model](), spec())
    assert names
    assert not [n for n in names if n.startswith(("lm_head", "score", "classifier"))]


def test_a_named_head_is_taken(tiny: Make) -> None:
    assert select_modules(tiny("llama"), spec(("lm_head",))) == ["lm_head"]


def test_names_match_whole_parts_and_expressions_whole_paths(tiny: Make) -> None:
    model = tiny("llama")
    assert len(select_modules(model, spec(("proj", "q_proj"), layers=None), strict=False)) == 3
    assert select_modules(model, spec(("layers.1.self_attn.q_proj",))) == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert len(select_modules(model, spec(r".*\.[qk]_proj"))) == 6
    with pytest.raises(UserError, match="matches no module"):
        select_modules(model, spec(r"[qk]_proj"))


def test_layers_and_exclusions_narrow_the_choice(tiny: Make) -> None:
    model = tiny("llama")
    names = select_modules(model, spec(("q_proj", "o_proj"), layers=(0, 2)))
    assert [n.split(".")[2] for n in names] == ["0", "0", "2", "2"]
    assert len(select_modules(model, spec(layers=(1,)))) == 7
    assert len(select_modules(model, spec(exclude_modules=("mlp.up_proj", "q_proj")))) == 15
    assert len(select_modules(model, spec(exclude_modules=r".*mlp.*"))) == 12


def test_all_faults_come_at_once_with_the_nearest_names(tiny: Make) -> None:
    wrong = spec(
        ("q_prj", "self_attn", "v_proj"), layers=(1, 7), rank_pattern={"k_proj": 2, "v_proj": 3}
    )
    with pytest.raises(UserError) as error:
        select_modules(tiny("llama"), wrong)
    text = str(error.value)
    assert "'q_prj' matches no module; nearest: q_proj" in text
    assert "layers = [7]: no targeted module stands there; the model's layers: 0 to 2" in text
    assert "layers.1.self_attn is a LlamaAttention" in text
    assert "name what is inside it: q_proj, k_proj, v_proj, o_proj" in text
    assert "rank_pattern: 'k_proj' matches no adapted module" in text


def test_norms_cannot_carry_an_adapter(tiny: Make) -> None:
    with pytest.raises(UserError, match=r"input_layernorm is a LlamaRMSNorm.*leave it out"):
        select_modules(tiny("llama"), spec(("input_layernorm",)))


def test_a_module_is_not_trained_in_full_and_adapted(tiny: Make) -> None:
    with pytest.raises(UserError, match="trained in full by modules_to_save"):
        select_modules(tiny("llama"), spec(("lm_head",), modules_to_save=("lm_head",)))


def test_what_is_trained_in_full_carries_no_adapter_inside(tiny: Make) -> None:
    names = select_modules(tiny("llama"), spec(modules_to_save=("mlp",)))
    assert endings(names) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(UserError, match="'up_proj' is trained in full by modules_to_save"):
        select_modules(tiny("llama"), spec(("up_proj", "q_proj"), modules_to_save=("mlp",)))


def test_adapted_modules_are_refused_by_name(tiny: Make) -> None:
    model = tiny("llama")
    inject_adapter(model, spec(("q_proj",)), dtype=torch.float32)
    for again in (spec(("q_proj",)), spec()):
        with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj already carries"):
            inject_adapter(model, again, dtype=torch.float32)


def test_one_module_under_two_paths_is_refused() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})
    with pytest.raises(UserError, match="a is the same module as b"):
        select_modules(model, spec())


def test_a_model_without_linear_modules_is_refused() -> None:
    with pytest.raises(UserError, match="matches no module"):
        select_modules(nn.Sequential(nn.LayerNorm(2)), spec())


def test_experts_in_stacked_matrices_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 16, "vocab_size": 40, "num_key_value_heads": 1}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**sizes, **more))
    names = select_modules(model, spec())
    assert endings(names) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert "2 modules hold stacked matrices" in caplog.text
    assert "layers.0.mlp.experts" in caplog.text
