"""Answer prompts in batches: like lengths together, padded on the left, given back in order.

A cache of keys and values is built by transformers; sampling is seeded, greedy is the default.
Legend: B prompts of a batch, T tokens of the longest prompt in it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_trainer.base.host_embedding import compute_device
from qlora_trainer.base.host_head import head_at_hand


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt until a stop token or `max_new_tokens`.

    Args:
        model: A causal language model.
        prompts: Token ids of each prompt, none empty.
        pad_token_id: Fills shorter prompts on the left, outside the attention mask.
        stop_token_ids: The first of these ends an answer and is not part of it.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts per forward pass.
        temperature: 0 takes the most likely token; above, samples.
        seed: Of sampling; an answer depends on it and on the batch it is sampled in.
        progress: Called with the number of prompts answered so far.

    Returns:
        The new tokens of each prompt, in the order given.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    was_training = model.training
    model.eval()
    device = compute_device(model)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    done = 0
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = _left_padded([prompts[index] for index in chosen], pad_token_id, device)
        torch.manual_seed(seed + start)
        with head_at_hand(model):
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id,
                eos_token_id=list(stop_token_ids),
                use_cache=True,
                **sampling,
            )
        new_tokens = output[:, batch["input_ids"].shape[1] :].tolist()
        for index, tokens in zip(chosen, new_tokens, strict=True):
            answers[index] = _until_stop(tokens, stop_token_ids)
        done += len(chosen)
        if progress is not None:
            progress(done)
    model.train(was_training)
    return answers


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Prompts as (B, T) ids and the mask of what is no padding."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),  # (B, T)
        "attention_mask": torch.tensor(mask, device=device),  # (B, T)
    }


def _until_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    ends = [position for position, token in enumerate(tokens) if token in stops]
    return list(tokens[: ends[0]] if ends else tokens)
