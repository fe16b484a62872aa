"""Next-token prediction: the loss of a decoder, through a head that never makes all its logits.

The fast path runs the decoder without its head and gives hidden states and head weight to
`linear_cross_entropy`. What an architecture does between head and logits (Gemma 2 soft-caps, Cohere
multiplies, Granite divides) is read from its configuration *and held against the model's own logits
on a few tokens*; a head we do not understand keeps the plain path, with the reason to be said
aloud. Labels are aligned with inputs (the field's convention); the shift happens here, once.

B rows, T tokens of a row, N trained tokens, V vocabulary.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_trainer.base.head_product import HeadWeight
from qlora_trainer.base.packed_attention import example_lengths, takes_example_lengths
from qlora_trainer.data.encode import IGNORED, Encoder
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs, TaskKind, full_length_inputs
from qlora_trainer.tasks.linear_cross_entropy import (
    PLAIN,
    Regularized,
    chunk_logits,
    linear_cross_entropy,
)
from qlora_trainer.tasks.loss_path import (
    CHUNKED,
    SWITCHED_OFF,
    LossPath,
    full_cross_entropy,
    hold_against_model,
    no_linear_head,
    slice_for,
    token_sums,
    with_head_weight,
)
from qlora_trainer.tasks.task import Batch, needed_mask


def choose_loss_path(model: nn.Module) -> LossPath:
    """Decide by the model's structure and, with real weights, by its own logits.

    On `meta` there are no logits to compare: the structure alone decides.
    """
    net: Any = model
    head: Any = net.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
    if plain := no_linear_head(head):
        return plain
    if getattr(net, "base_model", net) is net:
        return LossPath(False, "the model has no decoder apart from its head")
    config = net.config.get_text_config() if hasattr(net.config, "get_text_config") else net.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    path = LossPath(True, CHUNKED, scale, getattr(config, "final_logit_softcapping", None))

    def probe(tokens: Tensor, weight: HeadWeight) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": tokens, "use_cache": False}
        own = net(**inputs).logits[0].float()
        hidden = net.base_model(**inputs).last_hidden_state[0]
        return own, chunk_logits(hidden, weight, head.bias, path.logit_scale, path.softcap)

    return with_head_weight(head, lambda weight: hold_against_model(path, net, weight, probe))


@dataclass(frozen=True)
class CausalLM:
    """The causal language modelling task of one model.

    Attributes:
        loss_path: From `choose_loss_path`.
        takes_positions: The decoder takes `position_ids`; needed for packing.
        chunk_tokens: Tokens whose logits exist at one time; None chooses by vocabulary.
        packs_by_lengths: The model's attention takes packed rows by their examples' lengths.
        regularized: Label smoothing and z-loss, of training alone.
        slice_elements: Logits widened at one time; None: those of a chunk.
    """

    loss_path: LossPath
    takes_positions: bool = True
    chunk_tokens: int | None = None
    packs_by_lengths: bool = False
    regularized: Regularized = PLAIN
    slice_elements: int | None = None

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        chunk_tokens: int | None = None,
        regularized: Regularized = PLAIN,
        chunked: bool = True,
        on_cpu: bool | None = None,
    ) -> "CausalLM":
        """Look at the model once: its loss path and what its decoder takes.

        `chunked` may be turned off; `on_cpu` says whether a CPU will compute it; None: as the
        model lies.
        """
        decoder = getattr(model, "base_model", model)
        takes = "position_ids" in inspect.signature(decoder.forward).parameters
        by_lengths = takes and takes_example_lengths(model)
        path = choose_loss_path(model) if chunked else LossPath(False, SWITCHED_OFF)
        return cls(path, takes, chunk_tokens, by_lengths, regularized, slice_for(model, on_cpu))

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Held-out loss falls, token accuracy rises."""
        return {"loss": False, "token_accuracy": True}

    @property
    def best_metric(self) -> str:
        """The loss."""
        return "loss"

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Find trained positions; drop a mask and positions that say nothing.

        Without them transformers takes its fused causal kernels, and never asks the device
        whether a row is packed.
        """
        input_ids, labels = batch["input_ids"], batch["labels"]
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
        positions = (shifted != IGNORED).nonzero().squeeze(1)  # (N,)
        prepared = {
            "input_ids": input_ids,
            "loss_positions": positions,
            "loss_targets": shifted.index_select(0, positions),
            **needed_mask(batch),
        }
        order = batch.get("position_ids")
        if order is not None and not bool((order == torch.arange(order.shape[1])).all()):
            if self.takes_positions:
                prepared["position_ids"] = order
                if self.packs_by_lengths and "attention_mask" not in batch and order.shape[0] == 1:
                    prepared["attention_mask"] = example_lengths(order)
            elif "attention_mask" not in prepared:
                raise UserError(
                    "data.packing: this model takes no position_ids, so packed examples would "
                    "see each other; set data.packing: false"
                )
        return prepared

    def loss_weight(self, batch: Batch) -> int:
        """Trained tokens, after the shift."""
        return batch["loss_targets"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over trained tokens."""
        path, net = self.loss_path, _untyped(model)
        if not path.chunked:
            logits = net(**_inputs(batch)).logits
            return full_cross_entropy(logits.flatten(0, 1), batch, self.regularized)
        hidden = net.base_model(**_inputs(batch)).last_hidden_state  # (B, T, D)
        head = net.get_output_embeddings()
        return with_head_weight(
            head,
            lambda weight: linear_cross_entropy(
                hidden,
                weight,
                head.bias,
                batch["loss_positions"],
                batch["loss_targets"],
                chunk_tokens=self.chunk_tokens,
                logit_scale=path.logit_scale,
                softcap=path.softcap,
                regularized=self.regularized,
                slice_elements=self.slice_elements,
            ),
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss and right tokens, summed; the largest logit is found chunk by chunk."""
        net = _untyped(model)
        path, chunk_tokens = self.loss_path, self.chunk_tokens
        if not path.chunked:
            logits = net(**_inputs(batch)).logits.flatten(0, 1)
            return token_sums(logits, None, batch, path, chunk_tokens)
        hidden = net.base_model(**_inputs(batch)).last_hidden_state.flatten(0, 1)
        head = net.get_output_embeddings()
        return with_head_weight(
            head,
            lambda weight: token_sums(hidden, (weight, head.bias), batch, path, chunk_tokens),
        )


def _untyped(model: nn.Module) -> Any:
    return model  # transformers' attributes (base_model, ...) are unknown to the type checker


def _inputs(batch: Batch) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "position_ids")
    return {"use_cache": False, **{name: batch[name] for name in names if name in batch}}


def _encoder(inputs: EncoderInputs) -> Encoder:
    return Encoder(
        inputs.tokenizer,
        chat_template=inputs.chat_template,
        chat_template_kwargs=inputs.chat_template_kwargs,
        loss_on=inputs.loss_on,
    )


def _task(inputs: TaskInputs) -> CausalLM:
    return CausalLM.for_model(
        inputs.model,
        chunk_tokens=inputs.chunk_tokens,
        regularized=inputs.regularized,
        chunked=inputs.chunked_loss,
        on_cpu=inputs.on_cpu,
    )


def weightless_batch(
    config: Any, *, rows: int, tokens: int, padded: bool, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Full length, every token trained: the loss then makes the most chunks of logits."""
    batch = full_length_inputs(rows, tokens, padded=padded)
    return {**batch, "labels": torch.zeros_like(batch["input_ids"])}


KIND = TaskKind(
    name="causal-lm",
    auto_class=AutoModelForCausalLM,
    peft_type="CAUSAL_LM",
    make_encoder=_encoder,
    make_task=_task,
    weightless_batch=weightless_batch,
    packing=True,
)
