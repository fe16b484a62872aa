"""Copies to host memory and back: whole, in pieces that waste nothing, on the right device."""

import weakref
from typing import Any, cast

import pytest
import torch

from qlora_trainer.base.transfers import Copy, Transfers, piece_sizes, pinned_bytes
from qlora_trainer.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2**20, 2**20 + 1, 40_000 * 8192, 131_072 * 8192])
def test_pieces_are_powers_of_two_and_waste_less_than_a_mebibyte(size: int) -> None:
    pieces = piece_sizes(size)
    assert all(piece & (piece - 1) == 0 and piece >= 2**20 for piece in pieces)
    assert 0 <= sum(pieces) - size < 2**20


def test_pieces_carry_a_tensor_over_and_back() -> None:
    tensor = torch.randn(3, 300_001)
    transfers = Transfers(CPU)
    pieces, out = transfers.to_host(tensor)
    out.wait()
    assert len(pieces) > 1
    again, back = transfers.to_device(pieces, tensor.shape, tensor.dtype)
    back.wait()
    assert torch.equal(again, tensor)


def test_both_ends_of_a_copy_on_the_device_live_until_it_is_waited_for() -> None:
    tensor, transfers = torch.randn(7), Transfers(CPU)
    source = weakref.ref(tensor.untyped_storage())
    pieces, out = transfers.to_host(tensor)
    del tensor
    assert source() is not None
    out.wait()
    assert source() is None
    again, back = transfers.to_device(pieces, torch.Size([7]), torch.float32)
    target = weakref.ref(again.untyped_storage())
    del again
    assert target() is not None
    back.wait()
    assert target() is None


def test_the_stream_of_the_models_own_device_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device = device

        def wait_event(self, event: Any) -> None:
            waited.append((self.device, event))

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    second, event = torch.device("cuda:1"), cast("torch.cuda.Event", object())
    copy = Copy(torch.ones(2), event, second)
    copy.wait()
    copy.wait()  # only once
    assert waited == [(second, event)]
    del copy
    broken_off = Copy(torch.ones(2), event, second)
    del broken_off
    assert waited == [(second, event)] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a machine without a card refuses it")
def test_pinned_memory_that_is_refused_is_told_with_ways_out() -> None:
    with pytest.raises(UserError, match=r"1.0 MiB of pinned host memory.*stream_layers: false"):
        pinned_bytes(2**20)
