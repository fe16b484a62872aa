from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from qlora_trainer.errors import UserError
from qlora_trainer.training.adamw_math import join_bf16, split_bf16
from qlora_trainer.training.optimizer import AdapterAdamW, OptimizerKind

KINDS = get_args(OptimizerKind)
SHAPES = {"big": (400, 300), "middle": (80, 70), "small": (5, 3), "vector": (31,)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def give_gradients(held: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in held.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("kind", ["paged_adamw_32bit", "adamw"])
def test_thirty_steps_equal_torchs_adamw(kind: Any) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = AdapterAdamW(ours, kind=kind, betas=(0.8, 0.95), eps=1e-6)
    reference = torch.optim.AdamW(
        theirs.values(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0
    )
    for step in range(30):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(1e-2)
        reference.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_decoupled_and_spares_vectors(kind: Any) -> None:
    held = parameters()
    before = {name: p.detach().clone() for name, p in held.items()}
    for p in held.values():
        p.grad = torch.zeros_like(p)
    AdapterAdamW(held, kind=kind, weight_decay=0.5).step(0.1)
    for name, p in held.items():
        share = 1.0 if name == "vector" else 0.95
        torch.testing.assert_close(p.detach(), before[name] * share, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["paged_adamw_8bit", "adamw_8bit"])
def test_eight_bit_states_stay_close_to_exact_ones(kind: Any) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = AdapterAdamW(ours, kind=kind), AdapterAdamW(theirs, kind="adamw")
    for step in range(20):
        give_gradients(ours, step % 3)
        give_gradients(theirs, step % 3)
        optimizer.step(1e-2)
        reference.step(1e-2)
    moved = {name: (theirs[name] - parameters()[name]).norm() for name in ours}
    for name in ours:
        assert (ours[name] - theirs[name]).norm() < 0.05 * moved[name], name
    kinds = {name: tensor.dtype for name, tensor, _ in optimizer.state_tensors()}
    assert kinds["big|first"] == torch.uint8
    assert kinds["small|first"] == torch.float32  # too small to gain from 8 bits


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_parameters_follow_fp32_ones_through_updates_bf16_would_lose(kind: Any) -> None:
    exact = parameters(torch.bfloat16)
    exact = {name: nn.Parameter(p.detach().float()) for name, p in exact.items()}
    ours = parameters(torch.bfloat16)
    a, b = AdapterAdamW(exact, kind=kind), AdapterAdamW(ours, kind=kind)
    for step in range(50):
        give_gradients(ours, step)
        for name, p in exact.items():
            gradient = ours[name].grad
            assert gradient is not None
            p.grad = gradient.float()
        a.step(1e-4)
        b.step(1e-4)
    tensors, _ = b.state()
    for name, p in ours.items():
        value = join_bf16(p.detach().float(), tensors[f"{name}|remainder"])
        assert torch.equal(value, exact[name]), name  # bit for bit
        assert torch.equal(
            p.detach().view(torch.int16),
            _round_half_up(exact[name].detach()).view(torch.int16),
        )


def _round_half_up(value: torch.Tensor) -> torch.Tensor:
    bits = (value.view(torch.int32) + 0x8000) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_bf16_value_and_its_remainder_are_the_fp32_value(number: float) -> None:
    value = torch.tensor([number], dtype=torch.float32)
    low = torch.empty(1, dtype=torch.int16)
    high = split_bf16(value.clone(), low).to(torch.bfloat16)
    assert torch.equal(join_bf16(high.float(), low).view(torch.int32), value.view(torch.int32))
    if abs(number) < 3e38 and abs(number) > 1e-37:
        assert abs(high.float() - value) <= value.abs() * 2**-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_through_safetensors_and_back_exactly(kind: Any, dtype: torch.dtype) -> None:
    def run(steps: range, held: dict[str, nn.Parameter], optimizer: AdapterAdamW) -> None:
        for step in steps:
            give_gradients(held, step)
            optimizer.step(1e-3, torch.tensor(0.7))

    whole = parameters(dtype)
    run(range(6), whole, AdapterAdamW(whole, kind=kind))
    parted = parameters(dtype)
    first = AdapterAdamW(parted, kind=kind)
    run(range(3), parted, first)
    tensors, values = first.state()
    file = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    fresh = {name: nn.Parameter(p.detach().clone()) for name, p in parted.items()}
    second = AdapterAdamW(fresh, kind=kind)
    second.load(load(file), values)
    run(range(3, 6), fresh, second)
    assert all(torch.equal(whole[name], fresh[name]) for name in whole)


def test_every_fault_of_a_foreign_state_is_listed() -> None:
    saved = AdapterAdamW(parameters(), kind="adamw")
    tensors, values = saved.state()
    other = parameters()
    other["extra"] = nn.Parameter(torch.zeros(3, 3))
    other["small"] = nn.Parameter(torch.zeros(4, 4))
    del other["vector"]
    with pytest.raises(UserError) as fault:
        AdapterAdamW(other, kind="adamw_8bit").load(tensors, values)
    message = str(fault.value)
    for expected in ("saved with adamw, now adamw_8bit", "extra|first", "vector|first", "(5, 3)"):
        assert expected in message


def test_pageable_bytes_are_those_bitsandbytes_would_page() -> None:
    held = parameters()
    thirty_two = AdapterAdamW(held, kind="paged_adamw_32bit").optimizer_bytes()
    # Only "big" has 100,000 elements or more: two fp32 states of it.
    assert thirty_two.pageable_bytes == 2 * 4 * 400 * 300
    assert thirty_two.total_bytes == thirty_two.pageable_bytes + thirty_two.on_card_bytes
    assert AdapterAdamW(held, kind="adamw").optimizer_bytes().pageable_bytes == 0
    eight = AdapterAdamW(held, kind="paged_adamw_8bit").optimizer_bytes()
    assert eight.pageable_bytes == 2 * 400 * 300
    sixteen = AdapterAdamW(parameters(torch.bfloat16)).optimizer_bytes()
    assert sixteen.remainder_bytes == 2 * sum(p.numel() for p in held.values())


def test_the_paging_threshold_is_still_that_of_bitsandbytes() -> None:
    import inspect

    from bitsandbytes.optim.optimizer import Optimizer8bit

    source = inspect.getsource(Optimizer8bit.get_state_buffer)
    assert "if not self.is_paged or p.numel() < 1e5:" in source


@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_says_once_that_nothing_is_paged(kind: Any) -> None:
    notes = AdapterAdamW(parameters(), kind=kind).notes
    assert len(notes) == (1 if kind.startswith("paged") else 0)
    assert all("nothing to page" in note for note in notes)


def test_a_parameter_without_gradient_keeps_value_and_count() -> None:
    held = parameters()
    optimizer = AdapterAdamW(held)
    give_gradients(held, 0)
    held["small"].grad = None
    before = held["small"].detach().clone()
    optimizer.step(1e-2)
    assert torch.equal(held["small"], before)
    assert optimizer.steps == {"big": 1, "middle": 1, "small": 0, "vector": 1}


def test_fp16_parameters_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"small is torch\.float16"):
        AdapterAdamW(parameters(torch.float16))
