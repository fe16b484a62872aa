"""Claims of base/dtype.py: what to compute in follows the hardware, and some families refuse."""

import pytest
import torch

from qlora_trainer.base.dtype import (
    choose_compute_dtype,
    compute_dtype_for,
    cpu_multiplies_bf16,
    dtype_name,
)
from qlora_trainer.errors import UserError


@pytest.mark.parametrize(
    ("device_type", "capability", "expected"),
    [
        ("cpu", None, torch.bfloat16),
        ("xpu", None, torch.bfloat16),
        ("cuda", (7, 0), torch.float16),
        ("cuda", (7, 5), torch.float16),  # a T4, where torch says bf16 is supported
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (8, 9), torch.bfloat16),
        ("cuda", (12, 0), torch.bfloat16),
    ],
)
def test_auto_takes_what_the_hardware_multiplies(
    device_type: str, capability: tuple[int, int] | None, expected: torch.dtype
) -> None:
    assert compute_dtype_for("auto", device_type, "llama", capability, cpu_bf16=True) == expected


def test_a_cpu_without_bf16_products_computes_in_fp32_unless_told_otherwise() -> None:
    def chosen(requested: str, device_type: str = "cpu") -> torch.dtype:
        return compute_dtype_for(requested, device_type, "llama", None, cpu_bf16=False)

    assert chosen("auto") == torch.float32
    assert chosen("bf16") == torch.bfloat16
    assert chosen("fp16") == torch.float16
    assert chosen("auto", "xpu") == torch.bfloat16
    assert compute_dtype_for("auto", "cuda", "llama", (7, 5), cpu_bf16=False) == torch.float16


def test_this_machines_cpu_is_asked() -> None:
    expected = torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
    assert choose_compute_dtype("auto", torch.device("cpu"), "llama") == expected
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not cpu_multiplies_bf16()


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_what_is_asked_for_is_given_on_a_cpu(name: str) -> None:
    assert dtype_name(choose_compute_dtype(name, torch.device("cpu"), "llama")) == name


def test_emulated_bf16_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"compute capability 7\.5.*compute_dtype = fp16"):
        compute_dtype_for("bf16", "cuda", "llama", (7, 5), cpu_bf16=True)


@pytest.mark.parametrize(
    "family", ["t5", "mt5", "umt5", "gemma", "gemma2", "gemma3_text", "t5gemma", "paligemma"]
)
def test_families_that_overflow_are_refused_in_fp16_by_name(family: str) -> None:
    with pytest.raises(UserError, match=rf"{family} models overflow in fp16.*= bf16"):
        compute_dtype_for("fp16", "cpu", family, None, cpu_bf16=True)
    with pytest.raises(UserError, match=rf"auto \(fp16 on compute capability 7\.5\).*{family}"):
        compute_dtype_for("auto", "cuda", family, (7, 5), cpu_bf16=True)
    assert compute_dtype_for("auto", "cuda", family, (8, 6), cpu_bf16=True) == torch.bfloat16
    assert compute_dtype_for("fp32", "cuda", family, (7, 5), cpu_bf16=True) == torch.float32


def test_other_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'float16': must be one of auto, bf16, fp16, fp32"):
        compute_dtype_for("float16", "cpu", "llama", None, cpu_bf16=True)
