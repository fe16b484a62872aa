"""Claims of base/audit.py: every byte has a role, and each counts once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.base.audit import ROLES, audit_base
from qlora_trainer.base.load import BaseSpec, build_weightless_base, load_base
from tests.base.conftest import tiny_config

SaveTiny = Callable[..., Path]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "gemma2"])
def test_the_total_is_what_the_tensors_really_take(save_tiny: SaveTiny, family: str) -> None:
    folder = save_tiny(family, AutoModelForCausalLM)
    model = load_base(folder, AutoModelForCausalLM, BaseSpec("nf4"), torch.device("cpu"))
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*model.parameters(), *model.buffers()]
    }
    audit = audit_base(model)
    assert audit.total_bytes == sum(storages.values())
    assert sum(size for _, _, _, size in audit.rows()) == audit.total_bytes
    assert sum(audit.bytes_by_dtype.values()) == audit.total_bytes
    assert sum(count for _, _, count, _ in audit.rows()) == len(audit.tensors)


def test_roles_and_dtypes_of_a_llama() -> None:
    model = build_weightless_base(tiny_config("llama"), AutoModelForCausalLM, BaseSpec("nf4"))
    rows = {(role, dtype): size for role, dtype, _, size in audit_base(model).rows()}
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert rows[("linear weights (NF4)", "uint8")] == weights // 2
    assert rows[("quantization state", "uint8")] == weights // 64
    assert rows[("embedding", "bf16")] == rows[("head", "bf16")] == 131 * 64 * 2
    assert rows[("norm", "bf16")] == 5 * 64 * 2
    assert ("other", "bf16") not in rows
    assert {role for role, _ in rows} <= set(ROLES)


def test_large_tensors_outside_nf4_come_largest_first_with_their_reason() -> None:
    config = tiny_config("llama")
    config.vocab_size = 40_000
    spec = BaseSpec("nf4", keep_unquantized=("down_proj",))
    audit = audit_base(build_weightless_base(config, AutoModelForCausalLM, spec))
    assert [(t.name, t.kept_because) for t in audit.large_unquantized()] == [
        ("model.embed_tokens.weight", "embedding: a look-up, not a product"),
        ("lm_head.weight", "head: stays in the compute dtype"),
    ]
    small = audit.large_unquantized(at_least_bytes=1024)
    assert {t.name for t in small[2:]} == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert audit.largest_bytes == 40_000 * 64 * 2


def test_an_unquantized_base_gives_no_reasons() -> None:
    model = build_weightless_base(tiny_config("gpt2"), AutoModelForCausalLM, BaseSpec("none"))
    audit = audit_base(model)
    assert audit.large_unquantized(at_least_bytes=0) == []
    assert audit.bytes_by_role["linear weights"] > audit.bytes_by_role["bias"]


def test_the_audit_goes_to_json_and_back() -> None:
    model = build_weightless_base(tiny_config("llama"), AutoModelForCausalLM, BaseSpec("nf4"))
    audit = audit_base(model)
    data = json.loads(json.dumps(audit.to_json()))
    assert data["total_bytes"] == audit.total_bytes
    assert sum(row["bytes"] for row in data["rows"]) == audit.total_bytes
