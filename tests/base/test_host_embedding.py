"""Embeddings on the host: the same bits, a table that does not move, refusals that say why."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.host_embedding import HostEmbedding, compute_device
from qlora_trainer.base.load import BaseSpec, build_weightless_base, load_base
from qlora_trainer.base.settle import buffer_dtypes, settle
from qlora_trainer.base.transfers import Transfers
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from tests.base.conftest import tiny_config

CPU = torch.device("cpu")
PLAIN = BaseSpec("none")
HOST = replace(PLAIN, embeddings_on_host=True)
IDS = torch.arange(1, 21)[None]


def gradients(model: Any) -> dict[str, Tensor]:
    inject_adapter(model, AdapterSpec(rank=4, alpha=8), dtype=torch.float32)
    for number, parameter in enumerate(adapter_parameters(model).values()):
        torch.manual_seed(number)
        parameter.data.normal_(std=0.1)
    model(input_ids=IDS).logits.square().sum().backward()
    return {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 scales what it looked up
def test_gradients_keep_their_bits(save_tiny: Callable[..., Path], family: str) -> None:
    folder = save_tiny(family, AutoModelForCausalLM)
    host = replace(HOST, head_on_host=True)  # of gemma2 one table is both
    plain, found = (
        gradients(load_base(folder, AutoModelForCausalLM, spec, CPU)) for spec in (PLAIN, host)
    )
    assert plain.keys() == found.keys() != set()
    for name, value in plain.items():
        assert torch.equal(found[name], value), name


def test_nothing_is_copied_where_the_model_computes_on_the_host() -> None:
    ids, given, made = torch.tensor([[3, 1]]), [], []

    class Seen(torch.nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            given.append(input)
            made.append(super().forward(input))
            return made[-1]

    rows = HostEmbedding(Seen(7, 4), Transfers(CPU))(ids)
    assert given[0] is ids
    assert rows is made[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_keep_their_bits(save_tiny: Callable[..., Path], family: str) -> None:
    folder = save_tiny(family, AutoModelForCausalLM)
    plain = load_base(folder, AutoModelForCausalLM, PLAIN, CPU)
    moved = load_base(folder, AutoModelForCausalLM, HOST, CPU)
    assert isinstance(moved.get_input_embeddings(), HostEmbedding)
    assert torch.equal(plain(input_ids=IDS).logits, moved(input_ids=IDS).logits)
    roles = {item.name: item.role for item in audit_base(moved).tensors}
    assert roles["model.embed_tokens.base.weight"] == "embedding"


def test_the_table_follows_a_dtype_and_weightless_models_but_no_device() -> None:
    table = HostEmbedding(torch.nn.Embedding(7, 4), Transfers(CPU))
    assert table.to(torch.bfloat16).weight.dtype == torch.bfloat16
    # a move to a device is an `_apply` whose probe lands there; only `meta` is one without a GPU
    assert table.weight.device == table.transfers.device == CPU
    assert table.to("meta").weight.is_meta
    assert table.transfers.device.type == "meta"
    assert table.to(torch.float16).weight.dtype == torch.float16
    assert table(torch.zeros(1, 3, dtype=torch.int64, device="meta")).shape == (1, 3, 4)


def test_a_model_computes_where_all_else_is() -> None:
    table = HostEmbedding(torch.nn.Embedding(7, 4), Transfers(CPU))
    model = torch.nn.Sequential(table, torch.nn.Linear(4, 4, device="meta"))
    assert next(model.parameters()).device.type == "cpu"
    assert compute_device(model).type == "meta"


def test_a_model_says_where_it_computes(save_tiny: Callable[..., Path]) -> None:
    """`generate` moves ids, mask and positions to `model.device`, which must be no table's."""
    folder = save_tiny("gemma2", AutoModelForCausalLM)
    model = AutoModelForCausalLM.from_pretrained(folder)
    kind = type(model)
    host = replace(HOST, head_on_host=True)
    settle(model, host, torch.device("meta"), buffer_dtypes(model), None)
    table = model.get_input_embeddings()
    assert table.weight.device == CPU
    # Gemma's scale is multiplied on the host, with what the table gave there
    assert {buffer.device for buffer in table.buffers()} == {CPU}
    assert model.device.type == "meta"
    assert isinstance(model, kind)
    assert kind.__dict__.get("device") is None  # the class itself is as it was


def test_a_table_tied_to_the_head_is_refused(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama-tied", AutoModelForCausalLM)
    with pytest.raises(UserError, match=r"embed_tokens.weight and lm_head.weight.*nothing is gain"):
        load_base(folder, AutoModelForCausalLM, HOST, CPU)
    with pytest.raises(UserError, match="nothing is gained"):
        build_weightless_base(tiny_config("llama-tied"), AutoModelForCausalLM, HOST)
