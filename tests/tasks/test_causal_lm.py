"""The chunked loss against each architecture's own logits, in float64."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.causal_lm import CausalLM, choose_loss_path
from qlora_trainer.tasks.loss_path import LossPath
from qlora_trainer.tasks.task import to_device

COMMON = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "llama tied": lambda: tf.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=67, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gemma2": lambda: tf.Gemma2Config(
        **COMMON, head_dim=8, final_logit_softcapping=5.0, attn_implementation="eager"
    ),
    "cohere": lambda: tf.CohereConfig(**COMMON, logit_scale=0.25),
    "granite": lambda: tf.GraniteConfig(**COMMON, logits_scaling=4.0, embedding_multiplier=3.0),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, head_dim=8),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)


def padded_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, 67, (3, 12), generator=generator)
    labels = input_ids.clone()
    labels[:, :4] = -100
    labels[1, 7] = -100
    mask = torch.ones_like(input_ids)
    mask[2, 9:] = 0
    labels[2, 9:] = -100
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_loss_and_every_gradient_equal_the_models_own_logits(name: str) -> None:
    model = build(name)
    task = CausalLM.for_model(model, chunk_tokens=4)
    assert task.loss_path.chunked, task.loss_path.reason
    batch = padded_batch()
    prepared = task.prepare(batch)
    loss = task.loss_sum(model, prepared)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-9)
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[n], p.grad, rtol=1e-7, atol=1e-9, msg=n)
    assert task.loss_weight(prepared) == int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("chunked", [True, False])
def test_evaluation_sums_equal_those_of_the_models_own_logits(name: str, chunked: bool) -> None:
    model = build(name, torch.float32).eval()
    task = CausalLM.for_model(model, chunk_tokens=5)
    if not chunked:
        task = CausalLM(LossPath(False, "asked"), chunk_tokens=5)
    batch = padded_batch()
    sums = task.evaluate(model, task.prepare(batch))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(sums["loss"], expected, rtol=1e-5, atol=1e-5)
    assert sums["token_accuracy"].item() == int((logits.argmax(1) == labels).sum())


class SquaredLogits(tf.LlamaForCausalLM):
    """An architecture that does something to its logits that we know nothing of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits**2
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_unknown_head_keeps_the_plain_path_and_says_so(dtype: torch.dtype) -> None:
    model = SquaredLogits(CONFIGS["llama"]()).to(dtype)
    path = choose_loss_path(model)
    assert not path.chunked
    assert "SquaredLogits makes its logits in a way we do not know" in path.reason
    batch = padded_batch()
    task = CausalLM(path)
    loss = task.loss_sum(model, task.prepare(batch))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_known_heads_take_the_chunked_path_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    assert choose_loss_path(build(name, dtype)).chunked


def test_a_wrapped_head_keeps_the_plain_path() -> None:
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    path = choose_loss_path(model)
    assert not path.chunked
    assert "Sequential" in path.reason


def test_weightless_models_take_the_path_their_structure_says() -> None:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(CONFIGS["gemma2"]())
    assert choose_loss_path(model) == LossPath(
        True, "logits are made in chunks of trained tokens", 1.0, 5.0
    )


def test_a_mask_and_positions_that_say_nothing_are_left_out() -> None:
    task = CausalLM(LossPath(True, ""))
    ids = torch.ones(2, 5, dtype=torch.int64)
    plain = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": ids,
        "position_ids": torch.arange(5).expand(2, 5),
    }
    assert sorted(task.prepare(plain)) == ["input_ids", "loss_positions", "loss_targets"]
    packed = {**plain, "position_ids": torch.tensor([[0, 1, 0, 1, 2]]).expand(2, 5)}
    assert "position_ids" in task.prepare(packed)


def test_packing_is_refused_for_a_model_without_positions() -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(UserError, match=r"data\.packing"):
        CausalLM(LossPath(True, ""), takes_positions=False).prepare(packed)


@pytest.mark.parametrize("by_lengths", [False, True])
def test_packed_rows_have_the_loss_of_the_rows_apart(by_lengths: bool) -> None:
    model = build("llama")
    if by_lengths:
        assert use_packed_attention(model)
    task = CausalLM.for_model(model)
    assert task.packs_by_lengths == by_lengths
    a = torch.tensor([[5, 9, 11, 7]])
    b = torch.tensor([[8, 3, 4]])
    apart = sum(
        task.loss_sum(model, task.prepare({"input_ids": ids, "labels": ids})) for ids in (a, b)
    )
    labels = torch.cat([a, torch.tensor([[-100]]), b[:, 1:]], 1)
    together = task.prepare(
        {
            "input_ids": torch.cat([a, b], 1),
            "labels": labels,
            "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        }
    )
    assert ("attention_mask" in together) == by_lengths
    on_device = to_device(together, torch.device("cpu"))
    torch.testing.assert_close(task.loss_sum(model, on_device), apart, rtol=1e-9, atol=1e-9)
