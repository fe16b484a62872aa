"""Tiny random ViT, DINOv2 and ResNet on made pictures: horizontal, vertical and no stripes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.load import load_base
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.select import trained_heads
from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.data.dataset import EncodedDataset, build_dataset
from qlora_trainer.data.read import DataSource, open_source
from qlora_trainer.errors import UserError
from qlora_trainer.lora.files import load_adapter, save_adapter
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.image_classification import KIND, weightless_batch
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs
from qlora_trainer.tasks.task import ScoredTask
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.step import train_step

CPU = torch.device("cpu")
SIDE = 32
SETTINGS = {"labels": None, "augment": "none", "image_size": None, "class_weights": "none"}
NAMES = ("across", "down", "plain")
NF4 = BaseSpec(quantization="nf4", compute_dtype=torch.float32)

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
       "intermediate_size": 64, "image_size": SIDE}  # fmt: skip
DINO = {**VIT, "mlp_ratio": 2}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
MODELS = {
    "vit": (ViTForImageClassification, ViTConfig, VIT, "all-linear"),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, DINO, "all-linear"),
    "resnet": (ResNetForImageClassification, ResNetConfig, RESNET, ("convolution",)),
}


def picture(kind: str, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 60, (SIDE, SIDE, 3))
    stripes = (np.arange(SIDE) // 4 % 2) * 180
    pattern = {"across": stripes[:, None], "down": stripes[None, :], "plain": np.array(90)}[kind]
    return Image.fromarray((noise + np.broadcast_to(pattern[..., None], noise.shape)).astype("u1"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stripes")
    for number, name in enumerate(NAMES):
        (root / name).mkdir()
        for index in range(4 + 2 * number):
            picture(name, 10 * number + index).save(root / name / f"{index}.png")
    return root


def inputs(data: Path, config, **changes) -> EncoderInputs:
    values = {
        "tokenizer": None, "config": config, "max_seq_len": 8, "over_length": "raise",
        "processor": ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        "settings": {**SETTINGS, **changes},
        "training_rows": lambda: (r.record for r in open_source(DataSource(str(data))).rows(None)),
    }  # fmt: skip
    return EncoderInputs(**values)


def base(name: str, folder: Path, spec: BaseSpec = NF4, *, headless: bool = False) -> nn.Module:
    """The model as a run loads it, from a checkpoint that may know nothing of our labels."""
    kind, config_class, sizes, _ = MODELS[name]
    torch.manual_seed(4)
    model = Dinov2Model(Dinov2Config(**DINO)) if headless else kind(config_class(**sizes))
    model.save_pretrained(folder)
    settings = {"num_labels": 3, "id2label": dict(enumerate(NAMES))}
    return load_base(
        folder, KIND.auto_class, spec, CPU, new_heads_allowed=True, config_changes=settings
    )


def adapted(name: str, folder: Path, **more) -> tuple[nn.Module, AdapterSpec]:
    model = base(name, folder, **more)
    spec = AdapterSpec(
        rank=4, alpha=8, target_modules=MODELS[name][3], modules_to_save=tuple(trained_heads(model))
    )
    inject_adapter(model, spec, dtype=torch.float32, seed=1)
    return model, spec


def encoded(data: Path, encoder, cache: Path) -> EncodedDataset:
    return build_dataset([DataSource(str(data))], encoder, max_seq_len=8, cache_dir=cache)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_learns_is_saved_with_its_head_and_predicts_the_same(name, data, tmp_path):
    model, spec = adapted(name, tmp_path / "base")
    encoder = KIND.make_encoder(inputs(data, model.config))
    rows = encoded(data, encoder, tmp_path / "cache")
    task = KIND.make_task(TaskInputs(model, SETTINGS, encoder, rows))
    assert isinstance(task, ScoredTask)
    batch = task.prepare(encoder.collate(rows, range(len(rows))))
    references = [encoder.reference(rows, index) for index in range(len(rows))]
    frozen = {n: t.clone() for n, t in model.state_dict().items() if "running" in n}

    def measured(model):
        model.eval()
        sums, made = task.evaluate_rows(model, batch)
        figures = {key: float(value) / len(rows) for key, value in sums.items()}
        return {**figures, **task.score(made, references).metrics}, made

    before, _ = measured(model)
    optimizer = AdapterAdamW(adapter_parameters(model), kind="adamw")
    model.train()
    for step in range(25):
        train_step(
            model, [batch], task=task, optimizer=optimizer, learning_rate=1e-2, device=CPU,
            step=step,
        )  # fmt: skip
    after, predictions = measured(model)
    assert after.keys() == task.metrics.keys()
    assert after["accuracy"] > max(before["accuracy"], 0.9)
    assert after["macro_f1"] > before["macro_f1"]
    assert after["top5_accuracy"] == 1.0  # of three classes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())

    (tmp_path / "adapter").mkdir()
    save_adapter(model, spec, tmp_path / "adapter", base_source="x", task_type=KIND.peft_type)
    again = base(name, tmp_path / "base")
    load_adapter(again, tmp_path / "adapter", dtype=torch.float32, trainable=False)
    assert measured(again)[1] == predictions


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_models_own(name, data, tmp_path):
    model, _ = adapted(name, tmp_path / "base")
    encoder = KIND.make_encoder(inputs(data, model.config))
    rows = encoded(data, encoder, tmp_path / "cache")
    task = KIND.make_task(TaskInputs(model, SETTINGS, encoder, rows))
    batch = task.prepare(encoder.collate(rows, [0, 5, 9]))
    own = model(**batch).loss * task.loss_weight(batch)
    torch.testing.assert_close(task.loss_sum(model, batch), own)


@pytest.mark.parametrize(("name", "quantized"), [("vit", 12), ("dinov2", 12), ("resnet", 0)])
def test_linear_layers_are_in_4_bit_and_the_audit_says_what_stayed(name, quantized, tmp_path):
    model = base(name, tmp_path / "base")
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == quantized
    audit = audit_base(model)
    reasons = {tensor.kept_because for tensor in audit.tensors} - {""}
    assert "convolution: NF4 kernels only multiply matrices" in reasons
    assert "head: stays in the compute dtype" in reasons
    assert ("linear weights (NF4)" in audit.bytes_by_role) == (quantized > 0)


def test_a_backbone_without_a_head_gets_one(data, tmp_path):
    model, spec = adapted("dinov2", tmp_path / "base", headless=True)
    assert spec.modules_to_save == ("classifier",)
    assert model.config.id2label == dict(enumerate(NAMES))


def test_the_base_may_compute_in_16_bit(data, tmp_path):
    spec = BaseSpec(quantization="nf4", compute_dtype=torch.bfloat16)
    for name in MODELS:
        model, _ = adapted(name, tmp_path / name, spec=spec)
        encoder = KIND.make_encoder(inputs(data, model.config))
        rows = encoded(data, encoder, tmp_path / "cache")
        task = KIND.make_task(TaskInputs(model, SETTINGS, encoder, rows))
        assert task.dtype == torch.bfloat16
        loss = task.loss_sum(model.train(), task.prepare(encoder.collate(rows, [0, 8])))
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_rare_classes_can_count_more(data, tmp_path):
    model, _ = adapted("vit", tmp_path / "base")
    encoder = KIND.make_encoder(inputs(data, model.config))
    rows = encoded(data, encoder, tmp_path / "cache")
    settings = {**SETTINGS, "class_weights": "balanced"}
    task = KIND.make_task(TaskInputs(model, settings, encoder, rows))
    weights = task.class_weights
    assert weights.tolist() == pytest.approx([18 / (3 * n) for n in (4, 6, 8)])
    batch = task.prepare(encoder.collate(rows, [0, 17]))
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
        each = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        expected = float(each[0] * weights[0] + each[1] * weights[2])
        assert float(task.loss_sum(model, batch)) == pytest.approx(expected, rel=1e-5)


def test_predictions_tell_label_probability_and_the_next_likely(data, tmp_path):
    model, _ = adapted("vit", tmp_path / "base")
    encoder = KIND.make_encoder(inputs(data, model.config, labels=list(NAMES)))
    rows = encoded(data, encoder, tmp_path / "cache")
    task = KIND.make_task(TaskInputs(model, SETTINGS, encoder, None))
    made = task.predict(model.eval(), task.prepare(encoder.collate(rows, [0, 1])))
    told = task.tell(made, [None, None])
    assert told[0]["top"][0] == [told[0]["label"], told[0]["score"]]
    assert sum(share for _, share in told[0]["top"]) == pytest.approx(1)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_runs_without_weights(name):
    kind, config_class, sizes, targets = MODELS[name]
    settings = {**SETTINGS, "labels": list(NAMES), "image_size": SIDE}
    changes = KIND.weightless_settings(settings)
    with torch.device("meta"):
        model = kind(config_class(**sizes, id2label=changes["id2label"]))
    heads = tuple(trained_heads(model))
    spec = AdapterSpec(rank=4, alpha=8, target_modules=targets, modules_to_save=heads)
    inject_adapter(model, spec, dtype=torch.float32)
    task = KIND.make_task(TaskInputs(model, settings))
    batch = task.prepare(
        weightless_batch(model.config, rows=2, tokens=8, padded=False, settings=settings)
    )
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    task.loss_sum(model, {key: value.to("meta") for key, value in batch.items()}).backward()


def test_models_and_settings_that_do_not_fit_are_refused(data):
    with pytest.raises(UserError, match="pictures of 1 channels"):
        KIND.make_encoder(inputs(data, ViTConfig(num_channels=1)))
    with pytest.raises(UserError, match=r"task_settings\.labels = \['a'\]: at least two"):
        KIND.make_encoder(inputs(data, ViTConfig(), labels=["a"]))
