"""A row's model, loaded as transformers does it on the card: its order, its temporaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers import core_model_loading as loading
from transformers.modeling_utils import LoadStateDictConfig, get_total_byte_count
from transformers.quantizers.auto import AutoHfQuantizer

from peft_recipes.recipe import CARD
from qlora_trainer.memory.tracker import AllocationTracker

MIB = 2**20


def model_config(values: dict[str, Any], use_cache: bool = False) -> Any:
    """The transformers config of a row's architecture."""
    family = values["family"]
    config_class = getattr(transformers, f"{family}Config")
    known: dict[str, Any] = {
        "num_hidden_layers": values["num_layers"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_attention_heads": values["num_attention_heads"],
        "num_key_value_heads": values["num_kv_heads"],
        "head_dim": values["head_dim"],
        "vocab_size": values["vocab_size"],
        "tie_word_embeddings": values["tie_word_embeddings"],
        "max_position_embeddings": max(values.get("seq_len", 0), 4096),
        "use_cache": use_cache,
    }
    if family == "Phi3":
        known |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if "sliding_window" in values:
        known["sliding_window"] = values["sliding_window"]
    return config_class(**known)


def build_skeleton(config: Any, attention: str, dtype: torch.dtype) -> Any:
    """The architecture with no storage the tracker knows of."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


class Slice:
    """Stands for a tensor in a safetensors file; read, it is born on the card."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, _index: Any) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=CARD)

    @property
    def mebibytes(self) -> float:
        """Its size."""
        return self.shape.numel() * self.dtype.itemsize / MIB

    def get_shape(self) -> list[int]:
        """As safetensors says it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors says it."""
        return {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[self.dtype]


def _fresh_on_card(tracker: AllocationTracker) -> Callable[[torch.Tensor], torch.Tensor]:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata in tracker._known:
            return tensor  # a tied weight is already there
        return torch.empty_like(tensor, device=CARD)

    return move


def load_whole_then_move(model: Any, tracker: AllocationTracker) -> Any:
    """`from_pretrained` on the CPU, then `.cuda()`: parameter by parameter, in module order."""
    return model._apply(_fresh_on_card(tracker))


def load_quantized(
    model: Any, tracker: AllocationTracker, dtype: torch.dtype, double_quant: bool
) -> Any:
    """`from_pretrained(quantization_config=..., device_map={"": 0})`, transformers' own order."""
    quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double_quant,
        ),
        pre_quantized=False,
    )
    with _disable_current_modes():  # the skeleton is not on the card yet
        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        device_map = {"": "meta"}
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=device_map)
        slices = {
            name: Slice(value.shape, dtype)
            for name, value in model.state_dict().items()
            if name not in tied
        }
        expected = dict.fromkeys(model.state_dict(), CARD)
        warm_up = get_total_byte_count(model, expected, quantizer)[CARD]
    torch.empty(int(warm_up // 2), dtype=torch.float16, device=CARD)  # caching_allocator_warmup
    loading.convert_and_load_state_dict_in_model(
        model=model,
        state_dict=slices,
        load_config=LoadStateDictConfig(
            device_map=device_map, dtype=dtype, hf_quantizer=quantizer, weight_mapping=[]
        ),
    )
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.empty_like(getattr(module, name), device=CARD))
    model.tie_weights()
    quantizer.postprocess_model(model)
    return model
