"""A head on the host: the same bits, on the device only while asked for, and honest refusals."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.host_embedding import compute_device
from qlora_trainer.base.host_head import HostHead, head_at_hand
from qlora_trainer.base.load import BaseSpec, build_weightless_base, load_base
from qlora_trainer.base.transfers import Copy, Transfers
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.generate import generate_tokens
from qlora_trainer.tasks.loss_path import LossPath
from tests.base.conftest import tiny_config

CPU = torch.device("cpu")
PLAIN = BaseSpec("nf4")
HOST = replace(PLAIN, head_on_host=True)
BOTH = replace(HOST, embeddings_on_host=True)
IDS = torch.arange(1, 21)[None]


class Counted(Transfers):
    """Transfers that know how often the head came."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.count = 0

    def to_device(self, *asked: Any) -> tuple[Tensor, Copy]:
        self.count += 1
        return super().to_device(*asked)


def loss_and_gradients(model: Any, *, chunked: bool) -> tuple[Tensor, dict[str, Tensor]]:
    inject_adapter(model, AdapterSpec(rank=4, alpha=8), dtype=torch.float32)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            torch.manual_seed(len(name))
            parameter.data.normal_(std=0.1)
    task = CausalLM.for_model(model, chunk_tokens=4)
    assert task.loss_path.chunked
    if not chunked:
        task = replace(task, loss_path=LossPath(False, "asked"))
    loss = task.loss_sum(model, task.prepare({"input_ids": IDS, "labels": IDS}))
    loss.backward()
    held_out = task.evaluate(model, task.prepare({"input_ids": IDS, "labels": IDS}))
    found = {name: p.grad for name, p in adapter_parameters(model).items()}
    return loss, {**found, **held_out}


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    ("family", "spec"), [("llama", HOST), ("llama", BOTH), ("gemma2", BOTH), ("llama-tied", BOTH)]
)
def test_losses_and_gradients_keep_their_bits(
    save_tiny: Callable[..., Path], family: str, spec: BaseSpec, chunked: bool
) -> None:
    folder = save_tiny(family, AutoModelForCausalLM)
    loss, expected = loss_and_gradients(
        load_base(folder, AutoModelForCausalLM, PLAIN, CPU), chunked=chunked
    )
    model = load_base(folder, AutoModelForCausalLM, spec, CPU)
    assert isinstance(model.get_output_embeddings(), HostHead)
    ours, found = loss_and_gradients(model, chunked=chunked)
    assert torch.equal(ours, loss)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_weight_is_on_the_device_while_somebody_holds_it_and_comes_once() -> None:
    linear, transfers = torch.nn.Linear(600, 1300), Counted()  # 3 MiB: two pieces and a rest
    head = HostHead(linear.weight, linear.bias, transfers)
    assert head.host_bytes == 3 * 2**20
    x = torch.randn(2, 600)
    assert torch.equal(head(x), linear(x))
    assert transfers.count == 1
    held = head.dense()
    assert torch.equal(held, linear.weight)
    assert head.dense() is held
    head(x)
    assert transfers.count == 2
    del held
    gc.collect()
    assert torch.equal(head(x), linear(x))
    assert transfers.count == 3
    assert head.weight.isnan().all()  # what stands in its place cannot pass for it
    assert head.weight.untyped_storage().nbytes() == 4


def test_it_follows_a_dtype_and_weightless_models() -> None:
    linear = torch.nn.Linear(5, 7)
    head = HostHead(linear.weight, linear.bias, Transfers(CPU)).to(torch.bfloat16)
    assert head.weight.dtype == head.bias.dtype == torch.bfloat16
    assert torch.equal(head.dense(), linear.weight.bfloat16())
    empty = head.to("meta")
    assert empty(torch.zeros(2, 5, dtype=torch.bfloat16, device="meta")).shape == (2, 7)


def test_answers_are_the_same_and_the_head_comes_once_for_all_tokens(
    save_tiny: Callable[..., Path],
) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    asked = {"pad_token_id": 0, "stop_token_ids": (), "max_new_tokens": 5}
    plain = load_base(folder, AutoModelForCausalLM, PLAIN, CPU)
    model = load_base(folder, AutoModelForCausalLM, HOST, CPU)
    model.lm_head.transfers = transfers = Counted()
    prompts = [[5, 6, 7], [8, 9]]
    assert generate_tokens(model, prompts, **asked) == generate_tokens(plain, prompts, **asked)
    assert transfers.count == 1
    with head_at_hand(plain):  # nothing to bring
        pass


def test_the_audit_counts_it_and_the_model_computes_where_it_did(
    save_tiny: Callable[..., Path],
) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    plain, moved = (
        audit_base(load_base(folder, AutoModelForCausalLM, spec, CPU)) for spec in (PLAIN, HOST)
    )
    assert {item.name: item for item in moved.tensors} == {t.name: t for t in plain.tensors}
    model = build_weightless_base(tiny_config("llama"), AutoModelForCausalLM, BOTH)
    assert model.lm_head.weight.shape == (131, 64)
    assert compute_device(model).type == "meta"


@pytest.mark.parametrize("spec", [HOST, replace(PLAIN, embeddings_on_host=True)])
def test_one_of_two_that_are_tied_is_refused(
    save_tiny: Callable[..., Path], spec: BaseSpec
) -> None:
    folder = save_tiny("llama-tied", AutoModelForCausalLM)
    other = r"embed_tokens.weight and lm_head.weight.*(embeddings|head)_on_host: true beside it"
    with pytest.raises(UserError, match=other):
        load_base(folder, AutoModelForCausalLM, spec, CPU)
    with pytest.raises(UserError, match=other):
        build_weightless_base(tiny_config("llama-tied"), AutoModelForCausalLM, spec)


def test_a_model_without_a_plain_head_is_refused() -> None:
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(UserError, match=r"head_on_host = true.*no output head"):
        build_weightless_base(tiny_config("bert"), AutoModelForSequenceClassification, HOST)


def test_it_cannot_be_trained() -> None:
    for spec, said in (
        (AdapterSpec(rank=4, alpha=8, modules_to_save=("lm_head",)), r"head_on_host: false"),
        (AdapterSpec(rank=4, alpha=8, target_modules=("lm_head",)), "lm_head is a HostHead"),
    ):
        model = build_weightless_base(tiny_config("llama"), AutoModelForCausalLM, HOST)
        with pytest.raises(UserError, match=said):
            inject_adapter(model, spec, dtype=torch.bfloat16)
