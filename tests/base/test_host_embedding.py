"""Embeddings on the host: the same bits, a table that does not move, refusals that say why."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.host_embedding import HostEmbedding, compute_device
from qlora_trainer.base.load import BaseSpec, build_weightless_base, load_base
from qlora_trainer.errors import UserError
from tests.base.conftest import tiny_config

CPU = torch.device("cpu")
PLAIN = BaseSpec("none")
HOST = replace(PLAIN, embeddings_on_host=True)
IDS = torch.arange(1, 21)[None]


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
    table = HostEmbedding(torch.nn.Embedding(7, 4))
    assert table.to(torch.bfloat16).weight.dtype == torch.bfloat16
    # a move to a device is an `_apply` whose probe lands there; only `meta` is one without a GPU
    assert table.weight.device.type == "cpu"
    assert table.to("meta").weight.is_meta
    assert table(torch.zeros(1, 3, dtype=torch.int64, device="meta")).shape == (1, 3, 4)


def test_a_model_computes_where_all_else_is() -> None:
    table = HostEmbedding(torch.nn.Embedding(7, 4))
    model = torch.nn.Sequential(table, torch.nn.Linear(4, 4, device="meta"))
    assert next(model.parameters()).device.type == "cpu"
    assert compute_device(model).type == "meta"


def test_a_table_tied_to_the_head_is_refused(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama-tied", AutoModelForCausalLM)
    with pytest.raises(UserError, match=r"embed_tokens.weight and lm_head.weight.*nothing is gain"):
        load_base(folder, AutoModelForCausalLM, HOST, CPU)
    with pytest.raises(UserError, match="nothing is gained"):
        build_weightless_base(tiny_config("llama-tied"), AutoModelForCausalLM, HOST)
