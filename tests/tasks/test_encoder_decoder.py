"""Every claim is held against the model's own loss, on tiny random models of the real classes."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from qlora_trainer.tasks.encoder_decoder import EncoderDecoderLoss

V = 101
SIZES = {
    "vocab_size": V, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 40, "init_std": 0.3,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5_SIZES = {
    "vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1,
    "num_decoder_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0,
    "initializer_factor": 3.0,
}  # fmt: skip
MODELS = {
    "t5 tied": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES)),
    "t5 untied": lambda: T5ForConditionalGeneration(
        T5Config(**T5_SIZES, tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    ),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**T5_SIZES)),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**T5_SIZES)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SIZES)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**SIZES)),
    "marian": lambda: MarianMTModel(MarianConfig(**SIZES, decoder_vocab_size=V)),
}


def tiny(name: str) -> nn.Module:
    torch.manual_seed(5)
    model = MODELS[name]().double().eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def pairs() -> dict[str, torch.Tensor]:
    """Three sources and targets of unlike lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (3, 9), generator=generator)
    labels = torch.randint(3, V, (3, 7), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    labels[torch.arange(7) >= torch.tensor([[5], [7], [3]])] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_the_chunked_loss_and_its_gradients_are_the_models_own(name):
    model, batch = tiny(name), pairs()
    task = EncoderDecoderLoss.for_model(model, chunk_tokens=4)
    assert task.loss_path.chunked, task.loss_path.reason
    prepared = task.prepare(batch)
    assert task.loss_weight(prepared) == 15
    own = model(**batch).loss * 15
    own.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = task.loss_sum(model, prepared)
    loss.backward()
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in expected:
            torch.testing.assert_close(
                parameter.grad, expected[parameter_name], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_counts_what_the_own_logits_say(name):
    model, batch = tiny(name), pairs()
    task = EncoderDecoderLoss.for_model(model, chunk_tokens=4)
    found = task.evaluate(model, task.prepare(batch))
    with torch.no_grad():
        output = model(**batch)
    kept = batch["labels"] != -100
    right = (output.logits.argmax(-1)[kept] == batch["labels"][kept]).sum()
    assert int(found["token_accuracy"]) == int(right)
    torch.testing.assert_close(float(found["loss"]), float(output.loss * 15), rtol=1e-5, atol=0)


def test_a_model_that_shifts_only_in_its_forward_keeps_the_plain_path():
    torch.manual_seed(5)
    model = M2M100ForConditionalGeneration(M2M100Config(**SIZES)).double().eval()
    task = EncoderDecoderLoss.for_model(model)
    assert not task.loss_path.chunked
    assert "shifts labels only inside its forward" in task.loss_path.reason
    batch = pairs()
    loss = task.loss_sum(model, task.prepare(batch))
    torch.testing.assert_close(loss, model(**batch).loss * 15)


def test_logits_made_in_an_unknown_way_are_noticed():
    model = tiny("bart")

    def double(module, args, output):
        return output * 2.0

    model.lm_head.register_forward_hook(double)
    path = EncoderDecoderLoss.for_model(model).loss_path
    assert not path.chunked
    assert "a way we do not know" in path.reason


def test_a_row_scores_the_same_alone_as_padded_beside_longer_ones():
    model, batch = tiny("t5 tied"), pairs()
    task = EncoderDecoderLoss.for_model(model)
    together = task.loss_sum(model, task.prepare(batch))
    alone = torch.zeros((), dtype=torch.float64)
    for row, (source, target) in enumerate([(9, 5), (4, 7), (6, 3)]):
        single = {
            "input_ids": batch["input_ids"][row : row + 1, :source],
            "labels": batch["labels"][row : row + 1, :target],
        }
        alone = alone + task.loss_sum(model, task.prepare(single))
    torch.testing.assert_close(together, alone)
