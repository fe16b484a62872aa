"""A run's memory is foreseen from config.json, and bad questions get clear answers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.run.foresee import choose_gpu, foresee_run, run_for_model, sweep

Make = Callable[..., RunConfig]


def test_more_tokens_need_more_memory_and_the_card_decides(tiny_model: Path) -> None:
    card, _ = choose_gpu("rtx-3050-8gb", None)
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


def test_a_config_file_of_any_name_is_enough(tiny_model: Path, tmp_path: Path) -> None:
    card, _ = choose_gpu("rtx-3060-12gb", None)
    file = tmp_path / "llama-tiny.json"
    file.write_text((tiny_model / "config.json").read_text())
    settings = ["data.max_seq_len=128"]
    from_file = foresee_run(run_for_model(str(file), settings), card)
    from_folder = foresee_run(run_for_model(str(tiny_model), settings), card)
    assert from_file.allocated_bytes == from_folder.allocated_bytes


@pytest.mark.parametrize(
    ("gpu", "budget", "message"),
    [
        ("rtx-9999", None, "--gpu rtx-9999: no profile.*rtx-3060-12gb"),
        ("rtx-3060-12gb", "-3 GiB", "--budget: '-3 GiB' is not a size"),
        ("rtx-3060-12gb", "much", "--budget: 'much' is not a size"),
        ("rtx-3060-12gb", "0", "nothing fits into 0 bytes"),
        (None, None, "no GPU here to foresee for; name one with --gpu"),
    ],
)
def test_a_card_that_cannot_be_is_refused(
    gpu: str | None, budget: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_gpu(gpu, budget)


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
    card, _ = choose_gpu("rtx-3060-12gb", None)
    with pytest.raises(UserError, match=message):
        foresee_run(run_for_model(str(tiny_model), settings), card)


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    card, _ = choose_gpu("rtx-3060-12gb", None)
    broken = tmp_path / "config.json"
    broken.write_text('{"model_type": "llama", ')
    with pytest.raises(UserError, match=r"config\.json"):
        foresee_run(run_for_model(str(broken)), card)
    with pytest.raises(UserError, match="no such folder"):
        foresee_run(run_for_model("/nowhere/at/all"), card)
    with pytest.raises(UserError, match=r"write section\.setting=value,value"):
        list(sweep(None, "m", [], ["data.max_seq_len"]))
