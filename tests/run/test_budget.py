"""What a run may have of a card, and what is said of it."""

import pytest

from qlora_trainer.errors import UserError
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.run.budget import Card, budget_of, choose_card
from qlora_trainer.run.fit import solve
from qlora_trainer.run.foresee import foresee_run, run_for_model
from qlora_trainer.run.foresee_all import foresee_all
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


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:63", r"model\.device = 'cuda:63': torch finds \d+ GPUs.*name a card with --gpu"),
        ("cpu", r"model\.device = 'cpu': is no card.*name one with --gpu"),
    ],
)
def test_without_a_name_the_card_is_the_one_the_run_would_take(device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_card(None, None, device=device)
    assert choose_card("rtx-3060-12gb", None, device=device).gpu.key == "rtx-3060-12gb"


def test_the_desktops_share_leaves_the_run_less_and_is_said() -> None:
    card = choose_card("rtx-3060-12gb", None)
    whole = budget_of(card, run_for_model("m"), windows=False)
    assert whole.budget_bytes == card.gpu.usable_bytes
    assert "the desktop has nothing (assumed here" in whole.notes[0]
    shared = budget_of(card, run_for_model("m", ["memory.desktop_share=2 GiB"]), windows=False)
    assert shared.budget_bytes == card.gpu.usable_bytes - 2 * 2**30
    assert "2.0 GiB (memory.desktop_share)" in shared.notes[0]


def test_windows_has_a_desktop_and_spills_and_counts_what_is_paged() -> None:
    run = run_for_model(MODEL, ["adapter.rank=128", "data.max_seq_len=128"])
    card = choose_card("rtx-3060-12gb", None)
    windows, linux = (budget_of(card, run, windows=w) for w in (True, False))
    assert linux.budget_bytes - windows.budget_bytes == 2**30
    assert any("spills into RAM silently" in note for note in windows.notes)
    assert not linux.paged_on_card
    there = foresee_run(run, card.gpu, paged_on_card=windows.paged_on_card)
    here = foresee_run(run, card.gpu, paged_on_card=linux.paged_on_card)
    assert there.total_bytes - here.total_bytes == here.paged_bytes > 0


def test_that_savings_of_compiled_kernels_are_not_counted_is_said() -> None:
    card = choose_card("rtx-3060-12gb", None)
    plain, compiled = (
        budget_of(card, run_for_model(MODEL, [f"train.compile={on}"]), windows=False)
        for on in ("false", "true")
    )
    (said,) = set(compiled.notes) - set(plain.notes)
    assert "what compiled kernels save is not counted" in said
    assert compiled.budget_bytes == plain.budget_bytes


def test_what_is_said_to_be_free_is_not_shared_again() -> None:
    card = choose_card("rtx-3060-12gb", "7.5 GiB")
    budget = budget_of(card, run_for_model("m", ["memory.desktop_share=2 GiB"]), windows=False)
    assert budget.budget_bytes == int(7.5 * 2**30)


def test_a_desktop_that_leaves_nothing_is_refused() -> None:
    card = choose_card("rtx-3060-12gb", None)
    with pytest.raises(UserError, match=r"memory\.desktop_share = '20 GiB'.*take less"):
        budget_of(card, run_for_model("m", ["memory.desktop_share=20 GiB"]))


def test_segments_that_expand_are_foreseen_on_the_card_here_and_not_on_one_named() -> None:
    run = run_for_model(MODEL, ["data.max_seq_len=512", "train.micro_batch_size=2"])
    asked = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64"}
    named = choose_card("rtx-3060-12gb", "11 GiB")
    here = Card(read_gpu("rtx-3060-12gb"), named.free_bytes, "free now", is_here=True)
    plain, growing, elsewhere = (
        budget_of(card, run, windows=False, environment=environment)
        for card, environment in ((here, {}), (here, asked), (named, asked))
    )
    (said,) = set(growing.notes) - set(plain.notes)
    assert said == "PYTORCH_CUDA_ALLOC_CONF: foreseen without max_split_size_mb"
    assert "not for one named by --gpu" in elsewhere.notes[-1]
    budgets = (plain, growing, elsewhere)
    found = [each.reserved_bytes for each in foresee_all([(run, budget) for budget in budgets])]
    assert found[1] < found[0] == found[2]
    for budget, reserved in zip((plain, growing), found, strict=False):
        (answer,) = solve(run, budget, ["change"])
        assert answer.foresight is not None
        assert answer.foresight.reserved_bytes == reserved
