"""What a head gives, strip by strip of its vocabulary, beside torch's own product."""

import pytest
import torch
from torch import nn

from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.base.head_product import STRIP_ROWS, head_product

VOCABULARY = 2 * STRIP_ROWS + 77  # the last strip is a short one


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_torchs_product_written_where_it_was_asked_for(
    dtype: torch.dtype, with_bias: bool
) -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(VOCABULARY, 48).to(dtype), torch.randn(5, 48).to(dtype)
    bias = torch.randn(VOCABULARY).to(dtype) if with_bias else None
    place = torch.full((7, VOCABULARY), float("nan"), dtype=dtype)
    given = head_product(place[:5], x, weight, bias)
    assert given.data_ptr() == place.data_ptr()
    torch.testing.assert_close(given, nn.functional.linear(x, weight, bias))
    assert place[5:].isnan().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_head_writes_there_too(bits: int) -> None:
    torch.manual_seed(4)
    head = QuantizedHead.quantize(
        nn.Linear(64, VOCABULARY), bits=bits, block_size=64, dtype=torch.float32
    )
    x, place = torch.randn(5, 64), torch.empty(5, VOCABULARY)
    given = head_product(place, x, head, head.bias)
    assert given.data_ptr() == place.data_ptr()
    assert torch.equal(given, head.product(x, head.bias))


def test_a_weightless_one_is_multiplied_whole() -> None:
    with torch.device("meta"):
        place, x = torch.empty(5, VOCABULARY), torch.empty(5, 48)
        weight = torch.empty(VOCABULARY, 48)
    assert head_product(place, x, weight, None) is place
