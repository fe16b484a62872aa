"""Sequence to sequence: translation, summaries, dialogue, by encoder-decoder models.

The loss is `encoder_decoder`'s; what the model is worth is seen from what it writes: every held-out
source is answered by greedy or beam search, and the texts are scored whole (`text_metrics`).
chrF tells the best adapter: it moves with single characters, where BLEU stays 0 for a long time.

B rows, S source tokens, T target tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qlora_trainer.base.host_head import head_at_hand
from qlora_trainer.data.encode_pairs import PairEncoder
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.encoder_decoder import EncoderDecoderLoss
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs, TaskKind, full_length_inputs
from qlora_trainer.tasks.task import Batch, Scores
from qlora_trainer.tasks.text_metrics import TEXT_METRICS, score_texts

_SAMPLES = 3  # texts shown in the report


@dataclass(frozen=True)
class Seq2SeqLM:
    """Sequence to sequence learning of one model.

    Attributes:
        loss: Of the target tokens.
        tokenizer: Writes tokens as text; None where nothing is generated.
        num_beams: Of the search; 1 is greedy.
        max_new_tokens: Longest text.
    """

    loss: EncoderDecoderLoss
    tokenizer: Any = None
    num_beams: int = 1
    max_new_tokens: int = 128

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Held-out loss falls; token accuracy and the scores of written texts rise."""
        return {"loss": False, "token_accuracy": True, **dict.fromkeys(TEXT_METRICS, True)}

    @property
    def best_metric(self) -> str:
        """Character n-grams: chrF."""
        return "chrf"

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """See `EncoderDecoderLoss.prepare`."""
        return self.loss.prepare(batch)

    def loss_weight(self, batch: Batch) -> int:
        """Trained target tokens."""
        return self.loss.loss_weight(batch)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over target tokens."""
        return self.loss.loss_sum(model, batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss and right tokens, summed; nothing is generated."""
        return self.loss.evaluate(model, batch)

    def evaluate_rows(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Any]]:
        """Loss and right tokens, and the text written for each row."""
        return self.evaluate(model, batch), self.predict(model, batch)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """The text written for each row; the model's own generation settings fill the rest."""
        net: Any = model
        was_training = net.training
        net.eval()
        try:
            mask = batch.get("attention_mask")
            with head_at_hand(net):
                tokens = net.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=torch.ones_like(batch["input_ids"]) if mask is None else mask,
                    num_beams=self.num_beams,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                )  # (B, T)
        finally:
            net.train(was_training)
        return list(self.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True))

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """BLEU, chrF, ROUGE and exact matches over all texts."""
        found = score_texts(predictions, references)
        lines = [f"{name:<12} {value:6.2f}" for name, value in found.values.items()]
        lines += [f"{name} signature: {text}" for name, text in found.signatures.items()]
        lines.append(f"search: {self.num_beams} beams" if self.num_beams > 1 else "search: greedy")
        for written, wanted in list(zip(predictions, references, strict=True))[:_SAMPLES]:
            lines += ["", f"wanted:  {wanted}", f"written: {written}"]
        return Scores(found.values, "\n".join(lines))

    def tell(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[dict[str, Any]]:
        """One text per record."""
        return [{"prediction": text} for text in predictions]


def _encoder(inputs: EncoderInputs) -> PairEncoder:
    limit = getattr(inputs.config, "max_position_embeddings", None)
    longest = inputs.settings["max_target_len"]
    if limit is not None and longest > limit:
        raise UserError(
            f"task_settings.max_target_len = {longest}: the model knows {limit} positions; take "
            f"{limit} or less"
        )
    return PairEncoder(
        inputs.tokenizer,
        max_source_tokens=inputs.max_seq_len,
        max_target_tokens=longest,
        over_length=inputs.over_length,
        prefix=inputs.settings["prefix"],
        labelled=inputs.labelled,
    )


def _task(inputs: TaskInputs) -> Seq2SeqLM:
    return Seq2SeqLM(
        EncoderDecoderLoss.for_model(
            inputs.model,
            chunk_tokens=inputs.chunk_tokens,
            regularized=inputs.regularized,
            chunked=inputs.chunked_loss,
            on_cpu=inputs.on_cpu,
        ),
        getattr(inputs.encoder, "tokenizer", None),
        num_beams=inputs.settings["num_beams"],
        max_new_tokens=inputs.settings["max_target_len"],
    )


def weightless_batch(
    config: Any, *, rows: int, tokens: int, padded: bool, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Sources and targets of full length, every target token trained."""
    batch = full_length_inputs(rows, tokens, padded=padded)
    batch["labels"] = torch.zeros((rows, settings["max_target_len"]), dtype=torch.int64)
    return batch


KIND = TaskKind(
    name="seq2seq-lm",
    auto_class=transformers.AutoModelForSeq2SeqLM,
    peft_type="SEQ_2_SEQ_LM",
    make_encoder=_encoder,
    make_task=_task,
    weightless_batch=weightless_batch,
)
