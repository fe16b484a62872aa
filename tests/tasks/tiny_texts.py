"""Tiny random models that classify, with a word tokenizer made on the spot."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOOD, BAD, MIDDLING = "good fine great lovely", "bad awful poor dull", "so some middle even"
FILLER = "the film was a story about people in town and their dog"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LABELS = {"good": GOOD, "bad": BAD, "middling": MIDDLING}


def word_tokenizer(*, bert: bool = True) -> Any:
    words = [*SPECIALS, *f"{GOOD} {BAD} {MIDDLING} {FILLER}".split()]
    words = list(dict.fromkeys(words))
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bert:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", eos_token="[SEP]", model_input_names=names if bert else names[::2],
    )  # fmt: skip


def tiny_encoder_folder(folder: Path) -> Path:
    """A BERT without a head."""
    torch.manual_seed(1)
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    tf.BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def tiny_decoder_folder(folder: Path) -> Path:
    """A Llama with its language head, which a classifier leaves."""
    torch.manual_seed(1)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.2, pad_token_id=None,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(bert=False).save_pretrained(folder)
    return folder


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose label is the kind of the one telling word in them."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: str) -> str:
        listed = words.split()
        return listed[int(torch.randint(len(listed), (1,), generator=generator))]

    rows = []
    for number in range(count):
        label = list(LABELS)[number % 3]
        length = int(torch.randint(1, 6, (1,), generator=generator))
        words = [pick(FILLER) for _ in range(length)]
        place = int(torch.randint(length + 1, (1,), generator=generator))
        words.insert(place, pick(LABELS[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
