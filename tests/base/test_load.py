"""Claims of base/load.py and base/settle.py over real architectures, tiny and random."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import BaseSpec, build_weightless_base, load_base, load_config
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.quantize import quantize_nf4
from qlora_trainer.errors import UserError
from tests.base.conftest import tiny_config

CPU = torch.device("cpu")
NF4 = BaseSpec("nf4")
PLAIN = BaseSpec("none")
SaveTiny = Callable[..., Path]
IDS = torch.arange(1, 21)[None]


def nf4_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, NF4Linear)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "qwen2-moe"])
def test_every_decoder_linear_is_in_nf4_and_nothing_wants_a_gradient(
    save_tiny: SaveTiny, family: str
) -> None:
    model = load_base(save_tiny(family, AutoModelForCausalLM), AutoModelForCausalLM, NF4, CPU)
    inside = [m for _, layer in decoder_layers(model) for m in layer.modules()]
    left = [m for m in inside if type(m).__name__ in ("Linear", "Conv1D")]
    assert [m for m in left if min(m.weight.shape) > 1] == []
    assert len(nf4_paths(model)) > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.config.use_cache is False
    logits = model(input_ids=IDS).logits
    assert torch.isfinite(logits).all()


def test_codes_are_those_of_the_checkpoint_in_its_own_dtype(save_tiny: SaveTiny) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = save_tiny("llama", AutoModelForCausalLM, dtype)
        model = load_base(folder, AutoModelForCausalLM, NF4, CPU)
        tensors = load_file(folder / "model.safetensors")
        layer = model.model.layers[1].mlp.down_proj
        expected = quantize_nf4(tensors["model.layers.1.mlp.down_proj.weight"])
        assert torch.equal(layer.codes, expected.codes)
        assert torch.equal(layer.absmax, expected.absmax)
        norm = tensors["model.norm.weight"].to(torch.bfloat16)
        assert torch.equal(model.model.norm.weight, norm)


def test_the_files_decide_the_dtype_and_not_what_the_configuration_claims(
    save_tiny: SaveTiny,
) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    model = load_base(folder, AutoModelForCausalLM, NF4, CPU)
    weight = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    layer, expected = model.model.layers[0].self_attn.q_proj, quantize_nf4(weight)
    assert torch.equal(layer.codes, expected.codes)
    assert torch.equal(layer.absmax_scale, expected.absmax_scale)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16])
def test_the_residual_stream_stays_in_the_compute_dtype(
    save_tiny: SaveTiny, family: str, compute_dtype: torch.dtype
) -> None:
    folder = save_tiny(family, AutoModelForCausalLM, torch.float32)
    spec = BaseSpec("nf4", compute_dtype=compute_dtype)
    model = load_base(folder, AutoModelForCausalLM, spec, CPU)
    seen: list[torch.dtype] = []

    def record(_module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.extend([inputs[0].dtype, hidden.dtype])

    for _, layer in decoder_layers(model):
        layer.register_forward_hook(record)
    logits = model(input_ids=IDS).logits
    assert set(seen) == {compute_dtype}
    assert len(seen) == 4
    assert logits.dtype == compute_dtype
    assert {p.dtype for p in model.parameters()} == {compute_dtype}


def test_rotary_frequencies_stay_fp32_and_exact(save_tiny: SaveTiny) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    model = load_base(folder, AutoModelForCausalLM, NF4, CPU)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inv_freq = model.model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, reference.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "bert"])
def test_unquantized_loading_equals_transformers(save_tiny: SaveTiny, family: str) -> None:
    model_class = AutoModel if family == "bert" else AutoModelForCausalLM
    folder = save_tiny(family, model_class, torch.float32)
    spec = BaseSpec("none", compute_dtype=torch.float32)
    ours = load_base(folder, model_class, spec, CPU)
    theirs = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(ours(input_ids=IDS)[0], theirs(input_ids=IDS)[0])
    assert nf4_paths(ours) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_equal_those_of_a_dense_model_with_the_rebuilt_weights(
    save_tiny: SaveTiny, family: str
) -> None:
    folder = save_tiny(family, AutoModelForCausalLM, torch.float32)
    spec = BaseSpec("nf4", compute_dtype=torch.float32)
    ours = load_base(folder, AutoModelForCausalLM, spec, CPU)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for path in nf4_paths(ours):
        layer, target = ours.get_submodule(path), dense.get_submodule(path)
        weight = layer.dense_weight()
        target.weight.data = weight.t() if layer.fan_in_fan_out else weight
    torch.testing.assert_close(ours(input_ids=IDS).logits, dense(input_ids=IDS).logits)
    assert all(ours.get_submodule(p).fan_in_fan_out == (family == "gpt2") for p in nf4_paths(ours))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2"])
def test_tied_embeddings_stay_one_parameter_and_count_once(
    save_tiny: SaveTiny, family: str
) -> None:
    model = load_base(save_tiny(family, AutoModelForCausalLM), AutoModelForCausalLM, NF4, CPU)
    weight = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is weight
    entries = [t for t in audit_base(model).tensors if t.role in ("embedding", "head")]
    assert sum(t.size_bytes for t in entries if t.shape == tuple(weight.shape)) == 131 * 64 * 2
    assert [t.tied_to for t in entries if "lm_head" in str(t.tied_to)] == [("lm_head.weight",)]


def test_untied_heads_stay_apart_and_unquantized(save_tiny: SaveTiny) -> None:
    model = load_base(save_tiny("llama", AutoModelForCausalLM), AutoModelForCausalLM, NF4, CPU)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear
    assert model.kept_unquantized["lm_head"] == "head: stays in the compute dtype"


def test_loading_twice_gives_the_same_bits(save_tiny: SaveTiny) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    first, second = (
        load_base(folder, AutoModelForCausalLM, NF4, CPU).state_dict() for _ in range(2)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loaded_model_no_longer_hangs_on_its_files(save_tiny: SaveTiny) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    model = load_base(folder, AutoModelForCausalLM, PLAIN, CPU)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # would show through a mapped file
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_progress_names_every_tensor_once_and_reaches_the_end(save_tiny: SaveTiny) -> None:
    calls: list[tuple[str, int, int]] = []
    load_base(
        save_tiny("llama-tied", AutoModelForCausalLM), AutoModelForCausalLM, NF4, CPU,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert [number for _, number, _ in calls] == list(range(1, len(calls) + 1))
    assert {count for _, _, count in calls} == {len(calls)}
    assert len({name for name, _, _ in calls}) == len(calls)


def test_several_shards_load_like_one_file(save_tiny: SaveTiny) -> None:
    whole = save_tiny("llama", AutoModelForCausalLM)
    split = save_tiny("llama", AutoModelForCausalLM, max_shard_size="60KB")
    assert len(list(split.glob("model-*.safetensors"))) > 2
    first, second = (
        load_base(folder, AutoModelForCausalLM, NF4, CPU).state_dict() for folder in (whole, split)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "bert", "mixtral", "t5"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weightless_base_has_the_same_modules_tensors_and_audit(
    save_tiny: SaveTiny, family: str, quantization: str
) -> None:
    classes: dict[str, Any] = {"bert": AutoModel, "t5": AutoModelForSeq2SeqLM}
    model_class = classes.get(family, AutoModelForCausalLM)
    folder = save_tiny(family, model_class, torch.float32)
    spec = BaseSpec(quantization)
    real = load_base(folder, model_class, spec, CPU)
    weightless = build_weightless_base(load_config(folder), model_class, spec)

    def modules(model: nn.Module) -> list[tuple[str, str]]:
        return [(path, type(module).__name__) for path, module in model.named_modules()]

    def tensors(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
        both = [*model.named_parameters(), *model.named_buffers()]
        return {name: (t.shape, t.dtype, t.requires_grad) for name, t in both}

    assert modules(weightless) == modules(real)
    assert tensors(weightless) == tensors(real)
    assert audit_base(weightless) == audit_base(real)
    assert all(t.is_meta for t in weightless.state_dict().values())
    assert weightless.kept_unquantized == real.kept_unquantized


def test_a_weightless_layer_runs_forward_and_backward() -> None:
    model = build_weightless_base(tiny_config("llama"), AutoModelForCausalLM, NF4)
    hidden = torch.empty(1, 8, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(8, device="meta")[None])
    out = model.model.layers[0](hidden, position_embeddings=rotary, attention_mask=None)
    model.lm_head(out).float().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_building_a_weightless_base_leaves_the_configuration_alone() -> None:
    config = tiny_config("llama")
    before = copy.deepcopy(config.to_dict())
    build_weightless_base(config, AutoModelForCausalLM, BaseSpec("nf4", attention="eager"))
    assert config.to_dict() == before


def test_fused_experts_stay_in_16_bit_and_the_reason_says_so(save_tiny: SaveTiny) -> None:
    for family in ("mixtral", "qwen2-moe"):
        folder = save_tiny(family, AutoModelForCausalLM)
        model = load_base(folder, AutoModelForCausalLM, NF4, CPU)
        audit = audit_base(model)
        experts = [t for t in audit.tensors if t.role == "experts"]
        assert len(experts) == 4  # two layers, gate_up and down
        assert all("experts fused" in t.kept_because for t in experts)
        assert audit.large_unquantized(at_least_bytes=4096)[0].role == "experts"
        assert all(t.dtype == "bf16" for t in experts)


def test_an_encoder_is_quantized_with_its_embeddings_and_norms_left(save_tiny: SaveTiny) -> None:
    model = load_base(save_tiny("bert", AutoModel), AutoModel, NF4, CPU)
    assert len(nf4_paths(model)) == 2 * 6  # the pooler is part of a head: a task may train it
    assert model.pooler.dense.weight.dtype == torch.bfloat16
    mask = torch.ones_like(IDS)
    assert model(input_ids=IDS, attention_mask=mask)[0].dtype == torch.bfloat16


def test_a_language_model_takes_a_new_classifier_that_depends_on_the_seed_only(
    save_tiny: SaveTiny,
) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)

    def load(seed: int) -> Any:
        return load_base(
            folder, AutoModelForSequenceClassification, NF4, CPU,
            new_heads_allowed=True, head_seed=seed, config_changes={"num_labels": 5},
        )  # fmt: skip

    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = load(7)
    assert torch.equal(torch.get_rng_state(), state)  # the run's own random state is untouched
    assert type(model.score) is nn.Linear
    assert model.score.weight.shape == (5, 64)
    assert model.score.weight.dtype == torch.bfloat16
    assert torch.isfinite(model.score.weight).all()
    assert torch.equal(load(7).score.weight, model.score.weight)
    assert not torch.equal(load(8).score.weight, model.score.weight)


def test_a_masked_language_model_takes_a_new_classifier(save_tiny: SaveTiny) -> None:
    folder = save_tiny("bert", BertForMaskedLM)
    model = load_base(folder, AutoModelForSequenceClassification, NF4, CPU, new_heads_allowed=True)
    assert type(model.classifier) is nn.Linear
    assert "bert.encoder.layer.0.output.dense" in nf4_paths(model)


def test_a_new_head_is_refused_where_none_is_allowed(save_tiny: SaveTiny) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    with pytest.raises(UserError, match=r"score\.weight: missing from the checkpoint"):
        load_base(folder, AutoModelForSequenceClassification, NF4, CPU)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_unexpected_and_misshapen_keys_are_all_listed(save_tiny: SaveTiny) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(8, 64)

    edit_tensors(folder, change)
    with pytest.raises(UserError) as caught:
        load_base(folder, AutoModelForCausalLM, NF4, CPU)
    text = str(caught.value)
    assert "(4 faults)" in text
    assert "model.layers.0.mlp.up_proj.weight: missing" in text
    assert "model.norm.weight: missing" in text
    assert "model.layers.9.mlp.up_proj.weight: in the checkpoint, without a place" in text
    assert "q_proj.weight: shape (8, 64) in the checkpoint, (64, 64) in the model" in text


def test_keys_of_the_base_are_never_taken_for_a_new_head(save_tiny: SaveTiny) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    edit_tensors(folder, lambda tensors: tensors.__delitem__("model.norm.weight"))
    with pytest.raises(UserError, match=r"model\.norm\.weight: missing"):
        load_base(folder, AutoModelForSequenceClassification, NF4, CPU, new_heads_allowed=True)


def test_old_rotary_buffers_in_a_checkpoint_do_no_harm(save_tiny: SaveTiny) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    load_base(folder, AutoModelForCausalLM, NF4, CPU)


def test_a_weight_that_is_not_finite_is_named(save_tiny: SaveTiny) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    name = "model.layers.1.mlp.gate_proj.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1).__setitem__(3, float("nan")))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight holds values"):
        load_base(folder, AutoModelForCausalLM, NF4, CPU)


def test_kept_layers_stay_in_16_bit_and_a_name_that_fits_nothing_is_refused(
    save_tiny: SaveTiny,
) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    spec = BaseSpec("nf4", keep_unquantized=("down_proj", "layers.0.self_attn"))
    model = load_base(folder, AutoModelForCausalLM, spec, CPU)
    paths = nf4_paths(model)
    assert not any("down_proj" in path or "layers.0.self_attn" in path for path in paths)
    assert "model.layers.1.self_attn.q_proj" in paths
    assert "model.keep_unquantized" in model.kept_unquantized["model.layers.0.mlp.down_proj"]
    wrong = BaseSpec("nf4", keep_unquantized=("down_prj", "layers.7"))
    with pytest.raises(UserError, match=r"(?s)2 faults.*'down_prj' fits no layer.*'layers.7'"):
        load_base(folder, AutoModelForCausalLM, wrong, CPU)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used(save_tiny: SaveTiny, attention: str) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    spec = BaseSpec("nf4", attention=attention)
    assert (
        load_base(folder, AutoModelForCausalLM, spec, CPU).config._attn_implementation == attention
    )


def test_a_model_class_that_does_not_fit_is_refused_by_name(save_tiny: SaveTiny) -> None:
    folder = save_tiny("t5", AutoModelForSeq2SeqLM)
    with pytest.raises(UserError, match="a t5 model does not fit AutoModelForCausalLM"):
        load_base(folder, AutoModelForCausalLM, NF4, CPU)
    with pytest.raises(UserError, match="a t5 model does not fit BertForMaskedLM"):
        load_base(folder, BertForMaskedLM, NF4, CPU)


def test_t5_trains_in_bf16_with_both_stacks_quantized(save_tiny: SaveTiny) -> None:
    folder = save_tiny("t5", AutoModelForSeq2SeqLM)
    model = load_base(folder, AutoModelForSeq2SeqLM, NF4, CPU)
    assert {path.split(".")[0] for path in nf4_paths(model)} == {"encoder", "decoder"}
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)


def test_convolutions_stay_and_the_audit_says_why(tmp_path: Path) -> None:
    vit = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        image_size=32, patch_size=8,
    )  # fmt: skip
    ViTForImageClassification(vit).to(torch.bfloat16).save_pretrained(tmp_path / "vit")
    model = load_base(tmp_path / "vit", ViTForImageClassification, NF4, CPU)
    assert type(model.classifier) is nn.Linear
    assert len(nf4_paths(model)) == 2 * 6
    convolution = [t for t in audit_base(model).tensors if t.role == "convolution"]
    assert [t.kept_because for t in convolution] == [
        "convolution: NF4 kernels only multiply matrices"
    ]
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)
    assert torch.isfinite(model(pixel_values=pixels).logits).all()
    resnet = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])
    ResNetModel(resnet).save_pretrained(tmp_path / "resnet")
    loaded = load_base(tmp_path / "resnet", ResNetModel, NF4, CPU)
    assert torch.isfinite(loaded(pixel_values=pixels).last_hidden_state).all()


def test_the_real_model_answers_nearly_as_its_16_bit_self(smollm2: Path) -> None:
    quantized = load_base(smollm2, AutoModelForCausalLM, NF4, CPU)
    plain = load_base(smollm2, AutoModelForCausalLM, PLAIN, CPU)
    text = (
        "The capital of France is Paris. Water boils at one hundred degrees Celsius at sea level."
    )
    ids = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, full = (model(input_ids=ids, labels=ids).loss for model in (quantized, plain))
    assert ours < full * 1.25
    audits = audit_base(quantized), audit_base(plain)
    assert audits[0].total_bytes < 0.45 * audits[1].total_bytes
