"""A whole run through the public API: what it leaves, what it refuses, how it goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_trainer import UserError, generate, held_out_metrics, load_run, load_trained, train
from qlora_trainer.base.dtype import choose_compute_dtype
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.lora.inject import adapter_parameters
from tests.run.conftest import Lines

Make = Callable[..., RunConfig]


def test_a_run_learns_and_its_folder_explains_itself(make_run: Make, tmp_path: Path) -> None:
    made = make_run()
    result = train(made)
    assert result.outcome.complete
    assert result.metrics["loss"] < result.metrics["loss_before"]
    names = {entry.name for entry in result.folder.iterdir()}
    assert {"run.yaml", "environment.json", "data.json", "audit.json", "metrics.jsonl", "adapter",
            "states", "loss.png", "result.json"} <= names  # fmt: skip
    assert "run.lock" not in names
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    card = (result.folder / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in card, "the card tells the user's paths"
    assert "loss_before" in card
    assert f'AutoModelForCausalLM.from_pretrained("path/to/{Path(made.model.source).name}")' in card
    assert load_run(result.folder / "run.yaml") == RunConfig.model_validate(
        yaml.safe_load((result.folder / "run.yaml").read_text())
    )


def test_the_saved_adapter_scores_what_training_measured(make_run: Make) -> None:
    result = train(make_run())
    trained = load_trained(result.folder)
    measured = held_out_metrics(trained)
    assert measured["loss"] == result.metrics["loss"]
    assert held_out_metrics(trained, adapter=False)["loss"] == result.metrics["loss_before"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's
def test_plain_peft_loads_what_a_run_leaves_from_anywhere(
    make_run: Make, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)  # the run file names the base from here, PEFT runs there
    run = make_run(
        model={"source": tiny_model.name, "quantization": "none", "compute_dtype": "fp32"}
    )
    result = train(run)
    monkeypatch.chdir(tmp_path)
    assert AutoPeftModelForCausalLM.from_pretrained(str(result.adapter)).active_adapter == "default"
    trained = load_trained(result.folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(result.adapter), autocast_adapter_dtype=False)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        ours, theirs = trained.model(ids).logits, peft(ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"packing": True}},
        {"model": {"compute_dtype": "fp16"}},
        {"model": {"quantization": "none"}, "train": {"max_steps": 8}},
        {"model": {"attention": "eager"}, "data": {"packing": True}},
        {"adapter": {"modules_to_save": ["lm_head", "embed_tokens"]}},
        {"adapter": {"modules_to_save": ["lm_head", "embed_tokens"], "dropout": 0.1},
         "model": {"compute_dtype": "fp16"}},
        {"adapter": {"layers": {"last": 1}, "rslora": True, "target_modules": ["q_proj"]}},
        {"train": {"optimizer": "paged_adamw_8bit", "activations": "keep"}},
        {"train": {"activations": "auto", "fused_mlp": True, "fused_qkv": True}},
        {"train": {"activations": "offload", "fused_mlp": True, "mlp_tile_tokens": 16}},
        {"model": {"stream_layers": True, "embeddings_on_host": True, "head_on_host": True},
         "adapter": {"dropout": 0.1}},
        {"model": {"stream_layers": True, "embeddings_on_host": True, "head_bits": 8},
         "train": {"activations": "offload", "fused_qkv": True, "tiled_norms": True}},
        {"train": {"label_smoothing": 0.1, "z_loss": 1e-4}},
        {"train": {"fused_linear": False, "chunked_loss": False}},
        {"train": {"fused_linear": False, "chunked_loss": False, "z_loss": 1e-4},
         "model": {"embeddings_on_host": True, "head_on_host": True, "stream_layers": True}},
        {"train": {"optimizer": "adamw_8bit", "gradient_accumulation_steps": 3}},
        {"train": {"optimizer": "adamw", "max_grad_norm": 0.0, "schedule": "linear"}},
        {"output": {"trackers": ["tensorboard"], "save_every_steps": 1, "keep_last": 1}},
    ],
    ids=lambda sections: json.dumps(sections),
)  # fmt: skip
def test_every_choice_trains(make_run: Make, sections: dict[str, Any]) -> None:
    result = train(make_run(**sections))
    assert result.metrics["loss"] < result.metrics["loss_before"]
    trained = load_trained(result.folder)
    assert held_out_metrics(trained)["loss"] == pytest.approx(result.metrics["loss"], rel=2e-3)


def test_a_run_goes_on_with_the_chunk_of_the_loss_that_it_began_with(make_run: Make) -> None:
    """Which a card chooses by what is free; here the run file of the beginning does."""
    settings = {"schedule": "constant", "warmup_ratio": 0.0}
    folder = train(make_run(train={**settings, "loss_chunk_tokens": 7, "max_steps": 1})).folder
    (folder / "result.json").unlink()  # as one that was stopped
    told = Lines()
    result = train(make_run(train={**settings, "max_steps": 2}), reporter=told)
    assert result.outcome.step == 2
    assert load_run(folder / "run.yaml").train.loss_chunk_tokens == 7
    assert not any("loss_chunk_tokens" in line for line in told.lines)
    (folder / "result.json").unlink()
    changed = make_run(train={**settings, "loss_chunk_tokens": 9, "max_steps": 3})
    train(changed, reporter=told)
    assert any("loss_chunk_tokens: was 7, now 9" in line for line in told.lines)


def test_a_kept_copy_of_the_quantized_base_trains_the_same(make_run: Make, tmp_path: Path) -> None:
    expected = train(make_run(output={"folder": str(tmp_path / "plain")})).metrics
    copies = {"quantized_cache": str(tmp_path / "copies")}
    for name in ("made", "read"):
        result = train(make_run(model=copies, output={"folder": str(tmp_path / name)}))
        assert result.metrics == expected


def test_a_tilde_in_the_output_folder_is_the_users_home(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    result = train(make_run(output={"folder": "~/runs/a"}, train={"max_steps": 1}))
    assert result.folder == home / "runs" / "a"
    assert load_run(result.folder / "run.yaml").output.folder == str(home / "runs" / "a")
    assert load_trained("~/runs/a").run.train.max_steps == 1
    assert list(here.iterdir()) == []


def test_variables_of_the_chat_template_are_there_in_training_and_in_asking(
    make_run: Make, tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{{ mood }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def model(mood: str) -> dict[str, Any]:
        return {"chat_template": str(template), "chat_template_kwargs": {"mood": mood}}

    folder = train(make_run(model=model("calm"), train={"max_steps": 1})).folder
    sample = json.loads((folder / "data.json").read_text())["samples"][0]
    assert "".join(text for text, _ in sample["pieces"]).startswith("calm<|im_start|>user")
    trained = load_trained(folder)
    asked = trained.encoder.encode_prompt([{"role": "user", "content": "Hi"}])
    assert trained.source.tokenizer.decode(asked).startswith("calm<|im_start|>user\nHi<|im_end|>")
    unfinish(folder)
    with pytest.raises(UserError, match=r"chat_template_kwargs\.mood: was 'calm', now 'wild'"):
        train(make_run(model=model("wild"), train={"max_steps": 1}))


def test_what_cannot_be_written_at_the_very_end_is_made_up_for(
    make_run: Make, tmp_path: Path
) -> None:
    expected = train(make_run(output={"folder": str(tmp_path / "whole")}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".qlora-run").write_text("")
    (tmp_path / "run" / "loss.png").mkdir()
    with pytest.raises(UserError, match=r"loss\.png: cannot be written \(Is a directory\); what"):
        train(make_run())
    (tmp_path / "run" / "loss.png").rmdir()
    listener = Lines()
    again = train(make_run(), reporter=listener)
    assert again.metrics == expected.metrics
    assert (again.folder / "result.json").is_file()
    metrics = (again.folder / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == len((expected.folder / "metrics.jsonl").read_text().splitlines())


def test_a_run_of_another_machine_answers_here(make_run: Make) -> None:
    folder = train(make_run()).folder
    expected = generate(load_trained(folder), ["What is 1 plus 1?"], max_new_tokens=4)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    settings["model"] |= {"attention": "flash_attention_2", "device": "auto"}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    listener = Lines()
    trained = load_trained(folder, reporter=listener)
    assert "model.attention = 'flash_attention_2', which this machine does not" in listener.lines[0]
    assert generate(trained, ["What is 1 plus 1?"], max_new_tokens=4) == expected
    with pytest.raises(UserError, match="flash_attention_2': needs a GPU"):
        train(load_run(folder / "run.yaml"), restart=True)
    settings["model"] |= {"attention": "auto", "compute_dtype": "fp32"}
    settings["adapter"]["dtype"] = "bf16"
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    dtypes = {p.dtype for p in adapter_parameters(load_trained(folder).model).values()}
    assert dtypes == {torch.float32}


def test_a_finished_run_is_kept_and_a_changed_one_is_not_mixed(make_run: Make) -> None:
    train(make_run())
    with pytest.raises(UserError, match=r"finished run.*--restart"):
        train(make_run())
    assert train(make_run(), restart=True).outcome.complete


def test_resuming_with_another_run_file_says_what_differs(make_run: Make, tmp_path: Path) -> None:
    train(make_run(output={"save_every_steps": 2}))
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed while finishing
    with pytest.raises(UserError, match=r"adapter\.rank: was 4, now 8"):
        train(make_run(adapter={"rank": 8}))
    listener = Lines()
    longer = train(
        make_run(train={"max_steps": 6}, output={"save_every_steps": 2}), reporter=listener
    )
    assert longer.outcome.step == 6
    assert any("train.max_steps: was 4, now 6" in line for line in listener.lines)


def test_generation_answers_in_order_and_the_adapter_can_be_off(make_run: Make) -> None:
    trained = load_trained(train(make_run(train={"max_steps": 40})).folder)
    prompts = ["What is 3 plus 3?", "A much longer question, to be padded: what is 5 plus 5?"]
    both = generate(trained, prompts, max_new_tokens=8)
    assert both == [generate(trained, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert both != generate(trained, prompts, adapter=False, max_new_tokens=8)
    sampled = generate(trained, prompts, max_new_tokens=8, temperature=1.5, seed=1)
    assert sampled == generate(trained, prompts, max_new_tokens=8, temperature=1.5, seed=1)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"max_seq_len": 1024}}, r"data\.max_seq_len = 1024: .* knows 512 positions"),
        ({"model": {"device": "cuda"}}, r"model\.device = 'cuda': torch finds 0 GPUs"),
        ({"model": {"source": "no/such-model"}}, "no/such-model"),
        ({"adapter": {"layers": {"last": 9}}}, "layers 0 to 2"),
        ({"adapter": {"target_modules": ["q_prj"]}}, "q_proj"),
        ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"data": {"max_seq_len": 8}}, r"data\.train: .*data\.max_seq_len"),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    make_run: Make, sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_run(**sections))
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "run.lock").exists()


def unfinish(folder: Path) -> None:
    """As if the run had been killed while finishing."""
    (folder / "result.json").unlink()


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"source": "no/such-model"}},
        {"data": {"train": "nowhere.jsonl"}},
        {"adapter": {"target_modules": ["q_prj"]}},
        {"train": {"max_steps": None, "epochs": 1, "warmup_steps": 500}},
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_a_restart_that_cannot_start_leaves_the_finished_run(
    make_run: Make, sections: dict[str, Any]
) -> None:
    folder = train(make_run(train={"max_steps": 2})).folder

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    before = written()
    with pytest.raises(UserError):
        train(make_run(**sections), restart=True)
    assert written() == before


def test_warm_up_longer_than_the_epochs_is_named(make_run: Make) -> None:
    with pytest.raises(UserError, match=r"train\.warmup_steps = 500: must be below the run's 5 st"):
        train(make_run(train={"max_steps": None, "epochs": 1, "warmup_steps": 500}))


def test_a_run_begun_by_an_older_version_goes_on(make_run: Make) -> None:
    folder = train(make_run(train={"max_steps": 2})).folder
    unfinish(folder)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    for section, name in (("model", "double_quant"), ("train", "beta2"), ("data", "packing")):
        del settings[section][name]
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    listener = Lines()
    assert train(make_run(train={"max_steps": 2}), reporter=listener).outcome.complete
    assert not [line for line in listener.lines if "differs" in line]
    unfinish(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"data\.packing: was False, now True"):
        train(make_run(train={"max_steps": 2}, data={"packing": True}))


def test_a_run_of_0_1_0_keeps_the_order_of_its_rows(make_run: Make, tmp_path: Path) -> None:
    """It sorted 50 micro-batches at once, and its run file does not say so."""
    rows = [{"prompt": "one " * (n % 7 + 1), "completion": f"{n}"} for n in range(110)]
    data = tmp_path / "many.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {"max_steps": 4, "micro_batch_size": 2}

    def make(place: str, **more: Any) -> RunConfig:
        of_data = {"train": str(data), "eval_fraction": 0.0, **more}
        output = {"folder": str(tmp_path / place), "save_every_steps": 2}
        return make_run(data=of_data, train=settings, output=output)

    def values(place: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / place / "adapter" / "adapter_model.safetensors")

    folder = train(make("as-then", mega_batch_mult=50)).folder
    as_then = values("as-then")
    train(make("as-now"))
    now = values("as-now")
    assert any(not torch.equal(now[name], held) for name, held in as_then.items())
    written = yaml.safe_load((folder / "run.yaml").read_text())
    del written["data"]["mega_batch_mult"]
    (folder / "run.yaml").write_text(yaml.safe_dump(written))
    for gone in ("adapter", "adapter-last", "states/step-00000004"):
        shutil.rmtree(folder / gone, ignore_errors=True)
    unfinish(folder)
    assert train(make("as-then")).outcome.complete
    resumed = values("as-then")
    assert all(torch.equal(resumed[name], held) for name, held in as_then.items())
    assert yaml.safe_load((folder / "run.yaml").read_text())["data"]["mega_batch_mult"] == 50


def test_resuming_on_another_base_is_refused(
    make_run: Make, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    sections = {"model": {"source": str(base)}, "train": {"max_steps": 2}}
    folder = train(make_run(**sections)).folder
    unfinish(folder)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the base model's files have changed"):
        train(make_run(**sections))


def test_resuming_with_other_held_out_rows_is_refused(make_run: Make, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "2 plus 2 is", "completion": " 4."}\n')
    data = {"eval": str(held_out), "eval_fraction": 0.0}
    train_rows = tmp_path / "train.jsonl"
    train_rows.write_text('{"prompt": "1 plus 2 is", "completion": " 3."}\n' * 8)
    sections = {"data": data | {"train": str(train_rows)}, "train": {"max_steps": 2}}
    folder = train(make_run(**sections)).folder
    unfinish(folder)
    held_out.write_text('{"prompt": "2 plus 2 is", "completion": " 5."}\n')
    with pytest.raises(UserError, match=r"the held-out data .* have changed"):
        train(make_run(**sections))


def test_resuming_elsewhere_is_said_and_recorded(make_run: Make) -> None:
    folder = train(make_run(train={"max_steps": 2})).folder
    unfinish(folder)
    file = folder / "environment.json"
    begun = json.loads(file.read_text())
    begun["versions"]["torch"] = "2.0.0"
    file.write_text(json.dumps(begun))
    listener = Lines()
    train(make_run(train={"max_steps": 2}), reporter=listener)
    assert [line for line in listener.lines if "versions.torch: was '2.0.0'" in line]
    recorded = json.loads(file.read_text())
    resumed = recorded.pop("resumed")
    assert recorded == begun
    assert [entry["versions"]["torch"] for entry in resumed] == [torch.__version__]


def test_a_run_goes_on_in_the_dtype_it_began_in(make_run: Make) -> None:
    """`auto` found another dtype where the run began than it finds here."""
    here = choose_compute_dtype("auto", torch.device("cpu"), "llama")
    there = "fp32" if here == torch.bfloat16 else "bf16"
    folder = train(make_run(train={"max_steps": 2}, model={"compute_dtype": there})).folder
    unfinish(folder)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    settings["model"]["compute_dtype"] = "auto"  # as that machine recorded it
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    listener = Lines()
    result = train(make_run(train={"max_steps": 4}), reporter=listener)
    assert result.outcome.step == 4
    told_slow = [line for line in listener.lines if line.startswith("computing in bf16: this CPU")]
    assert bool(told_slow) == (there == "bf16")
    assert not [line for line in listener.lines if "began elsewhere" in line]
    recorded = json.loads((folder / "environment.json").read_text())
    assert recorded["resumed"][0]["compute_dtype"] == recorded["compute_dtype"] == there
    assert yaml.safe_load((folder / "run.yaml").read_text())["model"]["compute_dtype"] == "auto"


def test_a_template_of_the_users_own_goes_with_the_adapter(make_run: Make, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    result = train(make_run(model={"chat_template": str(template)}, train={"max_steps": 2}))
    assert result.adapter is not None
    assert "[{{ m.role }}]" in (result.adapter / "chat_template.jinja").read_text()


def test_an_adapter_is_not_put_on_another_base(make_run: Make, tmp_path: Path) -> None:
    run = make_run()
    moved = tmp_path / "base"
    shutil.copytree(run.model.source, moved)
    result = train(make_run(model={"source": str(moved)}))
    weights = load_file(moved / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, moved / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="not the base this adapter was trained on"):
        load_trained(result.folder)
    (result.folder / "environment.json").write_text("{}")
    with pytest.raises(UserError, match=r"environment\.json: does not tell"):
        load_trained(result.folder)
