"""Tiny models of real architectures, random but fixed, and their checkpoints on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    T5Config,
)

_TEXT = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


def tiny_config(family: str) -> Any:
    """The smallest configuration that still has every kind of part of the family."""
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(**_TEXT),
        "llama-tied": lambda: LlamaConfig(**_TEXT, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**_TEXT, head_dim=16),
        "gemma2": lambda: Gemma2Config(**_TEXT, head_dim=16, query_pre_attn_scalar=16),
        "gpt2": lambda: GPT2Config(vocab_size=131, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        "bert": lambda: BertConfig(
            vocab_size=131, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=64,
        ),
        "t5": lambda: T5Config(
            vocab_size=131, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        ),
        "mixtral": lambda: MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2),
        "qwen2-moe": lambda: Qwen2MoeConfig(
            **_TEXT, **_MOE, num_experts=4, shared_expert_intermediate_size=48,
            decoder_sparse_step=1,
        ),
    }  # fmt: skip
    return makers[family]()


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny random model as a checkpoint folder and says where."""

    def save(
        family: str,
        model_class: Any,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        **save_arguments: Any,
    ) -> Path:
        folder = tmp_path / f"{family}-{seed}-{len(list(tmp_path.iterdir()))}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            build = getattr(model_class, "from_config", None) or model_class._from_config
            model = build(tiny_config(family), dtype=dtype)
        model.save_pretrained(folder, **save_arguments)
        return folder

    return save


def grouped_llama(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of two query heads to a key head, evaluating, its attention `sdpa`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return made.eval()
