"""A tiny random BERT with word pieces, sentences whose entities and answers can be learned."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.data.word_tokenizers import bert_like

NAMES, PLACES = ("zoe", "max", "amy", "bob"), ("paris", "rome", "oslo", "france")
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def tiny_bert_config(**changes: Any) -> Any:
    return tf.BertConfig(**{
        "vocab_size": len(bert_like()), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2, **changes,
    })  # fmt: skip


def tiny_bert_folder(folder: Path) -> Path:
    """A BERT without a head."""
    torch.manual_seed(1)
    tf.BertModel(tiny_bert_config()).save_pretrained(folder)
    bert_like().save_pretrained(folder)
    return folder


def tagged_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        name, place = NAMES[number % 4], PLACES[number // 4 % 4]
        rows.append({
            "tokens": [name, "lives", "in", *(["the"] if number % 3 else []), place, place, "."],
            "tags": ["B-PER", "O", "O", *(["O"] if number % 3 else []), "B-LOC", "I-LOC", "O"],
        })  # fmt: skip
    return rows


def question_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        name, place = NAMES[number % 4], PLACES[number // 4 % 4]
        context = f"{'the capital . ' * (number % 5)}{name} lives in {place} ."
        answers = {"text": [place], "answer_start": [context.index(f" {place}") + 1]}
        if number % 4 == 3:
            answers = {"text": [], "answer_start": []}
        question = "who is it" if number % 4 == 3 else "where is it"
        rows.append({"id": str(number), "question": question, "context": context,
                     "answers": answers})  # fmt: skip
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
