"""A run's memory is foreseen from config.json, and bad questions get clear answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.memory.full_batch import full_batch
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.run.foresee import (
    foresee_run,
    read_model_config,
    run_for_model,
    run_shape,
    sweep,
)

Make = Callable[..., RunConfig]


def test_more_tokens_need_more_memory_and_the_card_decides(tiny_model: Path) -> None:
    card = read_gpu("rtx-3050-8gb")
    found = [
        foresee_run(run, card)
        for _, run in sweep(None, str(tiny_model), [], ["data.max_seq_len=64,512"])
    ]
    assert found[0].allocated_bytes < found[1].allocated_bytes
    assert found[1].verdict == "fits"
    tight = foresee_run(
        run_for_model(str(tiny_model), ["data.max_seq_len=512"]),
        card,
        budget_bytes=card.context_bytes + 2**20,
    )
    assert tight.verdict == "does not fit"


@pytest.mark.parametrize("chunk", ["null", "64"])
def test_what_is_chosen_leaves_some_of_the_card_and_refuses_nothing(
    tmp_path: Path, chunk: str
) -> None:
    """The layers' plan where the chunk is named, the chunk where it is not."""
    transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=4096, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
    ).save_pretrained(tmp_path)  # fmt: skip
    settings = ("data.max_seq_len=4096", "train.activations=auto")
    run = run_for_model(str(tmp_path), [*settings, f"train.loss_chunk_tokens={chunk}"])
    card, spare = read_gpu("rtx-3090-24gb"), 3 * 2**30 // 10
    most = foresee_run(run, card)
    enough = foresee_run(run, card, budget_bytes=most.total_bytes + spare)
    assert (enough.total_bytes, enough.verdict) == (most.total_bytes, "fits")
    less = foresee_run(run, card, budget_bytes=most.total_bytes + spare - 1)
    assert less.total_bytes < most.total_bytes
    least = foresee_run(run, card, budget_bytes=spare)
    assert least.total_bytes <= less.total_bytes
    assert foresee_run(run, card, budget_bytes=least.total_bytes).verdict == "tight"


def test_a_config_file_of_any_name_is_enough(tiny_model: Path, tmp_path: Path) -> None:
    card = read_gpu("rtx-3060-12gb")
    file = tmp_path / "llama-tiny.json"
    file.write_text((tiny_model / "config.json").read_text())
    settings = ["data.max_seq_len=128"]
    from_file = foresee_run(run_for_model(str(file), settings), card)
    from_folder = foresee_run(run_for_model(str(tiny_model), settings), card)
    assert from_file.allocated_bytes == from_folder.allocated_bytes


def test_pictures_are_as_large_as_the_processor_makes_them(tmp_path: Path) -> None:
    transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=224,
    ).save_pretrained(tmp_path)  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')

    def sides(*settings: str) -> tuple[int, ...]:
        run = run_for_model(str(tmp_path), ["task=image-classification", *settings])
        shape = run_shape(run, read_model_config(run), None)
        return tuple(full_batch(shape, read_model_config(run))["pixel_values"].shape[-2:])

    assert sides() == (64, 64)
    assert sides("task_settings.image_size=32") == (32, 32)
    (tmp_path / "preprocessor_config.json").unlink()
    assert sides() == (224, 224)


def test_an_axis_may_hold_values_with_commas() -> None:
    axes = ["adapter.target_modules=[q_proj,v_proj],all-linear", "adapter.rank=4,8"]
    found = [changed for changed, _ in sweep(None, "m", [], axes)]
    assert len(found) == 4
    assert found[0] == ("adapter.target_modules=[q_proj,v_proj]", "adapter.rank=4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.max_seq_len=4096"], r"data\.max_seq_len = 4096: .* knows 512 positions"),
        (["data.max_seq_len=128", "adapter.layers={last: 9}"], "layers 0 to 2"),
        (["data.max_seq_len=128", "adapter.target_modules=[q_prj]"], "q_proj"),
    ],
)
def test_settings_the_model_cannot_have_are_refused(
    tiny_model: Path, settings: list[str], message: str
) -> None:
    card = read_gpu("rtx-3060-12gb")
    with pytest.raises(UserError, match=message):
        foresee_run(run_for_model(str(tiny_model), settings), card)


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    card = read_gpu("rtx-3060-12gb")
    broken = tmp_path / "config.json"
    broken.write_text('{"model_type": "llama", ')
    with pytest.raises(UserError, match=r"config\.json"):
        foresee_run(run_for_model(str(broken)), card)
    with pytest.raises(UserError, match="no such folder"):
        foresee_run(run_for_model("/nowhere/at/all"), card)
    with pytest.raises(UserError, match=r"write section\.setting=value,value"):
        list(sweep(None, "m", [], ["data.max_seq_len"]))
