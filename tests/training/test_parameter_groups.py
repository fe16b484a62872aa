"""Joined updates against each parameter alone: bits, files, memory and operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.memory.simulate import Trace
from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.training.optimizer import AdapterAdamW, OptimizerKind
from qlora_trainer.training.parameter_groups import GROUP_BYTES, StateKind, make_groups
from qlora_trainer.training.state import held_tensors, newest_good_state, restore, save_state

KINDS = get_args(OptimizerKind)
# Paged, quantized in whole blocks and not, in 32 bits for being small, of odd lengths, vectors.
SHAPES = [
    (16, 576), (1000, 101), (1536, 16), (70, 61), (16, 64), (7, 3), (192, 16), (1, 1), (31,), (64,),
] * 2  # fmt: skip
ALONE, FEW, MANY = 0, 60_000, GROUP_BYTES  # bytes of a group


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"p{i}": nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for i, shape in enumerate(SHAPES)
    }


def optimizer(dtype: torch.dtype, kind: Any, group_bytes: int) -> AdapterAdamW:
    held = parameters(dtype)
    return AdapterAdamW(held, kind=kind, weight_decay=0.1, group_bytes=group_bytes)


def run(held: AdapterAdamW, steps: range) -> AdapterAdamW:
    """Steps of which the third and the fourth do not reach every parameter."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(held.parameters.values()):
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if step in (2, 3) and i % 5 == step else gradient
        held.step(1e-3, torch.tensor(0.7))
    return held


def content(held: AdapterAdamW) -> dict[str, bytes]:
    """The files of a saved state."""
    return {
        name: save({key: tensor.contiguous() for key, tensor in tensors.items()})
        for name, tensors in held_tensors(held).items()
    }


@pytest.mark.parametrize("group_bytes", [FEW, MANY])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_updates_have_the_bits_of_lone_ones(
    dtype: torch.dtype, kind: Any, group_bytes: int
) -> None:
    alone = run(optimizer(dtype, kind, ALONE), range(6))
    grouped = run(optimizer(dtype, kind, group_bytes), range(6))
    assert content(grouped) == content(alone)
    assert grouped.steps == alone.steps
    assert set(alone.steps.values()) == {5, 6}
    assert grouped.optimizer_bytes() == alone.optimizer_bytes()
    assert all(p.grad is None for p in grouped.parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_updates_have_the_bits_of_adamw_as_it_is_written_down(dtype: torch.dtype) -> None:
    grouped = optimizer(dtype, "adamw", MANY)
    values = {name: p.detach().float() for name, p in grouped.parameters.items()}
    first, second = ({n: torch.zeros_like(v) for n, v in values.items()} for _ in range(2))
    for step in range(1, 4):
        for name, p in grouped.parameters.items():
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            gradient, decay = p.grad.float() * torch.tensor(0.7), 0.1 if p.ndim > 1 else 0.0
            first[name] = torch.lerp(first[name], gradient, 1 - 0.9)
            second[name] = torch.addcmul(second[name] * 0.999, gradient, gradient, value=1 - 0.999)
            values[name] = torch.addcdiv(
                values[name] * (1 - 1e-2 * decay),
                first[name],
                (second[name] / (1 - 0.999**step)).sqrt() + 1e-8,
                value=-1e-2 / (1 - 0.9**step),
            )
        grouped.step(1e-2, torch.tensor(0.7))
    tensors, _ = grouped.state()
    for name, p in grouped.parameters.items():
        held = p.detach()
        if dtype == torch.bfloat16:
            bits = (held.view(torch.int16).int() << 16) + tensors[f"{name}|remainder"]
            held = bits.view(torch.float32)
        assert torch.equal(held, values[name]), name
        assert torch.equal(tensors[f"{name}|first"], first[name]), name
        assert torch.equal(tensors[f"{name}|second"], second[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(ALONE, MANY), (MANY, FEW)])
def test_a_state_saved_with_other_groups_goes_on_with_the_same_bits(
    before: int, after: int, kind: Any, tmp_path: Path
) -> None:
    dtype = torch.bfloat16
    whole = run(optimizer(dtype, kind, ALONE), range(7))
    parted = run(optimizer(dtype, kind, before), range(4))
    folder = save_state(tmp_path, 4, optimizer=parted, trainer={}, keep_last=1)
    for name, file in content(parted).items():
        assert (folder / name).read_bytes() == file
    saved = newest_good_state(tmp_path, print)
    assert saved is not None
    again = optimizer(dtype, kind, after)
    restore(saved, again)
    assert content(run(again, range(4, 7))) == content(whole)


def members(p: dict[str, nn.Parameter], kind: StateKind, **settings: Any) -> list[list[str]]:
    groups = make_groups(p, kind, **{"weight_decay": 0.0, **settings})
    return [list(group.parameters) for group in groups]


def test_only_parameters_alike_are_gathered_and_no_more_than_a_group_holds() -> None:
    wide, narrow = torch.float32, torch.bfloat16
    held = {
        "a": nn.Parameter(torch.zeros(8, 8, dtype=narrow)),
        "b": nn.Parameter(torch.zeros(8, 8, dtype=wide)),
        "c": nn.Parameter(torch.zeros(64, dtype=narrow)),
        "d": nn.Parameter(torch.zeros(8, 8, dtype=narrow)),
        "e": nn.Parameter(torch.zeros(8, 8, dtype=narrow)),
        "f": nn.Parameter(torch.zeros(99, 99, dtype=narrow)),
        "strided": nn.Parameter(torch.zeros(8, 8, dtype=narrow).t()[:4]),
    }
    plain = StateKind(paged=False, eight_bit=False)
    assert members(held, plain) == [["a", "c", "d", "e", "f"], ["b"], ["strided"]]
    assert members(held, plain, weight_decay=0.1) == [
        ["a", "d", "e", "f"], ["b"], ["c"], ["strided"],
    ]  # fmt: skip
    assert members(held, plain, group_bytes=512) == [
        ["a", "c"], ["b"], ["d", "e"], ["f"], ["strided"],
    ]  # fmt: skip


def test_paged_states_and_blocks_shared_by_two_tensors_stay_out_of_groups() -> None:
    shapes = {"a": (16, 256), "odd": (16, 257), "b": (16, 512), "large": (16, 6400), "small": (9,)}
    held = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    assert members(held, StateKind(paged=True, eight_bit=True)) == [
        ["a", "b"], ["odd"], ["large"], ["small"],
    ]  # fmt: skip
    assert members(held, StateKind(paged=True, eight_bit=False)) == [
        ["a", "odd", "b", "small"], ["large"],
    ]  # fmt: skip


@contextmanager
def operators() -> Iterator[list[str]]:
    """Names of the operators called."""
    names: list[str] = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            views = func._schema.returns and all(r.alias_info for r in func._schema.returns)
            if func._schema.is_mutable or not views:
                names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listed():
        yield names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_tensors_take_the_operators_of_one(dtype: torch.dtype, kind: Any) -> None:
    counts = []
    for count in (2, 100):
        held = {f"{i}": nn.Parameter(torch.zeros(4, 64, dtype=dtype)) for i in range(count)}
        grouped = AdapterAdamW(held, kind=kind)
        for p in held.values():
            p.grad = torch.ones_like(p)
        with operators() as names:
            grouped.step(1e-3, torch.tensor(0.5))
        counts.append(len(names))
    assert counts[0] == counts[1] < 30


def most_bytes_of_a_step(group_bytes: int) -> int:
    """More than before it, with all gradients, for 50 weightless tensors of 4 KiB in fp32."""
    shape, device = (16, 64), torch.device("meta")
    held = {
        f"{i}": nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device))
        for i in range(50)
    }
    tracker = AllocationTracker("meta")
    with tracker:
        tracker.set_phase("before")
        grouped = AdapterAdamW(held, kind="adamw", group_bytes=group_bytes)
        for p in held.values():
            p.grad = torch.zeros_like(p)
        tracker.set_phase("step")
        grouped.step(1e-3)
        tracker.set_phase("after")
        rest = torch.zeros(1, device=device)
    tracker.close()
    peaks = Trace(tracker.log).live().by_phase
    assert peaks["after"] - rest.nbytes == peaks["before"] - 50 * 2 * 16 * 64
    return peaks["step"] - peaks["before"]


def test_a_step_needs_two_groups_values_and_no_gradient_outlives_its_group() -> None:
    # Joined gradients and values in fp32, less the gradients that went: half a group's bytes.
    assert most_bytes_of_a_step(40 * 1024) == 1.5 * 40 * 1024
    assert most_bytes_of_a_step(ALONE) == 1.5 * 4 * 1024
