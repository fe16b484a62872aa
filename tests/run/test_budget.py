"""What a run may have of a card, and what is said of it."""

import pytest

from qlora_trainer.errors import UserError
from qlora_trainer.run.budget import budget_of, choose_card
from qlora_trainer.run.foresee import foresee_run, run_for_model
from tests.conftest import REPOSITORY

MODEL = str(REPOSITORY / "profiles" / "models" / "smollm2-135m.json")


@pytest.mark.parametrize(
    ("gpu", "budget", "message"),
    [
        ("rtx-9999", None, "--gpu rtx-9999: no profile.*known cards.*rtx-3060-12gb"),
        ("rtx-3060", None, "did you mean rtx-3060-12gb"),
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
        choose_card(gpu, budget)


def test_the_desktops_share_leaves_the_run_less_and_is_said() -> None:
    card = choose_card("rtx-3060-12gb", None)
    whole = budget_of(card, run_for_model("m"), platform="linux")
    assert whole.budget_bytes == card.gpu.usable_bytes
    assert "the desktop has nothing (assumed here" in whole.notes[0]
    shared = budget_of(card, run_for_model("m", ["memory.desktop_share=2 GiB"]), platform="linux")
    assert shared.budget_bytes == card.gpu.usable_bytes - 2 * 2**30
    assert "2.0 GiB (memory.desktop_share)" in shared.notes[0]


def test_windows_has_a_desktop_and_spills_and_counts_what_is_paged() -> None:
    run = run_for_model(MODEL, ["adapter.rank=128", "data.max_seq_len=128"])
    card = choose_card("rtx-3060-12gb", None)
    windows, linux = (budget_of(card, run, platform=p) for p in ("win32", "linux"))
    assert linux.budget_bytes - windows.budget_bytes == 2**30
    assert any("spills into RAM silently" in note for note in windows.notes)
    assert not linux.paged_on_card
    there = foresee_run(run, card.gpu, paged_on_card=windows.paged_on_card)
    here = foresee_run(run, card.gpu, paged_on_card=linux.paged_on_card)
    assert there.total_bytes - here.total_bytes == here.paged_bytes > 0


def test_that_savings_of_compiled_kernels_are_not_counted_is_said() -> None:
    card = choose_card("rtx-3060-12gb", None)
    plain, compiled = (
        budget_of(card, run_for_model(MODEL, [f"train.compile={on}"]), platform="linux")
        for on in ("false", "true")
    )
    (said,) = set(compiled.notes) - set(plain.notes)
    assert "what compiled kernels save is not counted" in said
    assert compiled.budget_bytes == plain.budget_bytes


def test_what_is_said_to_be_free_is_not_shared_again() -> None:
    card = choose_card("rtx-3060-12gb", "7.5 GiB")
    budget = budget_of(card, run_for_model("m", ["memory.desktop_share=2 GiB"]), platform="linux")
    assert budget.budget_bytes == int(7.5 * 2**30)


def test_a_desktop_that_leaves_nothing_is_refused() -> None:
    card = choose_card("rtx-3060-12gb", None)
    with pytest.raises(UserError, match=r"memory\.desktop_share = '20 GiB'.*take less"):
        budget_of(card, run_for_model("m", ["memory.desktop_share=20 GiB"]))
