"""Attention in tiles gives what torch's own gives, forward and backward, and leaves it the rest."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_trainer.base import attention_tiles
from qlora_trainer.base import tiled_attention as module
from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.base.tiled_attention import (
    NAME,
    attend_in_tiles,
    chooses_tiles,
    keep_probabilities,
    leave_tiled_attention,
    takes_tiles,
    tiled_attention,
    use_tiled_attention,
)
from tests.base.conftest import grouped_llama

SHAPES = [
    (1, 4, 2, 200, 32),  # several tiles, the last one short; two query heads a key head
    (3, 6, 3, 150, 8),  # more heads than in bf16 are few
    (2, 3, 3, 64, 16),  # exactly one tile
    (2, 6, 1, 65, 8),  # one token more
    (1, 2, 2, 7, 16),  # shorter than a tile
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    rows, heads, groups, tokens, size = shape
    generator = torch.Generator().manual_seed(5)
    made = []
    for count in (heads, groups, groups):
        x = torch.randn(rows, tokens, count, size, generator=generator, dtype=torch.float64)
        made.append((2 * x).to(dtype).transpose(1, 2).requires_grad_())  # as models lay them
    return made


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    ).transpose(1, 2)


def outcomes(attend, tensors: list[Tensor]) -> list[Tensor]:
    out = attend(*tensors)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, slope)]


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float64_outputs_and_gradients_are_torchs(shape):
    tensors = inputs(shape, torch.float64)
    pairs = zip(outcomes(tiled_attention, tensors), outcomes(torch_attention, tensors), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keeps", [False, True])
def test_gradients_are_those_of_the_function(monkeypatch, keeps):
    monkeypatch.setattr(attention_tiles, "TILE_TOKENS", 3)
    tensors = inputs((1, 4, 2, 7, 4), torch.float64)
    assert torch.autograd.gradcheck(partial(tiled_attention, keeps=keeps), tensors)


def saved_bytes(compute) -> tuple[Tensor, int]:
    found: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        out = compute()
    return out, sum(found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_kept_probabilities_are_those_computed_again(shape, dtype):
    tensors = inputs(shape, dtype)
    pairs = zip(
        outcomes(tiled_attention, tensors),
        outcomes(partial(tiled_attention, keeps=True), tensors),
        strict=True,
    )
    assert all(torch.equal(again, kept) for again, kept in pairs)
    _, without = saved_bytes(lambda: tiled_attention(*tensors))
    _, held = saved_bytes(lambda: tiled_attention(*tensors, keeps=True))
    rows, heads, _, tokens, _ = shape
    size = 128 if dtype == torch.bfloat16 and rows * heads <= 16 else 64
    ends = [min(first + size, tokens) for first in range(0, tokens, size)]
    counted = sum((end - size * index) * end for index, end in enumerate(ends))
    assert held - without == rows * heads * counted * tensors[0].element_size()
    with torch.no_grad():
        _, nothing = saved_bytes(lambda: tiled_attention(*tensors, keeps=True))
    assert nothing == 0


@pytest.mark.parametrize(
    ("told", "most", "keeps"),
    [
        ({}, 2**25, False),
        ({"kept": True}, 0, True),
        ({"kept": True, "recomputed": True}, 0, False),
        ({"recomputed": True}, 2 * 2 * (128 * 128 + 1 * 129), True),  # two tiles
        ({"recomputed": True}, 2 * 2 * (128 * 128 + 1 * 129) - 1, False),
        ({"recomputed": False}, 2**25, False),
    ],
)
def test_an_attention_keeps_probabilities_where_it_was_told_to(monkeypatch, told, most, keeps):
    monkeypatch.setattr(module, "KEPT_BYTES", most)
    layer = torch.nn.Module()
    layer.is_causal = True
    keep_probabilities(torch.nn.Sequential(layer), **told)
    tensors = inputs((1, 2, 1, 129, 8), torch.bfloat16)
    _, expected = saved_bytes(lambda: tiled_attention(*tensors, keeps=keeps))
    _, held = saved_bytes(lambda: attend_in_tiles(layer, *tensors, None)[0])
    assert held == expected


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_errs_about_as_little_as_the_kernel_it_replaces(shape, dtype):
    tensors = inputs(shape, dtype)
    exact = outcomes(torch_attention, [t.detach().double().requires_grad_() for t in tensors])
    found = zip(
        outcomes(tiled_attention, tensors), outcomes(torch_attention, tensors), exact, strict=True
    )
    for ours, theirs, truth in found:
        assert ours.dtype == theirs.dtype == dtype
        assert distance(ours, truth) <= 1.35 * distance(theirs, truth)


def test_only_a_tile_of_scores_is_alive(monkeypatch):
    monkeypatch.setattr(attention_tiles, "TILE_ELEMENTS", 4 * 16 * 512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    tensors = inputs((1, 4, 2, 512, 8), torch.bfloat16)
    with Watch():
        outcomes(tiled_attention, tensors)
    assert 4 * 16 * 512 * 4 <= largest < 4 * 512 * 512


def test_what_is_not_plain_and_causal_is_left_to_torch():
    layer = torch.nn.Module()
    query, key, value = inputs((1, 2, 2, 5, 4), torch.bfloat16)

    def taken(*tensors: Tensor, mask: Tensor | None = None, **given: object) -> bool:
        return takes_tiles(layer, *(tensors or (query, key, value)), mask, **given)

    assert taken(position_bias=None, sliding_window=3)  # a window with no mask hides nothing
    assert not taken(mask=torch.ones(1, 1, 5, 5))
    assert not taken(dropout=0.1)
    assert not taken(is_causal=False)
    assert not taken(softcap=30.0)
    assert not taken(query[:, :, -1:], key, value)  # one token, a cache
    assert not taken(query.half(), key.half(), value.half())


@pytest.mark.parametrize(("tokens", "wins"), [(255, 0), (256, 1), (1023, 1), (1024, 0)])
def test_in_fp32_tiles_take_the_lengths_they_win(tokens, wins):
    one = torch.zeros(1, 1, tokens, 8)
    assert takes_tiles(torch.nn.Module(), one, one, one, None) == bool(wins)
    assert takes_tiles(torch.nn.Module(), *[one.bfloat16()] * 3, None)


def test_a_bias_of_positions_is_not_forgotten():
    layer = torch.nn.Module()
    query, key, value = inputs((1, 2, 2, 5, 4), torch.bfloat16)
    bias = torch.linspace(-3, 3, 25).view(1, 1, 5, 5).to(torch.bfloat16)
    ours, _ = attend_in_tiles(layer, query, key, value, None, position_bias=bias)
    theirs, _ = sdpa_attention_forward(layer, query, key, value, None, position_bias=bias)
    assert torch.equal(ours, theirs)
    plain, _ = attend_in_tiles(layer, query, key, value, None)
    assert not torch.equal(ours, plain)


@pytest.fixture(scope="module")
def model():
    return grouped_llama(torch.bfloat16)


@pytest.mark.parametrize("case", ["whole", "padded", "packed"])
def test_a_model_computes_the_same(model, case):
    tokens = torch.arange(140).view(1, 140) % 97
    given = {"input_ids": tokens}
    if case == "padded":
        given["attention_mask"] = (torch.arange(140) >= 20)[None].long()
    if case == "packed":
        given["position_ids"] = torch.cat((torch.arange(90), torch.arange(50)))[None]
    plain, tiled = copy.deepcopy(model), copy.deepcopy(model)
    assert use_tiled_attention(tiled)
    assert tiled.config._attn_implementation == NAME
    found = []
    for tried in (plain, tiled):
        logits = tried(**given).logits[:, 20:].float()
        logits.square().mean().backward()
        found.append((logits, tried.model.layers[0].self_attn.k_proj.weight.grad.float()))
    for ours, theirs in zip(*found, strict=True):
        assert distance(ours, theirs.double()) < 0.02


def test_it_answers_as_before(model):
    tiled = copy.deepcopy(model)
    use_tiled_attention(tiled)
    asked = {"input_ids": torch.arange(70)[None] % 97, "max_new_tokens": 5, "do_sample": False}
    assert tiled.generate(**asked).tolist() == model.generate(**asked).tolist()


def test_packed_examples_may_be_attended_to_in_tiles(model):
    tiled = copy.deepcopy(model)
    assert use_tiled_attention(tiled)
    assert use_packed_attention(tiled)
    assert tiled.config._attn_implementation == f"packed_{NAME}"


def test_a_model_may_leave_it_again(model):
    tiled = copy.deepcopy(model)
    use_tiled_attention(tiled)
    leave_tiled_attention(tiled)
    assert tiled.config._attn_implementation == "sdpa"


def test_another_dtype_or_attention_stays(model):
    assert chooses_tiles(None, torch.bfloat16)
    assert chooses_tiles(None, torch.float32)
    assert not chooses_tiles(None, torch.float16)
    assert not chooses_tiles("sdpa", torch.bfloat16)
    chosen = copy.deepcopy(model)
    chosen.set_attn_implementation("eager")
    assert not use_tiled_attention(chosen)
    assert chosen.config._attn_implementation == "eager"
