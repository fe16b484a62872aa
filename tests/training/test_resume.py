import pytest

from qlora_trainer.errors import UserError
from qlora_trainer.training.resume import compare_settings, require_same_run

SETTINGS = {
    "model": {"source": "m", "device": "cpu"},
    "adapter": {"rank": 8, "target_modules": ["a", "b"], "rank_pattern": {}},
    "data": {"max_seq_len": 64},
    "train": {"seed": 1, "epochs": 1, "micro_batch_size": 2, "max_steps": None},
    "evaluation": {"every_steps": None},
    "output": {"folder": "runs/a"},
}


def changed(section: str, key: str, value: object) -> dict[str, dict[str, object]]:
    return {**SETTINGS, section: {**SETTINGS[section], key: value}}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "source", "other"),
        ("adapter", "rank", 16),
        ("adapter", "target_modules", ["a"]),
        ("adapter", "rank_pattern", {"q_proj": 4}),
        ("data", "max_seq_len", 128),
        ("train", "seed", 2),
        ("train", "micro_batch_size", 1),
        ("train", "a_setting_of_tomorrow", 1),
    ],
)
def test_what_cannot_hold_is_refused_by_name(section: str, key: str, value: object) -> None:
    differences = compare_settings(SETTINGS, changed(section, key, value))
    with pytest.raises(UserError, match=rf"{section}\.{key}"):
        require_same_run(differences)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "epochs", 3),
        ("train", "max_steps", 10),
        ("output", "folder", "runs/b"),
        ("evaluation", "every_steps", 5),
        ("model", "device", "cuda"),
    ],
)
def test_what_only_changes_the_road_is_allowed_and_said(
    section: str, key: str, value: object
) -> None:
    differences = compare_settings(SETTINGS, changed(section, key, value))
    require_same_run(differences)
    assert len(differences.allowed) == 1
    assert f"{section}.{key}: was" in differences.allowed[0]


def test_the_same_settings_do_not_differ_even_as_tuples() -> None:
    same = changed("adapter", "target_modules", ("a", "b"))
    differences = compare_settings(SETTINGS, same)
    assert not differences.refused
    assert not differences.allowed


def test_all_faults_come_at_once() -> None:
    other = changed("adapter", "rank", 16) | {"data": {"max_seq_len": 1}}
    with pytest.raises(UserError, match=r"2 faults"):
        require_same_run(compare_settings(SETTINGS, other))
