"""A checkpoint of a known model's shape and an adapter for it, with random weights."""

import json
from pathlib import Path

SHAPES: dict[str, dict[str, int]] = {
    "ci": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2,
           "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
RANK = 16


def make_checkpoint(folder: Path, size: str) -> None:
    """A Llama-shaped bf16 checkpoint and an adapter on all its linear layers, tensor by tensor."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from qlora_trainer.export.shards import Announced, ShardWriter

    config = LlamaConfig(**SHAPES[size], tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    (folder / "base").mkdir(parents=True)
    config.save_pretrained(folder / "base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(2**24, generator=generator) * 0.02).bfloat16()

    def write(place: Path, tensors: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        announced = [Announced(name, dtype, shape) for name, shape in tensors.items()]
        with ShardWriter(place, announced) as writer:
            for tensor in announced:
                done = 0
                while done < tensor.size_bytes:
                    left = (tensor.size_bytes - done) // dtype.itemsize
                    part = noise[: min(left, len(noise))].to(dtype)
                    writer.write(tensor.name, done, part)
                    done += part.nbytes

    write(folder / "base", shapes, torch.bfloat16)
    factors: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{path}.lora_A.weight"] = (RANK, shape[1])
            factors[f"{path}.lora_B.weight"] = (shape[0], RANK)
    adapter = folder / "adapter"
    adapter.mkdir()
    write(adapter, factors, torch.float32)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32,
        "lora_dropout": 0.0, "bias": "none", "target_modules": names,
        "base_model_name_or_path": str(folder / "base"),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
