"""Small random bases of real architectures, and adapters PEFT itself made for them."""

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    M2M100Config,
    MarianConfig,
    MixtralConfig,
    PreTrainedModel,
    ResNetConfig,
    T5Config,
    ViTConfig,
)

VOCABULARY = 96
CLASSES: dict[str, Any] = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForSequenceClassification,
    "resnet": AutoModelForImageClassification,
    "vit": AutoModelForImageClassification,
    "mixtral": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "bart": AutoModelForSeq2SeqLM,
    "marian": AutoModelForSeq2SeqLM,
    "m2m_100": AutoModelForSeq2SeqLM,
    "bart classifier": AutoModelForSequenceClassification,
}


def make_config(family: str, *, tied: bool = True) -> Any:
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "llama":
        return LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
            max_position_embeddings=128, **special,
        )  # fmt: skip
    if family == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, **special
        )
    if family == "bert":
        return BertConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, num_labels=3, pad_token_id=0,
        )  # fmt: skip
    if family == "vit":  # parameters are called otherwise in memory than in its files
        return ViTConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            image_size=32, patch_size=8, num_labels=3,
        )  # fmt: skip
    if family == "mixtral":  # experts lie apart in the files and together in memory
        return MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, **special,
        )  # fmt: skip
    if family == "t5":
        return T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    translators = {"bart": BartConfig, "marian": MarianConfig, "m2m_100": M2M100Config}
    if make := translators.get(family.removesuffix(" classifier")):
        return make(
            vocab_size=VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
            decoder_ffn_dim=128, max_position_embeddings=64, num_labels=3, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        )  # fmt: skip
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )


def make_base(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = True,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """A checkpoint folder with weights large enough that the logits say something."""
    torch.manual_seed(seed)
    model = CLASSES[family].from_config(make_config(family, tied=tied)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return CLASSES[family].from_pretrained(folder, dtype=dtype).eval()


def make_adapter(
    base: Path, folder: Path, family: str = "llama", *, seed: int = 1, **settings: Any
) -> Any:
    """Train-like random factors on a base; -> PEFT's own model in float32."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, **settings})
    model = peft.get_peft_model(load(base, family), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model.eval()


def inputs(family: str = "llama") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    if family == "t5":
        ids = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    if family in ("resnet", "vit"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 12), generator=generator)}


@torch.no_grad()
def logits(model: PreTrainedModel, family: str = "llama") -> torch.Tensor:
    result: torch.Tensor = model(**inputs(family)).logits
    return result
