"""What tells encoded rows from others: a hash of all that decides what a record becomes."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import transformers


def identity_hash(parts: Mapping[str, Any], tokenizer: Any = None) -> str:
    """An encoder's identity.

    Args:
        parts: Its settings, as JSON values; what is none counts by its text.
        tokenizer: What makes its tokens, if it makes any. transformers' version always counts.
    """
    told = {**parts, "transformers": transformers.__version__}
    if tokenizer is not None:
        told["tokenizer"] = tokenizer_hash(tokenizer)
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text becomes."""
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    specials = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{specials}\n{text}".encode()).hexdigest()
