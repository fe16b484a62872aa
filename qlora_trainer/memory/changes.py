"""What can be changed of a run to make it smaller: a table, mildest first.

The lossless changes leave the training result as it is (tests hold each against the plain path) and
cost time; the others change numbers a little. Shorter sequences and lower ranks are neither: they
change what is trained, and stand in `memory/way_out.py` as the last resort.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qlora_trainer.memory.program import RunShape
from qlora_trainer.training.activations import Activation

_TILE_TOKENS = 2048  # of the fused MLP: small beside long sequences, large enough for the card
_PAGED = {"adamw": "paged_adamw_32bit", "adamw_8bit": "paged_adamw_8bit"}


@dataclass(frozen=True)
class Option:
    """One way of a change.

    Attributes:
        overrides: Setting -> value, as `--set` takes it.
        what: In words.
        apply: The run with it.
    """

    overrides: dict[str, str]
    what: str
    apply: Callable[[RunShape], RunShape]


Change = tuple[Option, ...]  # of one kind, mildest first; a later takes the place of an earlier


def lossless_changes(shape: RunShape, *, on_cpu: bool, streaming: bool) -> list[Change]:
    """Those this run does not have yet, cheapest in time first.

    Args:
        shape: The run.
        on_cpu: Host memory is the memory that lacks: nothing is gained by moving anything there.
        streaming: The layers' weights may come over the bus in every pass, which is by far the
            dearest.
    """
    found = [_mask_free(shape), _loss(shape), _evaluated_rows(shape), _recompute(shape)]
    found += [_smaller_batches(shape), _norms(shape), _mlp(shape)]
    if not on_cpu:
        found += [_paged(shape), _embeddings(shape), _head_on_host(shape), _offload(shape)]
    if streaming:
        found.append(_streamed(shape))
    return [change for change in found if change]


def lossy_changes(shape: RunShape, *, on_cpu: bool) -> list[Change]:
    """Those that change numbers a little, least first; arguments as of `lossless_changes`."""
    found = [_eight_bit_states(shape), _smaller_head(shape, on_cpu=on_cpu)]
    if not shape.base.double_quant:
        found.append((_of_base("double quantization", double_quant=True),))
    if shape.base.quantization != "nf4":
        found.append((_of_base("4-bit base", quantization="nf4"),))
    return [change for change in found if change]


def _mask_free(shape: RunShape) -> Change:
    if not shape.packed or shape.mask_free:
        return ()
    what = "packed rows without a mask (faster, same result)"
    return (_of_shape("data.mask_free_packing", what, mask_free=True),)


def _evaluated_rows(shape: RunShape) -> Change:
    """Unless set, they are as many as of training."""
    if (shape.held_out_rows or 1) == 1 or shape.longest_held_out == 0:
        return ()
    what = "one sequence per pass of evaluation (slower, same result)"
    return (_of_shape("evaluation.micro_batch_size", what, held_out_rows=1),)


def _recompute(shape: RunShape) -> Change:
    if shape.activations != "keep":
        return ()
    what = "recompute activations (slower, same result)"
    return (_of_shape("train.activations", what, activations="recompute"),)


def _offload(shape: RunShape) -> Change:
    if shape.activations == "offload":
        return ()
    what = "layer inputs in host memory (slower, same result)"
    return (_of_shape("train.activations", what, activations="offload"),)


def _smaller_batches(shape: RunShape) -> Change:
    """Halved again and again; the effective batch stays."""
    options, rows = [], shape.micro_batch_size
    while rows > 1:
        rows //= 2
        options.append(_batch(rows, shape.accumulation * shape.micro_batch_size // rows))
    return tuple(options)


def _batch(rows: int, accumulation: int) -> Option:
    said = {
        "train.micro_batch_size": str(rows),
        "train.gradient_accumulation_steps": str(accumulation),
    }
    words = f"{rows} sequence{'s' if rows > 1 else ''} per pass (slower, same result)"

    def apply(run: RunShape) -> RunShape:
        padded = run.padded and rows > 1
        return replace(run, micro_batch_size=rows, accumulation=accumulation, padded=padded)

    return Option(said, words, apply)


def _loss(shape: RunShape) -> Change:
    if shape.chunked_loss:
        return ()
    return (_of_shape("train.chunked_loss", "logits in chunks (same result)", chunked_loss=True),)


def _of_shape(setting: str, what: str, **changed: Any) -> Option:
    """One field of the run, and the setting that decides it."""
    (value,) = changed.values()
    return Option({setting: str(value).lower()}, what, lambda run: replace(run, **changed))


def _norms(shape: RunShape) -> Change:
    if shape.techniques.tiled_norms:
        return ()
    return (_technique({"tiled_norms": True}, "norms in tiles (same result)"),)


def _mlp(shape: RunShape) -> Change:
    """The fused MLP, then the same in tiles."""
    options = []
    if not shape.techniques.fused_mlp:
        options.append(_technique({"fused_mlp": True}, "fused MLP (same result)"))
    if (shape.techniques.mlp_tile_tokens or shape.seq_len) > _TILE_TOKENS:
        tiled = {"fused_mlp": True, "mlp_tile_tokens": _TILE_TOKENS}
        options.append(
            _technique(tiled, f"fused MLP, {_TILE_TOKENS} tokens at a time (same result)")
        )
    return tuple(options)


def _technique(values: dict[str, Any], what: str) -> Option:
    return Option(
        {f"train.{name}": str(value).lower() for name, value in values.items()},
        what,
        lambda run: replace(run, techniques=replace(run.techniques, **values)),
    )


def _paged(shape: RunShape) -> Change:
    kind = _PAGED.get(shape.optimizer)
    if kind is None:
        return ()
    return (_of_shape("train.optimizer", "paged optimizer states (same result)", optimizer=kind),)


def _eight_bit_states(shape: RunShape) -> Change:
    if "8bit" in shape.optimizer:
        return ()
    what = "8-bit, paged optimizer states"
    return (_of_shape("train.optimizer", what, optimizer="paged_adamw_8bit"),)


def _embeddings(shape: RunShape) -> Change:
    if shape.base.embeddings_on_host:
        return ()
    return (_of_base("token embeddings in host memory (same result)", embeddings_on_host=True),)


def _head_on_host(shape: RunShape) -> Change:
    """One tied to the token embeddings can only be there with them."""
    base = shape.base
    if base.head_on_host or base.head_bits != 16:
        return ()
    alone = _of_base("output head in host memory (same result)", head_on_host=True)
    if base.embeddings_on_host:
        return (alone,)
    what = "output head and token embeddings in host memory (same result)"
    return (alone, _of_base(what, head_on_host=True, embeddings_on_host=True))


def _smaller_head(shape: RunShape, *, on_cpu: bool) -> Change:
    """On the device for good; one tied to the token embeddings only where those are on the host."""
    fewer = [bits for bits in (8, 4) if bits < shape.base.head_bits]
    here = {} if on_cpu else {"head_on_host": False}  # a lossless change may have put it there
    options = [_of_base(f"{bits}-bit output head", head_bits=bits, **here) for bits in fewer]
    if not on_cpu:
        options += [
            _of_base(
                f"{bits}-bit output head, token embeddings in host memory",
                head_bits=bits,
                embeddings_on_host=True,
                **here,
            )
            for bits in fewer
        ]
    return tuple(options)


def _streamed(shape: RunShape) -> Change:
    """Never beside kept activations: a layer's weights have gone when its backward comes."""
    if shape.base.stream_layers or shape.base.layer_parts > 1:
        return ()
    what = "layers in host memory, one on the card at a time (same result, much slower)"
    if shape.activations != "keep":
        return (_of_base(what, stream_layers=True),)
    return tuple(_streamed_with(what, activations) for activations in ("recompute", "offload"))


def _streamed_with(what: str, activations: Activation) -> Option:
    overrides = {"model.stream_layers": "true", "train.activations": activations}
    return Option(
        overrides,
        what,
        lambda run: replace(
            run, base=replace(run.base, stream_layers=True), activations=activations
        ),
    )


def _of_base(what: str, **values: Any) -> Option:
    return Option(
        {f"model.{name}": str(value).lower() for name, value in values.items()},
        what,
        lambda run: replace(run, base=replace(run.base, **values)),
    )
