"""Compiled modules compute what the plain ones do, for any length, in one set of kernels."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.measure import watched_step
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.compiled import compile_modules, require_compiler
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.techniques import Techniques, apply_techniques
from tests.training.tiny import (
    CPU,
    adapted_llama,
    batch,
    make_run,
    optimizer_for,
    tiny_llama,
    trained_values,
)

# torch's tracer looks at every input's `.grad`; it hides that from users, not from strict tests
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def gradients(model: torch.nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and what every adapter gets of it."""
    task = CausalLM.for_model(model)
    model.zero_grad()
    model.train()
    torch.manual_seed(0)  # of dropout
    loss = task.loss_sum(model, task.prepare(given))
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def packed(tokens: int) -> dict[str, Tensor]:
    row = batch(1, tokens, seed=1)
    ends = torch.arange(tokens // 3), torch.arange(tokens - tokens // 3)
    return {**row, "position_ids": torch.cat(ends)[None]}


def test_losses_and_gradients_are_the_plain_ones_with_recomputation_dropout_and_packing() -> None:
    models = []
    for compiled in (False, True):
        model = adapted_llama(dropout=0.1)
        model.set_attn_implementation("sdpa")
        assert use_packed_attention(model)
        plan_activations(model, decoder_layers(model), "recompute")
        if compiled:
            (said,) = compile_modules(model)
            assert "5 norms and 2 MLPs are compiled" in said
        models.append(model)
    after = []
    for given in (packed(24), packed(31), packed(40)):  # the first one's kernels serve all
        plain, found = (gradients(model, given) for model in models)
        assert plain.keys() == found.keys()
        for name, expected in plain.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
        after.append(graphs())
    assert after[0] > 0
    assert after[1:] == after[:1] * 2
    assert not counters["recompile_limit"]


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    ends = []
    for folder, stops in ((tmp_path / "calm", [4]), (tmp_path / "stopped", [2, 4])):
        folder.mkdir()
        for steps in stops:
            torch.compiler.reset()  # as in a fresh process
            model = adapted_llama()
            compile_modules(model)
            before = graphs()
            run = make_run(folder, model, total_steps=steps)
            run_training(run, TrainingPlan(total_steps=steps, learning_rate=1e-2,
                                           schedule="constant"))  # fmt: skip
            assert graphs() > before
        ends.append(trained_values(model))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_streamed_layers_of_nf4_are_compiled_as_well(tmp_path: Path) -> None:
    tiny_llama(torch.bfloat16, layers=3).save_pretrained(tmp_path)
    found = []
    for compiled in (False, True):
        spec = BaseSpec("nf4", compute_dtype=torch.float32, stream_layers=True)
        model = load_base(tmp_path, AutoModelForCausalLM, spec, CPU)
        inject_adapter(model, AdapterSpec(rank=4, alpha=8), dtype=torch.float32, seed=0)
        plan_activations(model, decoder_layers(model), "recompute")
        if compiled:
            compile_modules(model)
        found.append(gradients(model, batch(2, 12, seed=0)))
    assert graphs() > 0
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


def test_a_watched_step_goes_operator_by_operator_and_the_next_one_is_compiled() -> None:
    model = adapted_llama()
    compile_modules(model)
    with watched_step(model, optimizer_for(model), CPU, []):
        watched = gradients(model, batch(2, 12, seed=0))
    assert graphs() == 0
    found = gradients(model, batch(2, 12, seed=0))
    assert graphs() > 0
    torch.testing.assert_close(found["loss"], watched["loss"])


def test_where_our_functions_stand_nothing_is_left_and_it_is_said() -> None:
    model = adapted_llama()
    assert apply_techniques(model, Techniques(fused_mlp=True, tiled_norms=True)) == []
    (said,) = compile_modules(model)
    assert "nothing is compiled" in said
    gradients(model, batch(2, 12, seed=0))
    assert graphs() == 0


def test_no_compiler_is_told_with_the_setting_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(
        UserError, match=r"train.compile = true: .*'/nowhere/g\+\+' is not here.*CXX"
    ):
        require_compiler(CPU)


def test_a_switched_off_compiler_is_not_taken_for_one() -> None:
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(UserError, match=r"train.compile = true: .* switched off.*train.compile"),
    ):
        require_compiler(CPU)
    assert graphs() == 0


def test_a_compiler_that_works_is_found() -> None:
    require_compiler(CPU)
    assert graphs() == 1
