"""Settings that contradict each other, where they are about what the step holds."""

import pytest

from qlora_trainer.config.read import check_values
from qlora_trainer.errors import UserError

SMALLEST = {"model": {"source": "m"}, "data": {"train": "d"}}


def test_streamed_layers_cannot_keep_their_activations() -> None:
    streamed = ["model.stream_layers=true"]
    assert check_values(SMALLEST, overrides=streamed, name="run").model.stream_layers
    with pytest.raises(UserError, match=r"train.activations = 'keep': .* leave the card"):
        check_values(SMALLEST, overrides=[*streamed, "train.activations=keep"], name="run")


def test_layers_in_parts_cannot_keep_their_activations_nor_wait_on_the_host() -> None:
    shared = ["model.shard_layers=true"]
    assert check_values(SMALLEST, overrides=shared, name="run").model.shard_layers
    both = [*shared, "train.activations=keep", "model.stream_layers=true"]
    with pytest.raises(UserError) as told:
        check_values(SMALLEST, overrides=both, name="run")
    assert "train.activations = 'keep': a layer of model.shard_layers = true" in str(told.value)
    assert "model.stream_layers = true: with model.shard_layers = true" in str(told.value)


def test_layers_in_parts_are_not_compiled() -> None:
    both = ["model.shard_layers=true", "train.compile=true"]
    assert check_values(SMALLEST, overrides=both[1:], name="run").train.compile
    with pytest.raises(UserError, match=r"train.compile = true: .*model.shard_layers = true"):
        check_values(SMALLEST, overrides=both, name="run")


@pytest.mark.parametrize("setting", ["label_smoothing", "z_loss"])
def test_only_tasks_with_a_vocabulary_know_what_regularizes_its_loss(setting: str) -> None:
    given = [f"train.{setting}=0.1"]
    for task in ("causal-lm", "seq2seq-lm"):
        values = {**SMALLEST, "task": task}
        assert getattr(check_values(values, overrides=given, name="run").train, setting) == 0.1
    with pytest.raises(UserError, match=rf"train.{setting} = 0.1: means nothing with task"):
        check_values({**SMALLEST, "task": "image-classification"}, overrides=given, name="run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantization=none", "nothing is quantized"),
        ("model.trust_remote_code=true", "Python of its own"),
        ("task=image-classification", "is not the checkpoint's"),
    ],
)
def test_a_quantized_copy_is_of_a_model_that_can_be_copied(override: str, message: str) -> None:
    cached = ["model.quantized_cache=copies"]
    assert check_values(SMALLEST, overrides=cached, name="run").model.quantized_cache == "copies"
    with pytest.raises(UserError, match=rf"model.quantized_cache = 'copies': .*{message}"):
        check_values(SMALLEST, overrides=[*cached, override], name="run")


def test_a_head_has_16_8_or_4_bits() -> None:
    with pytest.raises(UserError, match=r"model.head_bits = 5"):
        check_values(SMALLEST, overrides=["model.head_bits=5"], name="run")


def test_a_head_on_the_host_is_in_16_bits() -> None:
    both = ["model.head_on_host=true", "model.head_bits=8"]
    with pytest.raises(UserError, match=r"model.head_bits = 8: with model.head_on_host = true"):
        check_values(SMALLEST, overrides=both, name="run")
    assert check_values(SMALLEST, overrides=both[:1], name="run").model.head_on_host
