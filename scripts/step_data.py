"""What the contenders of `benchmark_step.py` train on: made-up rows, or real instructions.

Made-up batches are full rows, the same for everybody. Real data are the first instructions of an
Alpaca-format file, as chats, every token trained: whoever packs lays them end to end best-fit,
whoever does not pads them, and each counts the tokens that are no padding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

Batch = dict[str, torch.Tensor]


def made_up_rows(job: dict[str, Any], vocabulary: int) -> list[torch.Tensor]:
    """One (rows, tokens) batch per step: every next token is the last one plus a fixed step."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for _ in range(job["steps"]):
        first = torch.randint(vocabulary, (job["rows"], 1), generator=generator)
        stride = torch.randint(1, 17, (job["rows"], 1), generator=generator)
        batches.append((first + stride * torch.arange(job["tokens"])) % vocabulary)
    return batches


def real_examples(job: dict[str, Any]) -> list[list[int]]:
    """As many examples as fill the steps of whoever packs, and no fewer than a padder takes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    wanted = job["steps"] * job["tokens"] * job["rows"]
    examples: list[list[int]] = []
    with Path(job["data"]).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
            chat = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": row["output"]},
            ]
            ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
            examples.append(ids[: job["tokens"]])
            if sum(map(len, examples)) >= wanted and len(examples) >= 8 * job["steps"]:
                break
    return examples


def packed_batches(job: dict[str, Any]) -> list[Batch]:
    """One row of whole examples per step, best-fit; positions restart with each example."""
    from qlora_trainer.data.packing import pack

    examples = real_examples(job)
    batches = []
    for group in pack([len(ids) for ids in examples], job["tokens"])[: job["steps"]]:
        ids = [examples[index] for index in group]
        row = torch.tensor([[token for example in ids for token in example]])
        places = torch.cat([torch.arange(len(example)) for example in ids])[None]
        batches.append({"input_ids": row, "labels": row, "position_ids": places})
    return batches
