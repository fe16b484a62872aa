"""The loss of encoder-decoder models: the decoder's target tokens, given the encoder's source.

What the decoder reads is the labels moved one to the right. How, only the model knows (T5 begins
with its padding, BART with its end of sentence, mBART with the language): its own method does it,
and a model without one is given the labels and shifts them in its own forward. The head goes
through `linear_cross_entropy` where it is a plain product. What stands between decoder and logits
(T5 scales by d_model**-0.5 where embeddings are tied, BART and Marian add `final_logits_bias`) is
read from the model *and held against its own logits*; a head we do not understand keeps the plain
path, with the reason to be said aloud.

B rows, S source tokens, T target tokens, N trained tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.base.head_product import HeadWeight
from qlora_trainer.data.encode import IGNORED
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

Shift = Callable[[Tensor], Tensor]


def own_shift(model: nn.Module) -> Shift | None:
    """The model's own way from labels (B, T) to decoder inputs (B, T); None where it has none."""
    shift: Shift | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return shift


def choose_loss_path(model: nn.Module) -> LossPath:
    """Decide by the model's structure and, with real weights, by its own logits.

    On `meta` there are no logits to compare: the structure alone decides.
    """
    net: Any = model
    kind = type(model).__name__
    if own_shift(model) is None:
        return LossPath(False, f"{kind} shifts labels only inside its forward; full logits kept")
    head = net.get_output_embeddings()
    if plain := no_linear_head(head):
        return plain
    path = LossPath(True, CHUNKED, _logit_scale(net.config), _softcap(net))

    def probe(tokens: Tensor, weight: HeadWeight) -> tuple[Tensor, Tensor] | None:
        batch = {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
        try:
            own = net(**batch, use_cache=False).logits[0].float()
            hidden, bias = _decoder_states(net, batch)[0], _logit_bias(net)
            return own, chunk_logits(hidden, weight, bias, path.logit_scale, path.softcap)
        except (TypeError, AttributeError):  # a model whose parts are called in another way
            return None

    return with_head_weight(head, lambda weight: hold_against_model(path, net, weight, probe))


def _logit_scale(config: Any) -> float:
    """T5 scales the decoder's output where head and embedding were trained as one."""
    scaled = getattr(config, "scale_decoder_outputs", False)
    if config.model_type in ("umt5", "switch_transformers"):  # no setting of their own for it
        scaled = bool(config.tie_word_embeddings)
    return float(config.d_model) ** -0.5 if scaled else 1.0


def _softcap(net: Any) -> float | None:
    decoder = getattr(net.config, "decoder", net.config)
    cap = getattr(decoder, "final_logit_softcapping", None)
    return float(cap) if cap is not None else None


def _logit_bias(net: Any) -> Tensor | None:
    """(V,) What is added to the head's product: its own bias, or BART's buffer."""
    added = getattr(net, "final_logits_bias", None)
    bias: Tensor | None = net.get_output_embeddings().bias
    if added is None:
        return bias
    return added.reshape(-1) if bias is None else bias + added.reshape(-1)


def _decoder_states(net: Any, batch: Batch) -> Tensor:
    """(B, T, D) The decoder's output, its head not applied."""
    mask = batch.get("attention_mask")
    encoded = net.get_encoder()(
        input_ids=batch["input_ids"], attention_mask=mask
    ).last_hidden_state  # (B, S, D)
    states: Tensor = net.get_decoder()(
        input_ids=batch["decoder_input_ids"],
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return states


@dataclass(frozen=True)
class EncoderDecoderLoss:
    """What one model's target tokens cost.

    Attributes:
        loss_path: From `choose_loss_path`.
        shift: The model's own method; None where only its forward can.
        chunk_tokens: Tokens whose logits exist at one time; None chooses by vocabulary.
        regularized: Label smoothing and z-loss, of training alone.
        slice_elements: Logits widened at one time; None: those of a chunk.
    """

    loss_path: LossPath
    shift: Shift | None
    chunk_tokens: int | None = None
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
    ) -> "EncoderDecoderLoss":
        """Look at the model once: its loss path and how it shifts (arguments as of `CausalLM`)."""
        path = choose_loss_path(model) if chunked else LossPath(False, SWITCHED_OFF)
        return cls(path, own_shift(model), chunk_tokens, regularized, slice_for(model, on_cpu))

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Find trained positions, make the decoder's inputs, drop a mask that says nothing.

        A batch without labels keeps what generation needs.
        """
        prepared = {"input_ids": batch["input_ids"], **needed_mask(batch)}
        if "labels" not in batch:
            return prepared
        labels = batch["labels"]  # (B, T), aligned with the decoder's *outputs*
        flat = labels.reshape(-1)
        positions = (flat != IGNORED).nonzero().squeeze(1)  # (N,)
        prepared["loss_positions"] = positions
        prepared["loss_targets"] = flat.index_select(0, positions)
        if self.shift is None:
            prepared["labels"] = labels
        else:
            prepared["decoder_input_ids"] = self.shift(labels)
        return prepared

    def loss_weight(self, batch: Batch) -> int:
        """Trained target tokens."""
        return batch["loss_targets"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over target tokens."""
        net: Any = model
        if not self.loss_path.chunked:
            return full_cross_entropy(_plain_logits(net, batch), batch, self.regularized)
        states = _decoder_states(net, batch)
        return with_head_weight(
            net.get_output_embeddings(),
            lambda weight: linear_cross_entropy(
                states,
                weight,
                _logit_bias(net),
                batch["loss_positions"],
                batch["loss_targets"],
                chunk_tokens=self.chunk_tokens,
                logit_scale=self.loss_path.logit_scale,
                softcap=self.loss_path.softcap,
                regularized=self.regularized,
                slice_elements=self.slice_elements,
            ),
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss and right tokens, summed; the largest logit is found chunk by chunk."""
        net: Any = model
        path, chunk_tokens = self.loss_path, self.chunk_tokens
        if not path.chunked:
            return token_sums(_plain_logits(net, batch), None, batch, path, chunk_tokens)
        states = _decoder_states(net, batch).flatten(0, 1)
        bias = _logit_bias(net)
        return with_head_weight(
            net.get_output_embeddings(),
            lambda weight: token_sums(states, (weight, bias), batch, path, chunk_tokens),
        )


def _plain_logits(net: Any, batch: Batch) -> Tensor:
    """(B * T, V) The model's own logits."""
    names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
    inputs = {name: batch[name] for name in names if name in batch}
    logits: Tensor = net(**inputs, use_cache=False).logits
    return logits.flatten(0, 1)
