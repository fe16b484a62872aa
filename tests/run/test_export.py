"""A run's export is the model that was trained, whole or not there at all."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from qlora_trainer import load_trained, train
from qlora_trainer.cli.app import app
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.run.check import serving
from qlora_trainer.run.export import export_run, merge_adapter_folders
from qlora_trainer.run.report import Reporter

Make = Callable[..., RunConfig]
_LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
           "num_attention_heads": 4}  # fmt: skip
BERT = partial(BertConfig, vocab_size=96, max_position_embeddings=64, pad_token_id=0, **_LAYERS)
VIT = partial(ViTConfig, image_size=32, patch_size=8, **_LAYERS)
T5 = partial(T5Config, vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
             decoder_start_token_id=0, eos_token_id=2, pad_token_id=0)  # fmt: skip
GPT2 = partial(GPT2Config, vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64,
               pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
RESNET = partial(ResNetConfig, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                 layer_type="basic")  # fmt: skip


def test_a_merged_run_answers_as_base_and_adapter(make_run: Make, tmp_path: Path) -> None:
    result = train(make_run())
    exported = export_run(result.folder, tmp_path / "merged", dtype="fp32", onto="dequantized")
    assert exported.report["rows"]["from"] == "held-out rows"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    trained = load_trained(result.folder)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        ours, theirs = trained.model(ids).logits.float(), merged(ids).logits
    assert (ours - theirs).norm() / ours.norm() < 2e-2  # one side computes in bf16
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    with pytest.raises(UserError, match="exists already"):
        export_run(result.folder, tmp_path / "merged")


def test_a_bare_adapter_needs_its_base(make_run: Make, tiny_model: Path, tmp_path: Path) -> None:
    adapter = train(make_run()).folder / "adapter"
    exported = export_run(
        adapter, tmp_path / "merged", base=str(tiny_model), onto="original", prove=False
    )
    assert (exported.folder / "model.safetensors").is_file()
    with pytest.raises(UserError, match="neither a finished run nor an adapter"):
        export_run(tmp_path, tmp_path / "none")
    with pytest.raises(UserError, match="no such folder"):
        export_run(adapter, tmp_path / "none", base="/not/there")
    assert not (tmp_path / "none").exists()
    # without --base, the very commit the adapter names is asked for
    named = json.loads((adapter / "adapter_config.json").read_text())
    named.update(base_model_name_or_path="owner/name", revision="ab" * 20)
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(
        UserError, match=rf"owner/name \(revision {'ab' * 20}\) is not in the cache"
    ):
        export_run(adapter, tmp_path / "none")


def test_a_copy_of_a_base_from_the_hub_has_none_of_its_commits(
    make_run: Make, tiny_model: Path, tmp_path: Path
) -> None:
    folder = train(make_run()).folder
    file = folder / "run.yaml"
    values = yaml.safe_load(file.read_text())
    values["model"].update(source="owner/name", revision="ab" * 20)
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="owner/name"):
        export_run(folder, tmp_path / "none", prove=False)
    exported = export_run(
        folder, tmp_path / "merged", base=str(tiny_model), onto="original", prove=False
    )
    assert (exported.folder / "model.safetensors").is_file()


def test_another_base_than_was_trained_on_is_refused_and_one_asked_for_is_said(
    make_run: Make, tiny_model: Path, tmp_path: Path
) -> None:
    folder = train(make_run()).folder
    told = Told()
    environment = folder / "environment.json"
    content = json.loads(environment.read_text())
    environment.write_text(json.dumps({**content, "base_fingerprint": "of another"}))
    with pytest.raises(UserError, match="not the base this adapter was trained on any more"):
        export_run(folder, tmp_path / "merged", prove=False, onto="original")
    assert not (tmp_path / "merged").exists()
    export_run(
        folder, tmp_path / "merged", prove=False, onto="original", base=str(tiny_model),
        reporter=told,
    )  # fmt: skip
    assert any("has not the same files" in line for line in told.lines)


def test_every_run_that_is_joined_must_be_of_the_base(make_run: Make, tmp_path: Path) -> None:
    folder = train(make_run()).folder
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    environment = second / "environment.json"
    content = json.loads(environment.read_text())
    environment.write_text(json.dumps({**content, "base_fingerprint": "of another"}))
    with pytest.raises(UserError, match=r"second: .*not the base this adapter was trained on"):
        merge_adapter_folders(
            [(folder, 0.5), (second, 0.5)], tmp_path / "joined", format="adapter", prove=False
        )
    assert not (tmp_path / "joined").exists()


def test_a_run_is_not_overwritten_by_its_own_export(make_run: Make) -> None:
    folder = train(make_run()).folder
    with pytest.raises(UserError, match="replacing it would delete"):
        export_run(folder, folder, overwrite=True)
    assert (folder / "adapter").is_dir()


def test_choices_of_another_format_are_refused_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)q8_0: needs --format gguf.*bf16: an adapter goes"):
        export_run(tmp_path, tmp_path / "out", format="adapter", dtype="bf16", gguf_type="q8_0")


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


HEADS = {
    "SEQ_CLS": (BertForSequenceClassification, BERT, ["query", "value"]),
    "TOKEN_CLS": (BertForTokenClassification, BERT, ["query", "value"]),
    "QUESTION_ANS": (BertForQuestionAnswering, BERT, ["query", "value"]),
    "SEQ_2_SEQ_LM": (T5ForConditionalGeneration, T5, ["q", "v"]),
    "vit": (ViTForImageClassification, VIT, ["q_proj", "v_proj", "query", "value"]),
    "resnet": (ResNetForImageClassification, RESNET, ["convolution"]),
    "gpt2": (GPT2ForSequenceClassification, GPT2, ["c_attn"]),
}


@pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # PEFT asks transformers in a way that is to go
@pytest.mark.parametrize("task", HEADS)
def test_every_task_head_of_a_peft_adapter_is_merged_whole_and_proven(
    task: str, tmp_path: Path
) -> None:
    model_class, config, names = HEADS[task]
    torch.manual_seed(0)
    # A checkpoint with a head of two labels, and an adapter that brings one of five.
    model_class(config(num_labels=2)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    labels = 2 if task in ("QUESTION_ANS", "SEQ_2_SEQ_LM") else 5
    model = model_class.from_pretrained(
        tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    named = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    heads = {"vit": ["classifier"], "resnet": ["classifier.1"]}.get(task)
    settings = peft.LoraConfig(
        r=4, target_modules=[name for name in names if name in named], modules_to_save=heads,
        task_type={"gpt2": "SEQ_CLS"}.get(task, None if heads else task),
        fan_in_fan_out=task == "gpt2",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    exported = export_run(
        tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"), dtype="fp32",
        onto="original", quantization="none",
    )  # fmt: skip
    figures = exported.report["ways"]["original"]["proof"]["native"]["figures"]
    assert figures["positions"] >= 8
    assert figures["top1_agreement"] > 0.8  # one side computes in bf16
    expected_from = "random pixels" if task in ("vit", "resnet") else "random token ids"
    assert exported.report["rows"]["from"] == expected_from
    # Plain transformers, in fp32, gives what PEFT gives.
    merged = getattr(transformers, exported.report["auto_class"]).from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    assert merged.config.num_labels == labels
    if task in ("vit", "resnet"):
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        inputs = {"input_ids": torch.randint(3, 90, (1, 9))}
        if task == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = torch.randint(3, 90, (1, 4))
    with torch.no_grad():
        ours, theirs = merged.eval()(**inputs)[0], adapted.eval()(**inputs)[0]
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_check_says_before_training_what_servers_will_not_do(make_run: Make) -> None:
    assert serving(make_run(adapter={"rank": 16})) == []
    planned = make_run(adapter={"rank": 32, "rslora": True, "modules_to_save": ["norm"]})
    said = [str(note) for note in serving(planned)]
    assert any("vLLM: rank = 32" in line and "--max-lora-rank 32" in line for line in said)
    assert any("llama.cpp: rslora = true" in line for line in said)
    assert sum("modules_to_save = norm" in line for line in said) == 2


@pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # PEFT asks transformers in a way that is to go
def test_adapters_named_on_the_command_line_are_merged_by_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2()).save_pretrained(base)
    own = GPT2LMHeadModel.from_pretrained(base).transformer.h[0].attn.c_attn.weight.detach()
    expected = own.clone()
    for number, weight in enumerate((0.5, -2)):
        settings = peft.LoraConfig(
            r=2 + number, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM",
            init_lora_weights=False,
        )  # fmt: skip
        adapted = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), settings)
        adapted.save_pretrained(tmp_path / f"a{number}")
        merged = adapted.merge_and_unload().transformer.h[0].attn.c_attn.weight.detach()
        expected += weight * (merged - own)
    named = [f"{tmp_path / 'a0'}=0.5", f"{tmp_path / 'a1'}=-2"]
    out = tmp_path / "out"
    settings = ["--dtype", "fp32", "--onto", "original", "--quantization", "none"]
    arguments = ["merge-adapters", *named, "--out", str(out), *settings]
    app(arguments, standalone_mode=False)
    found = AutoModelForCausalLM.from_pretrained(out).transformer.h[0].attn.c_attn.weight
    assert (found - expected).norm() / expected.norm() < 1e-6
    report = json.loads((out / "export_report.json").read_text())
    assert report["ways"]["original"]["proof"]["native"]["figures"]["positions"] > 100
    assert "0.5 x a0 + -2 x a1" in capsys.readouterr().out
    together = tmp_path / "together"
    app([*arguments[:3], "--out", str(together), "--format", "adapter"], standalone_mode=False)
    again = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), together)
    found = again.merge_and_unload().transformer.h[0].attn.c_attn.weight
    assert (found - expected).norm() / expected.norm() < 1e-6
    config = tmp_path / "a1" / "adapter_config.json"
    config.write_text(config.read_text().replace('/base"', '/other"'))
    with pytest.raises(UserError, match="trained on different bases"):
        app([*arguments[:3], "--out", str(tmp_path / "none")], standalone_mode=False)
    with pytest.raises(UserError, match="'much' is not a number"):
        app(["merge-adapters", f"{tmp_path / 'a0'}=much", "--out", str(out)], standalone_mode=False)
