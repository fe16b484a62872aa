"""Layers in parts over two real gloo processes: a whole base's bits, half of its bytes each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.load import build_weightless_base, load_base
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from tests.base.sharing import CPU, IDS, adapted, gradients, spec
from tests.together import run_together
from tests.training.tiny import make_run, trained_values

pytestmark = pytest.mark.slow
LAYERS = 4
# tests.training.tiny's batches have tokens below 211
CONFIG = LlamaConfig(
    vocab_size=211, hidden_size=128, intermediate_size=352, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
Seen = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def seen(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    folder = tmp_path_factory.mktemp("seen")
    ended = run_together([["tests.base.sharing", str(source), str(folder)]] * 2, folder)
    assert [code for code, _ in ended] == [0, 0], "\n".join(said for _, said in ended)
    return [
        (
            json.loads((folder / f"{rank}.json").read_text()),
            load_file(folder / f"{rank}.safetensors"),
        )
        for rank in range(2)
    ]


@pytest.fixture
def whole(source: Path) -> Any:
    return load_base(source, AutoModelForCausalLM, spec(1), CPU)


def test_each_process_holds_half_of_every_layer(seen: list[Seen], whole: Any) -> None:
    tensors = audit_base(whole).tensors
    layers = [item.size_bytes for item in tensors if ".layers." in item.name]
    others = sum(item.size_bytes for item in tensors) - sum(layers)
    aligned = sum(-(-size // 512) * 512 for size in layers)  # each begins at such a byte
    for facts, _ in seen:
        held = facts["base_bytes"] - others
        in_their_places = held - aligned // 2  # one number each
        assert 0 < in_their_places <= 4 * len(layers)
        assert held < 0.55 * sum(layers)
        assert len(facts["present"]) == 2
        assert facts["away_is_no_number"]


def test_gradients_have_the_bits_of_a_whole_base_however_many_passes_each_makes(
    seen: list[Seen], whole: Any
) -> None:
    adapted(whole)
    for rank, (_, tensors) in enumerate(seen):
        expected = gradients(whole, passes=1 + 2 * rank)
        assert len(expected) == LAYERS * 7 * 2
        assert all(torch.equal(tensors[f"gradient.{n}"], t) for n, t in expected.items())


def test_one_process_evaluates_and_generates_while_the_other_waits(
    seen: list[Seen], whole: Any
) -> None:
    adapted(whole).eval()
    with torch.no_grad():
        assert torch.equal(seen[0][1]["logits"], whole(input_ids=IDS).logits)
        written = whole.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(seen[0][1]["written"], written)


def test_memory_short_in_the_backward_of_one_makes_micro_batches_smaller_in_all(
    seen: list[Seen], whole: Any, tmp_path: Path
) -> None:
    assert [facts["trained"] for facts, _ in seen] == [{"parts": 2, "step": 3}] * 2
    adapted(whole)
    run = make_run(tmp_path, whole, total_steps=3, accumulation=3)
    run_training(run, TrainingPlan(3, 1e-2, seed=5))
    for name, value in trained_values(whole).items():
        ours, theirs = (tensors[f"trained.{name}"] for _, tensors in seen)
        assert torch.equal(ours, theirs)
        assert (ours - value).norm() < 1e-3 * value.norm()


def test_foresight_has_the_same_parts() -> None:
    stored = {
        count: build_weightless_base(CONFIG, AutoModelForCausalLM, spec(count)).layer_stream.store
        for count in (2, 3, 4)
    }
    assert [len(store.shards) for store in stored.values()] == [LAYERS] * 3
    whole = 2 * stored[2].shard_bytes
    assert whole == 4 * stored[4].shard_bytes
    assert 0 <= 3 * stored[3].shard_bytes - whole < 3 * LAYERS


def test_parts_without_peers_are_a_mistake(source: Path) -> None:
    with pytest.raises(ValueError, match="2 parts of every layer need as many processes"):
        load_base(source, AutoModelForCausalLM, spec(2), CPU)
