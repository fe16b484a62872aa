"""The merged weights are the base's plus the update, for every kind of module and both ways."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.errors import UserError
from qlora_trainer.export.export import export_merged
from qlora_trainer.export.merged import prepare, write_candidate
from qlora_trainer.lora.files import load_adapter
from tests.export import tiny

FP32 = BaseSpec("nf4", compute_dtype=torch.float32)
CASES = {
    "linear": ("llama", {}),
    "some-layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "embedding-and-tied-head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "trained-tied-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "rslora-patterns": (
        "llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}),
    "classifier": (
        "bert",
        {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"},
    ),
    "renamed-in-memory": ("vit", {"modules_to_save": ["classifier"]}),
    "experts-fused-in-memory": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "encoder-decoder": ("t5", {"target_modules": ["q", "v", "wo"]}),
    "conv2d": ("resnet", {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
}  # fmt: skip


def export(
    base: Path, adapter: Path, family: str, out: Path, *, onto: Any = "original",
    dtype: str = "fp32", spec: BaseSpec = FP32, max_shard_bytes: int = 60_000,
) -> Path:  # fmt: skip
    prepared = prepare(base, adapter, tiny.CLASSES[family], spec, dtype=dtype)
    out.mkdir()
    write_candidate(prepared, out, onto, max_shard_bytes=max_shard_bytes)
    return out


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def test_a_family_that_overflows_in_fp16_goes_out_in_bf16(bench, tmp_path):
    source = bench.source("t5", target_modules=["q", "v"])
    made = export_merged(source, tmp_path / "out", onto="original", proof=None)
    assert made.report["dtype"] == "bf16"
    assert {t.dtype for t in load_file(made.folder / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=r"t5 models overflow in fp16.*use --dtype bf16"):
        export_merged(source, tmp_path / "none", dtype="fp16", onto="original", proof=None)
    assert not (tmp_path / "none").exists()
    plain = export_merged(bench.source(), tmp_path / "llama", onto="original", proof=None)
    assert plain.report["dtype"] == "fp16"


@pytest.mark.parametrize("case", CASES)
def test_merged_onto_original_equals_what_peft_computes(bench, tmp_path, case):
    family, settings = CASES[case]
    base = bench.base(family)
    adapter = bench.adapter(base, family, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny.load(base, family), adapter)
        # Not of PEFT's own merge: that adds an embedding's update to a tied head as well.
        expected = tiny.logits(model.eval(), family)
    out = export(base, adapter, family, tmp_path / "out")
    model, info = tiny.CLASSES[family].from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative(tiny.logits(model.eval(), family), expected) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_merged_onto_dequantized_equals_base_and_adapter_as_trained(bench, tmp_path, case):
    family, settings = CASES[case]
    base = bench.base(family)
    adapter = bench.adapter(base, family, **settings)
    trained = load_base(base, tiny.CLASSES[family], FP32, torch.device("cpu"))
    load_adapter(trained, adapter, dtype=torch.float32, trainable=False)
    out = export(base, adapter, family, tmp_path / "out", onto="dequantized")
    merged = tiny.logits(tiny.load(out, family), family)
    assert relative(merged, tiny.logits(trained, family)) < 1e-5


def test_fp16_export_onto_dequantized_stays_within_a_thousandth(bench, tmp_path):
    base = bench.base()
    adapter = bench.adapter(base)
    trained = load_base(base, tiny.CLASSES["llama"], FP32, torch.device("cpu"))
    load_adapter(trained, adapter, dtype=torch.float32, trainable=False)
    out = export(base, adapter, "llama", tmp_path / "out", onto="dequantized", dtype="fp16")
    assert relative(tiny.logits(tiny.load(out)), tiny.logits(trained)) < 1e-3
    assert tiny.load(out, dtype="auto").dtype == torch.float16


def test_base_quantized_by_bitsandbytes_is_merged_from_its_own_codes(bench, tmp_path):
    from transformers import BitsAndBytesConfig

    plain = bench.base()
    packed = tmp_path / "packed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.CLASSES["llama"].from_pretrained(
            plain, dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        ).save_pretrained(packed)  # fmt: skip
    adapter = bench.adapter(plain)
    prepared = prepare(packed, adapter, tiny.CLASSES["llama"], FP32, dtype="fp32")
    with pytest.raises(UserError, match="no 16-bit weights"):
        prepared.ways("original")
    out = export(packed, adapter, "llama", tmp_path / "out", onto="dequantized")
    trained = load_base(packed, tiny.CLASSES["llama"], FP32, torch.device("cpu"))
    load_adapter(trained, adapter, dtype=torch.float32, trainable=False)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert relative(tiny.logits(tiny.load(out)), tiny.logits(trained)) < 1e-5


def test_stored_names_stay_the_bases_own(bench, tmp_path):
    # As GPT-2's first release: no `transformer.` before the names.
    base = tmp_path / "base"
    base.mkdir()
    original = bench.base("gpt2")
    tensors = load_file(original / "model.safetensors")
    renamed = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_bytes((original / "config.json").read_bytes())
    adapter = bench.adapter(original, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    out = export(base, adapter, "gpt2", tmp_path / "out", max_shard_bytes=10**9)
    assert set(load_file(out / "model.safetensors")) == set(renamed)
    expected = export(original, adapter, "gpt2", tmp_path / "expected")
    first, second = (tiny.logits(tiny.load(folder, "gpt2"), "gpt2") for folder in (out, expected))
    assert relative(first, second) < 1e-6


def test_tied_weights_stay_one_tensor_when_the_adapter_leaves_them(bench, tmp_path):
    base = bench.base()
    out = export(base, bench.adapter(base), "llama", tmp_path / "out", max_shard_bytes=10**9)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_resized_embeddings_bring_their_vocabulary_along(bench, tmp_path):
    base = bench.base()
    model = tiny.load(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 5, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    out = export(base, tmp_path / "adapter", "llama", tmp_path / "out")
    again = tiny.load(out)
    assert again.config.vocab_size == tiny.VOCABULARY + 5
    assert relative(tiny.logits(again), tiny.logits(adapted.eval())) < 1e-5


def test_everything_beside_the_weights_goes_along(bench, tmp_path):
    original = bench.base()
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (base / name).write_bytes((original / name).read_bytes())
    for name in ("tokenizer_config.json", "chat_template.jinja", "LICENSE", "modeling_own.py"):
        (base / name).write_text("of the base")
    (base / "pytorch_model.bin").write_text("other weights")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in bench.adapter(original).iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    (adapter / "chat_template.jinja").write_text("of the run")
    out = export(base, adapter, "llama", tmp_path / "out", max_shard_bytes=10**9)
    assert sorted(entry.name for entry in out.iterdir()) == [
        "LICENSE", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "modeling_own.py", "tokenizer_config.json",
    ]  # fmt: skip
    assert (out / "chat_template.jinja").read_text() == "of the run"


@pytest.mark.parametrize(
    ("onto", "quantization", "message"),
    [
        ("dequantized", "none", "trained on in 16 bit"),
        ("both", "nf4", "must be original, dequantized or best"),
    ],
)
def test_ways_that_cannot_be_had_are_refused(bench, onto, quantization, message):
    base = bench.base()
    prepared = prepare(
        base, bench.adapter(base), tiny.CLASSES["llama"], BaseSpec(quantization), dtype="bf16"
    )
    with pytest.raises(UserError, match=message):
        prepared.ways(onto)
