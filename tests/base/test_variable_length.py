"""The variable-length kernel: when it is taken, what it is told, and what a step with it holds.

The kernel itself runs on a card only (`tests/gpu/test_step.py`). Here a plain twin of its signature
computes, and the real one's operators are traced without weights.
"""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_trainer.base.packed_attention import example_lengths, use_packed_attention
from qlora_trainer.base.variable_length import attend_at_once, why_example_by_example

LENGTHS = [5, 1, 9, 2]
TOKENS = sum(LENGTHS)


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ({"capability": None}, "CUDA's"),
        ({"capability": (7, 5)}, r"capability 8.0, and this card has 7.5"),
        ({"dtype": torch.float32}, "16 bit, and the model computes in float32"),
        ({"head_size": 512}, "have 512"),
        ({"head_size": 60}, "by eights"),
        ({"value_size": 32}, "32 numbers a head and its keys 64"),
        ({"causal": False}, "looks ahead"),
        ({"dropout": 0.1}, "drops no weights"),
    ],
)
def test_the_kernel_is_not_taken_where_it_cannot_be_had(card: dict[str, Any], reason: str) -> None:
    known: dict[str, Any] = {"capability": (8, 6), "dtype": torch.bfloat16, "head_size": 64}
    assert why_example_by_example(**known) is None
    assert re.search(reason, why_example_by_example(**(known | card)) or "")


def twin(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _starts: Tensor, longest: int,
    _longest: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What FlashAttention documents of the same arguments, one query after the other."""
    back, ahead = window_size
    assert ahead == 0
    assert longest == int(starts.diff().max())
    assert starts.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = []
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for t in range(first, last):
            seen = slice(first if back < 0 else max(first, t - back), t + 1)
            scores = torch.einsum("hd,thd->ht", query[t], key[seen])
            scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
            rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), value[seen]))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_row_at_once_is_its_examples_one_by_one(
    window: int | None, key_heads: int, scale: float | None
) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(1, heads, TOKENS, 8, dtype=torch.float64, generator=generator)
        for heads in (4, key_heads, key_heads)
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads  # type: ignore[assignment]
    expected = []
    parts = zip(*(torch.split(t, LENGTHS, dim=2) for t in (query, key, value)), strict=True)
    for q, k, v in parts:
        place = torch.arange(q.shape[2])
        back = place[:, None] - place[None]
        mask = (back >= 0) & (back < (window or TOKENS))
        expected.append(sdpa_attention_forward(module, q, k, v, mask[None, None], scaling=scale)[0])
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    found = attend_at_once(query, key, value, lengths, window=window, scale=scale, kernel=twin)
    torch.testing.assert_close(found, torch.cat(expected, dim=1))


def test_the_kernel_takes_what_its_twin_takes() -> None:
    real, plain = (inspect.signature(function).parameters for function in (varlen_attn, twin))
    by_name = inspect.Parameter.KEYWORD_ONLY
    assert {name for name, given in plain.items() if given.kind is by_name} <= set(real)
    positional = [p for p in real.values() if p.kind is not by_name]
    assert [p.name for p in positional[3:]] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]


class Operators(TorchDispatchMode):
    """Counts the kernel's operators, and remembers the largest result of any."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "torch_attn":
            self.calls[func._opname] = self.calls.get(func._opname, 0) + 1
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_a_weightless_model_runs_it_once_a_layer_and_pass_on_cards_that_have_it(
    capability: tuple[int, int],
) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=50,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    assert use_packed_attention(model, capability=capability)
    tokens = 1024
    positions = torch.arange(64).repeat(tokens // 64)[None]
    ids = torch.ones(1, tokens, dtype=torch.int64, device="meta")
    with Operators() as seen:
        logits = model(
            input_ids=ids, position_ids=positions.to("meta"),
            attention_mask=example_lengths(positions), use_cache=False,
        ).logits  # fmt: skip
        logits.sum().backward()
    per_layer = {"_varlen_attn": 2, "_varlen_attn_backward": 2}
    assert seen.calls == (per_layer if capability >= (8, 0) else {})
    assert seen.elements < tokens * tokens
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None
