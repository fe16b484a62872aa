"""A sound input or two of each kind, for a fuzzer to start from."""

from __future__ import annotations

import json

_ROW = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
    "prompt": "a", "completion": "b", "instruction": "i", "output": "o", "text": "t", "label": 1,
    "tokens": ["a", "b"], "tags": ["O", "B-X"], "question": "q", "context": "c",
    "answers": {"text": ["c"], "answer_start": [0]}, "tools": [{"type": "function"}],
}  # fmt: skip
_HEADER = {"x": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}
_LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
_MODEL = {"model_type": "llama", "hidden_size": 8, "rope_parameters": {"rope_type": "default"}}
_GGUF = {
    "model_type": "llama", "vocab_size": 4, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
_TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}],
    "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
}
SEEDS: dict[str, list[bytes]] = {
    "gguf config": [json.dumps(_GGUF).encode()],
    "gguf tokenizer": [json.dumps(_TOKENIZER).encode()],
    "run file": [b"model:\n  source: m\ndata:\n  train: d.jsonl\ntrain: {learning_rate: 1e-4}\n"],
    "override": [b"train.learning_rate=1e-4", b"data.train=[a.jsonl, {path: b, weight: 2}]"],
    "rows .jsonl": [json.dumps(_ROW).encode()],
    "rows .json": [json.dumps([_ROW]).encode(), b'{"data": [{"paragraphs": []}], "version": "1"}'],
    "rows .csv": [b"prompt,completion\na,b\n", b'text;label\n"x;y";1\n'],
    "rows .conll": [b"-DOCSTART- O\n\nEU B-ORG\nsays O\n"],
    "chat template": [b"{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"],
    "adapter config": [json.dumps(_LORA).encode()],
    "model config": [json.dumps(_MODEL).encode()],
    "safetensors header": [json.dumps(_HEADER).encode()],
    "index": [b'{"metadata": {}, "weight_map": {"x": "model-00001-of-00001.safetensors"}}'],
    "saved state": [b'\x02{"format_version": 1, "step": 4}', b'\x83{"step": 4}'],
    "run folder": [b'{"kind": "train", "step": 1, "loss": 2.5, "base_fingerprint": "ab"}'],
    "command line": [b"train\nrun.yaml\n--set\ntrain.epochs=1", b"profile\n--gpu\nrtx", b"export"],
}
