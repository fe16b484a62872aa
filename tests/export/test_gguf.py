"""GGUF files read back by transformers say what the merged model says, family by family."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from qlora_trainer.base.load import BaseSpec
from qlora_trainer.errors import UserError
from qlora_trainer.export.builtin import TEXTS
from qlora_trainer.export.export import builtin_proof
from qlora_trainer.export.gguf_export import export_gguf
from qlora_trainer.export.gguf_file import check_covered, write_gguf
from qlora_trainer.export.gguf_tokenizer import SPLITTERS, check_tokenizer, splitter_id
from qlora_trainer.export.ollama import modelfile
from qlora_trainer.export.source import ExportSource

ROWS = 320
SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def make_model(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in name else 0.05))
    model.half().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, ROWS, (2, 24), generator=torch.Generator().manual_seed(3))
    result: torch.Tensor = model.eval()(input_ids=ids).logits
    return result


@pytest.mark.parametrize("family", CONFIGS)
def test_file_read_back_gives_the_merged_models_logits(tmp_path, family):
    merged = make_model(tmp_path / "merged", family)
    expected = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    found = {}
    for kind in ("f16", "q8_0", "q4_0"):
        figures = write_gguf(merged, tmp_path / f"m-{kind}.gguf", kind, name="tiny")
        config = {} if figures.own_metadata else {"config": CONFIGS[family]}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=f"m-{kind}.gguf", dtype=torch.float32, **config
        )
        found[kind] = float((logits(model) - expected).norm() / expected.norm())
    assert found["f16"] < 1e-5
    assert found["f16"] < found["q8_0"] < 0.03
    assert found["q8_0"] < found["q4_0"] < 0.5


def test_file_carries_tokenizer_splitter_and_chat_template(tmp_path):
    merged = make_model(tmp_path / "merged", "llama")
    write_gguf(merged, tmp_path / "m.gguf", "q4_0", name="tiny")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields

    def value(key: str) -> Any:
        return fields[key].contents()

    content = json.loads((merged / "tokenizer.json").read_text())
    tokens = value("tokenizer.ggml.tokens")
    assert value("tokenizer.ggml.pre") == "smollm"
    assert len(tokens) == ROWS
    assert all(tokens[index] == token for token, index in content["model"]["vocab"].items())
    assert value("tokenizer.ggml.token_type")[:3] == [3, 3, 1]  # control, control, normal
    assert value("tokenizer.ggml.token_type")[-1] == 5  # unused
    assert value("tokenizer.ggml.merges") == [" ".join(m) for m in content["model"]["merges"]]
    assert value("tokenizer.chat_template") == TEMPLATE
    assert value("tokenizer.ggml.eos_token_id") == 1


def test_stretched_rotary_frequencies_become_llama_cpps_factors(tmp_path):
    config = LlamaConfig(
        **{**SIZES, "max_position_embeddings": 4096},
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
        },
    )  # fmt: skip
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from qlora_trainer.export.gguf_model import stretched_frequencies

    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert torch.allclose(torch.from_numpy(stretched_frequencies(config)), plain / stretched)


def test_export_is_proven_through_the_file_itself(bench, tmp_path):
    base = make_model(tmp_path / "base", "llama")
    adapter = bench.adapter(base)
    source = ExportSource(
        base, adapter, AutoModelForCausalLM, BaseSpec("nf4", compute_dtype=torch.float32), "o/tiny"
    )
    made = export_gguf(
        source, tmp_path / "out", kind="q8_0", onto="dequantized", proof=builtin_proof(source)
    )
    assert sorted(entry.name for entry in made.folder.iterdir()) == [
        "Modelfile", "README.md", "export_report.json", "tiny-q8_0.gguf",
    ]  # fmt: skip
    assert 0 < made.report["gguf"]["proof"]["figures"]["mean_kl"] < 0.02
    assert made.report["gguf"]["quantize"] == (
        "llama-quantize tiny-f16.gguf tiny-Q4_K_M.gguf Q4_K_M"
    )
    assert "FROM ./tiny-q8_0.gguf" in (made.folder / "Modelfile").read_text()
    assert "q8_0 file, read back" in (made.folder / "README.md").read_text()


def test_a_family_that_overflows_in_fp16_is_merged_in_fp32_for_its_file(bench, tmp_path):
    base = make_model(tmp_path / "base", "gemma2")
    source = ExportSource(
        base, bench.adapter(base), AutoModelForCausalLM,
        BaseSpec("nf4", compute_dtype=torch.float32), "o/tiny",
    )  # fmt: skip
    made = export_gguf(source, tmp_path / "out", onto="dequantized", proof=builtin_proof(source))
    assert made.report["dtype"] == "fp32"
    assert "merged onto dequantized, fp32" in (made.folder / "README.md").read_text()
    assert set(made.report["gguf"]["types"]) == {"F16", "F32"}


def test_a_value_beyond_fp16_is_not_written_into_a_file(tmp_path):
    merged = make_model(tmp_path / "merged", "gemma2")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = 1e6
    model.save_pretrained(merged)
    with pytest.raises(UserError, match=r"0.mlp.up_proj.weight holds 1e\+06, beyond 65504"):
        write_gguf(merged, tmp_path / "m.gguf", "f16", name="tiny")


def test_file_proven_layer_by_layer_gives_the_same_figures(bench, tmp_path):
    base = make_model(tmp_path / "base", "gemma3")  # opened with fp16 in its configuration
    source = ExportSource(
        base, bench.adapter(base), AutoModelForCausalLM,
        BaseSpec("nf4", compute_dtype=torch.float32), "o/tiny",
    )  # fmt: skip
    found, said = [], []
    for by in ("model", "layer"):
        made = export_gguf(
            source, tmp_path / by, kind="q8_0", onto="dequantized",
            proof=builtin_proof(source, by=by, say=said.append),
        )  # fmt: skip
        found.append(made.report["gguf"]["proof"]["figures"])
    assert found[0] == found[1]
    assert said.count("running the GGUF file layer by layer: as asked") == 1


def test_family_not_covered_names_the_tool_to_use(tmp_path):
    PhiConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"phi models are not covered.*convert_hf_to_gguf"):
        check_covered(tmp_path, "f16", trust_remote_code=False)


@pytest.mark.parametrize(("pattern", "expected"), SPLITTERS.items())
def test_splitters_are_told_by_their_expression(pattern, expected):
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}},
        {"type": "ByteLevel", "use_regex": False},
    ]
    assert splitter_id({"type": "Sequence", "pretokenizers": steps}) == expected


def test_unknown_splitter_is_refused():
    steps = [{"type": "Split", "pattern": {"Regex": "x+"}}, {"type": "ByteLevel"}]
    with pytest.raises(UserError, match="splits text in a way"):
        splitter_id({"type": "Sequence", "pretokenizers": steps})


def test_modelfile_speaks_the_chat_format_of_the_model():
    text = modelfile("m.gguf", TEMPLATE)
    assert "{{ .Role }}\n{{ .Content }}<|im_end|>" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "TEMPLATE here if answers look wrong" in modelfile("m.gguf", "{{ odd }}")


def test_modelfile_sets_the_system_message_the_template_puts_in_by_itself():
    said = "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    by_itself = f"{{% if messages[0]['role'] != 'system' %}}{said}{{% endif %}}{TEMPLATE}"
    assert 'SYSTEM """Be kind."""' in modelfile("m.gguf", by_itself)
    assert "SYSTEM" not in modelfile("m.gguf", TEMPLATE)
    assert "SYSTEM" not in modelfile("m.gguf", "<|im_start|>{{ raise_exception('no') }}")


def test_sentencepiece_alone_is_refused_by_name_before_any_merging(bench, tmp_path):
    source = bench.source()
    with pytest.raises(UserError, match=r"tokenizer.json is missing; a GGUF file carries"):
        export_gguf(source, tmp_path / "out", proof=None)
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(UserError, match=r"as SentencePiece only \(tokenizer.model\).*convert_hf"):
        check_tokenizer(tmp_path)
    assert not (tmp_path / "out").exists()


def edited(file: Path, change: Any) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_tokenizer_file_is_refused_with_all_that_is_wrong(tmp_path):
    merged = make_model(tmp_path / "merged", "llama")

    def harm(content: dict[str, Any]) -> None:
        content["model"]["merges"][3] = 5
        content["added_tokens"][0]["id"] = "zero"

    edited(merged / "tokenizer.json", harm)
    with pytest.raises(UserError) as refused:
        write_gguf(merged, tmp_path / "m.gguf", "f16", name="tiny")
    said = str(refused.value)
    assert str(merged / "tokenizer.json") in said
    assert "`merges` of `model`: not a list of pairs" in said
    assert "added_tokens: not a list of tokens, each with id and content" in said
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers"])
def test_a_configuration_of_more_than_the_folder_holds_is_refused(tmp_path, name):
    merged = make_model(tmp_path / "merged", "llama")
    edited(merged / "config.json", lambda content: content.update({name: 10**9}))
    with pytest.raises(UserError, match=rf"config.json holds a value .*{name} = 1000000000"):
        write_gguf(merged, tmp_path / "m.gguf", "f16", name="tiny")
    assert not (tmp_path / "m.gguf").exists()
