"""Small models with random weights, for families of which no registry has real ones in a package.

    python scripts/random_models.py t5 OUT_FOLDER ROWS.jsonl
    python scripts/random_models.py marian OUT_FOLDER ROWS.jsonl
    python scripts/random_models.py resnet OUT_FOLDER

They know nothing: what a run makes of them shows that loss, gradients, search and files are right,
and says nothing about how good such models are. The sequence models come with a tokenizer that is
trained on the rows' `source` and `target`; the ResNet with an image processor for 32 x 32 pixels.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTImageProcessorPil,
)

SEED = 0
VOCABULARY = 600
IMAGE_SIDE = 32


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Unigram pieces as SentencePiece makes them; `</s>` ends every text, `<pad>` is 0."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_t5(folder: Path, texts: Sequence[str]) -> None:
    """T5 with 3 + 3 layers of 128, about 1.4M parameters, embeddings tied to the head."""
    tokenizer = train_tokenizer(texts)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    _save(T5ForConditionalGeneration, config, folder)
    tokenizer.save_pretrained(folder)


def make_marian(folder: Path, texts: Sequence[str]) -> None:
    """Marian with 3 + 3 layers of 128, about 1.3M parameters."""
    tokenizer = train_tokenizer(texts)
    config = MarianConfig(
        vocab_size=len(tokenizer), decoder_vocab_size=len(tokenizer), d_model=128,
        encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=256, decoder_ffn_dim=256, max_position_embeddings=256, dropout=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None,
        scale_embedding=True,
    )  # fmt: skip
    _save(MarianMTModel, config, folder)
    tokenizer.save_pretrained(folder)


def make_resnet(folder: Path, texts: Sequence[str] = ()) -> None:
    """ResNet with three stages of two basic blocks, about 0.7M parameters."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic"
    )
    _save(ResNetForImageClassification, config, folder)
    processor = ViTImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    processor.save_pretrained(folder)


def _save(model_class: Any, config: Any, folder: Path) -> None:
    torch.manual_seed(SEED)
    model_class(config).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    "t5": make_t5,
    "marian": make_marian,
    "resnet": make_resnet,
}


def read_texts(path: Path) -> list[str]:
    """All sources and targets of rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[side] for row in rows for side in ("source", "target")]


def main() -> int:
    """Command line."""
    kind, folder, *rows = sys.argv[1:]
    MAKERS[kind](Path(folder), read_texts(Path(rows[0])) if rows else [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
