"""Rows of measured training runs as recipes to simulate: by its columns, where a row comes from.

Whatever a row says that its recipe cannot be told is refused by name, never guessed.
"""

from __future__ import annotations

from typing import Any

MIB = 2**20
FAMILIES = (  # part of the model id, transformers' configuration class; the first that matches
    ("qwen3", "Qwen3"), ("qwen2", "Qwen2"), ("qwen1.5", "Qwen2"), ("mistral", "Mistral"),
    ("zephyr", "Mistral"), ("gemma-3", "Gemma3Text"), ("gemma-2-", "Gemma2"), ("gemma2", "Gemma2"),
    ("gemma", "Gemma"), ("phi-3", "Phi3"), ("phi-4", "Phi3"), ("phi3", "Phi3"),
    ("granite", "Granite"), ("smollm3", "SmolLM3"), ("olmo-2", "Olmo2"), ("stablelm", "StableLm"),
)  # fmt: skip
NOT_LLAMAS = (  # built otherwise than the columns of a row can say
    "bert", "bloom", "falcon-", "gpt-", "gpt2", "moe", "mixtral", "-a3b", "mpt-", "olmo-1", "opt-",
    "phi-1", "phi-2", "pythia", "rwkv", "mamba", "t5",
)  # fmt: skip
CARDS = ("Tesla T4", "A100", "L40S")  # those of peft_recipes, whose import takes seconds
PHASES = {  # column of the CSV -> what the simulation calls it
    "after_load_allocated_mib": "after_load",
    "peak_forward_mib": "forward",
    "peak_backward_mib": "backward",
    "peak_optimizer_mib": "optimizer",
}


class NotCovered(ValueError):
    """A row that says what the recipe cannot be told."""


def family_of(model_id: str) -> str:
    """The configuration class of a model id; Llama's where nothing else is said.

    Raises:
        NotCovered: An architecture that a row's columns do not describe.

    >>> [family_of(name) for name in ("Qwen2.5-1.5B-Instruct", "SmolLM2-135M", "gemma-2b")]
    ['Qwen2', 'Llama', 'Gemma']
    """
    low = model_id.lower()
    odd = next((part for part in NOT_LLAMAS if part in low), None)
    if odd is not None:
        raise NotCovered(
            f"model_id = {model_id}: a row's columns do not describe this architecture ({odd})"
        )
    return next((family for part, family in FAMILIES if part in low), "Llama")


def _yes(text: str) -> bool:
    return text.strip().lower() in ("true", "1", "yes")


def _number(row: dict[str, str], column: str, otherwise: float | None = None) -> float:
    """A column's number; what is empty has a default or is a fault."""
    text = (row.get(column) or "").strip()
    if not text and otherwise is not None:
        return otherwise
    try:
        return float(text)
    except ValueError:
        raise NotCovered(f"{column} = {text!r}: not a number") from None


def _whole(row: dict[str, str], column: str, otherwise: int | None = None) -> int:
    return int(_number(row, column, otherwise))


def _card(row: dict[str, str]) -> tuple[str, float]:
    """The card's name, and MiB that a process can have beside the context."""
    name, _, total = row["gpu"].removesuffix(" MiB").rpartition(" ")
    try:
        mebibytes = float(total)
    except ValueError:
        name = ""
    if name not in CARDS:
        raise NotCovered(
            f"gpu = {row['gpu']}: write a card of {', '.join(CARDS)} and its MiB, as "
            "Tesla T4 14912 MiB"
        )
    return name, mebibytes - _number(row, "cuda_context_mib", 0.0)


def _one_of(row: dict[str, str], column: str, known: tuple[str, ...]) -> str:
    text = (row.get(column) or known[0]).strip().lower()
    if text not in known:
        raise NotCovered(f"{column} = {text}: the recipe knows {', '.join(known)}")
    return text


def t4_request(row: dict[str, str]) -> dict[str, Any]:
    """The recipe of a row measured with fitcheck-llm's measure.py.

    Raises:
        NotCovered: The row says what this recipe does not do.
    """
    sizes = ("num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    model: dict[str, Any] = {name: _whole(row, name) for name in sizes}
    heads = model["num_attention_heads"]
    model |= {
        "num_kv_heads": _whole(row, "num_kv_heads", heads),
        "head_dim": _whole(row, "head_dim", model["hidden_size"] // heads),
        "family": family_of(row["model_id"]),
        "tie_word_embeddings": _yes(row["tie_word_embeddings"]),
    }
    if "mistral-7b" in row["model_id"].lower():
        model["sliding_window"] = 4096 if "v0.1" in row["model_id"] else None
    card, mebibytes = _card(row)
    _one_of(row, "optimizer", ("adamw",))
    _one_of(row, "lora_dtype", ("float32", "fp32"))
    return {
        "kind": "t4",
        "capacity_bytes": int(mebibytes * MIB),
        "recipe": {
            "gpu": card,
            "model": model,
            "quantization": _one_of(row, "quantization", ("none", "nf4")),
            "double_quant": _yes(row["double_quant"]),
            "attention": _one_of(row, "attn", ("sdpa", "eager")),
            "batch_size": _whole(row, "batch_size"),
            "seq_len": _whole(row, "seq_len"),
            "rank": _whole(row, "lora_rank"),
            "targets": row["lora_targets"].split("+"),
            "compute_dtype": _one_of(
                row, "compute_dtype", ("fp16", "float16", "bf16", "bfloat16", "fp32", "float32")
            ),
            "gradient_checkpointing": _yes(row["gradient_checkpointing"]),
        },
    }


MISTRAL_7B = {
    "family": "Mistral", "num_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "tie_word_embeddings": False, "sliding_window": 4096,
}  # fmt: skip
LLAMA_3B = {
    "family": "Llama", "num_layers": 28, "hidden_size": 3072, "intermediate_size": 8192,
    "num_attention_heads": 24, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "tie_word_embeddings": True,
}  # fmt: skip


def a100_request(row: dict[str, str]) -> dict[str, Any]:
    """The recipe of a row of fms-acceleration's published benchmark."""
    return {
        "kind": "a100",
        "recipe": {
            "gpu": "A100", "model": MISTRAL_7B,
            "quantization": "nf4" if "nf4" in row["base"] else "none",
            "double_quant": "double quant" in row["base"], "attention": "flash",
            "batch_size": int(row["micro_batch_size"]), "seq_len": int(row["seq_len_packed"]),
            "rank": int(row["lora_rank"]), "targets": row["lora_targets"].split("+"),
            "compute_dtype": "bf16",
            "gradient_checkpointing": _yes(row["gradient_checkpointing"]),
            "norm_dtype": row["norm_and_residual_dtype"],
        },
    }  # fmt: skip


def l40s_request(row: dict[str, str]) -> dict[str, Any]:
    """The recipe of a row of PEFT's published method comparison (MetaMathQA)."""
    method = row["method"]
    mlp = "MLP" in method
    return {
        "kind": "l40s",
        "recipe": {
            "gpu": "L40S", "model": LLAMA_3B, "quantization": "none", "double_quant": False,
            "attention": "sdpa", "batch_size": int(row["micro_batch_size"]),
            "seq_len": int("".join(c for c in row["longest_batch_tokens"] if c.isdigit())),
            "rank": int(method.split("rank ")[1].split()[0]),
            "targets": ["gate_proj", "up_proj", "down_proj"] if mlp else ["q_proj", "v_proj"],
            "compute_dtype": "bf16", "gradient_checkpointing": False,
        },
    }  # fmt: skip


def request_for(row: dict[str, str]) -> dict[str, Any]:
    """Tell by its columns where a row comes from."""
    if "max_reserved_gb_1e9" in row:
        return l40s_request(row)
    return a100_request(row) if "steady_allocated_bytes" in row else t4_request(row)


def measured_of(row: dict[str, str]) -> dict[str, float]:
    """What was measured, in bytes, under the names of the simulation."""
    if "max_reserved_gb_1e9" in row:
        return {"reserved": float(row["max_reserved_gb_1e9"]) * 1e9}
    if "steady_allocated_bytes" in row:
        return {
            "allocated": float(row["peak_allocated_bytes"]),
            "steady": float(row["steady_allocated_bytes"]),
        }
    named = {"allocated": "peak_allocated_mib", "reserved": "peak_reserved_mib"}
    named |= {name: column for column, name in PHASES.items()}
    return {name: float(row[column]) * MIB for name, column in named.items() if row.get(column)}
