"""The allocator's configuration is read as torch reads it, and what is left out is said."""

import os
import subprocess
import sys

import pytest

from qlora_trainer.memory.allocator_settings import allocator_settings, configured

ON, OFF = "expandable_segments:True", "expandable_segments:False"
CUDA, HIP, ANY = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize(
    "environment", [{}, {ANY: ON}, {ANY: ON, HIP: OFF}, {ANY: ON, CUDA: OFF}, {ANY: ON, CUDA: ""}]
)
def test_the_variable_taken_is_the_one_that_torch_takes(environment: dict[str, str]) -> None:
    others = {name: value for name, value in os.environ.items() if name not in (CUDA, HIP, ANY)}
    told = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch._C._accelerator_getAllocatorSettings())"],
        env=others | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = configured(environment)
    assert told.stdout.strip() == ("" if found is None else found[1])


@pytest.mark.parametrize(
    ("text", "expandable", "left_out"),
    [
        ("", False, None),
        (ON, True, None),
        (" expandable_segments : True , backend:native", True, None),
        (f"{ON},{OFF}", False, None),
        (f"max_split_size_mb:512,{ON}", True, "max_split_size_mb"),
        (
            "roundup_power2_divisions:[256:1,>:4],garbage_collection_threshold:0.8",
            False,
            "roundup_power2_divisions, garbage_collection_threshold",
        ),
    ],
)
def test_what_is_not_modelled_is_named(text: str, expandable: bool, left_out: str | None) -> None:
    found = allocator_settings({ANY: text}, "linux")
    assert found.expandable_segments is expandable
    assert found.note == (left_out and f"{ANY}: foreseen without {left_out}")


def test_torch_for_windows_has_no_segments_that_expand() -> None:
    found = allocator_settings({CUDA: ON}, "win32")
    assert not found.expandable_segments
    assert "torch has none on Windows" in str(found.note)
