from typing import Any

import pytest
import torch

from qlora_trainer.training.environment import (
    describe_environment,
    environment_changes,
    with_resumption,
)


def here() -> dict[str, Any]:
    return describe_environment(
        torch.device("cpu"), torch.bfloat16, model_revision=None, base_fingerprint="b"
    )


@pytest.mark.parametrize("name", ["torch", "transformers", "bitsandbytes"])
def test_another_version_of_what_computes_is_told(name: str) -> None:
    old = here()
    old["versions"][name] = "0.1"
    (line,) = environment_changes(old, here())
    assert line.startswith(f"versions.{name}: was '0.1', now '")


@pytest.mark.parametrize("name", ["device", "compute_dtype", "threads"])
def test_another_machine_is_told(name: str) -> None:
    (line,) = environment_changes(here() | {name: "other"}, here())
    assert line.startswith(f"{name}: was 'other'")


def test_another_kernel_of_the_system_changes_no_bit() -> None:
    old = here()
    old["versions"]["system"] = "other"
    assert environment_changes(old, here()) == []


def test_the_beginning_is_kept_and_every_resumption_added() -> None:
    twice = with_resumption(with_resumption({"threads": 1}, {"threads": 2}), {"threads": 3})
    assert twice == {"threads": 1, "resumed": [{"threads": 2}, {"threads": 3}]}
