"""An adapter's files set against the base they are for: every update finds its weight, or an error.

The base is a model without weights, so this costs nothing and happens first. What comes out says,
by the model's own names, which weight gets which low-rank product and which tensor is replaced
outright (modules trained in full, embeddings resized for new tokens).
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qlora_trainer.errors import UserError
from qlora_trainer.lora.files import PREFIX, read_adapter_config, read_tensors
from qlora_trainer.lora.inject import select_modules
from qlora_trainer.lora.kind import kind_of
from qlora_trainer.lora.merge import KindName
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.lora.trained import select_saved_modules


@dataclass(frozen=True)
class LowRank:
    """The update of one weight: `scale * B A`, in the layout of its kind.

    Attributes:
        lora_A: As in the adapter's file.
        lora_B: As in the adapter's file.
        scale: Factor of the product.
        kind: How the base module stores its weight.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    kind: KindName

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two float32 matrices whose product is the update, rows as the weight is stored.

        -> (rows, r) and (r, columns); a convolution's weight counts as (out, in * kh * kw). Any
        rows of the update are then the same rows of the first times the second.
        """
        a = self.lora_A.float().flatten(1)  # (r, in)
        b = self.lora_B.float().flatten(1) * self.scale  # (out, r)
        if self.kind in ("linear", "conv2d"):
            return b, a
        return a.t().contiguous(), b.t().contiguous()

    def norm(self) -> float:
        """Frobenius norm of the update, from the factors' Gram matrices, without building it."""
        left, right = (factor.double() for factor in self.factors())
        square = ((left.t() @ left) * (right @ right.t())).sum()
        return float(square.clamp(min=0).sqrt())


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter by the base's parameter names.

    Attributes:
        spec: What the adapter's configuration says.
        updates: Parameter name -> its low-rank update.
        replaced: Parameter (or buffer) name -> its new value.
        vocabulary: Rows of resized embeddings, or None.
    """

    spec: AdapterSpec
    updates: dict[str, LowRank]
    replaced: dict[str, Tensor]
    vocabulary: int | None = None


def fit_adapter(folder: Path, model: nn.Module) -> FittedAdapter:
    """Read an adapter folder, ours or PEFT's, for a base without weights.

    Raises:
        UserError: Files broken or unsupported, values not finite, or keys that are missing, left
            over or misshapen: the adapter is not of this base. All faults are listed.
    """
    spec = read_adapter_config(folder)
    found = dict(read_tensors(folder))
    faults: list[str] = []
    updates: dict[str, LowRank] = {}
    for name in select_modules(model, spec, strict=False):
        base = model.get_submodule(name)
        kind = kind_of(base)
        assert kind is not None
        factors: list[Tensor] = []
        shapes = kind.shapes(base, spec.rank_of(name))
        for suffix, shape in zip(kind.file_keys, shapes, strict=True):
            tensor = found.pop(f"{PREFIX}{name}.{suffix}", None)
            if tensor is None:
                faults.append(f"missing: {PREFIX}{name}.{suffix} {shape}")
            elif tuple(tensor.shape) != shape:
                faults.append(
                    f"misshapen: {PREFIX}{name}.{suffix} is {tuple(tensor.shape)}; the base and "
                    f"rank {spec.rank_of(name)} need {shape}"
                )
            else:
                factors.append(tensor)
        if len(factors) == 2:
            lora_A, lora_B = factors
            updates[f"{name}.weight"] = LowRank(lora_A, lora_B, spec.scaling(name), kind.name)
    state = model.state_dict()
    replaced: dict[str, Tensor] = {}
    for path in select_saved_modules(model, spec.modules_to_save, strict=False):
        for key, expected in model.get_submodule(path).state_dict().items():
            tensor = found.pop(f"{PREFIX}{path}.{key}", None)
            if tensor is None:
                faults.append(f"missing: {PREFIX}{path}.{key} {tuple(expected.shape)}")
            else:
                replaced[f"{path}.{key}"] = tensor
    repeated = _repeated_base_weights(found, state)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        # Not trained apart, so still tied: the file holds both, or one that stands for both.
        for name, partner in ((target, source), (source, target)):
            if name in repeated and partner not in replaced:
                repeated.setdefault(partner, repeated[name])
    replaced.update(repeated)
    faults += [f"left over: {key} {tuple(value.shape)}" for key, value in found.items()]
    vocabulary, misshapen = _resized(model, replaced, state)
    faults += misshapen
    if faults:
        raise UserError.from_faults(
            f"{folder}: this adapter does not fit the base; it was trained on another model, or "
            "its files do not belong together",
            faults,
        )
    return FittedAdapter(spec, updates, replaced, vocabulary)


def _repeated_base_weights(found: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take whole weights PEFT put in the file by itself (`save_embedding_layers`) out of `found`.

    Equal to the base's or not (resized embeddings), they are what PEFT would load.
    """
    repeated = {}
    for key in list(found):
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name in state:
            repeated[name] = found.pop(key)
    return repeated


def _resized(
    model: nn.Module, replaced: dict[str, Tensor], state: dict[str, Tensor]
) -> tuple[int | None, list[str]]:
    """Rows of resized embeddings, and what has another shape for any other reason."""
    tables = _vocabulary_tables(model)
    vocabulary: int | None = None
    faults = []
    for name, tensor in replaced.items():
        wanted, got = tuple(state[name].shape), tuple(tensor.shape)
        if got == wanted:
            continue
        resizable = name.rpartition(".")[0] in tables and got[1:] == wanted[1:]
        if resizable and vocabulary in (None, got[0]):
            vocabulary = got[0]
        else:
            faults.append(f"misshapen: {name} is {got}, the base's is {wanted}")
    return vocabulary, faults


def _vocabulary_tables(model: nn.Module) -> set[str]:
    """Paths of the input and output embeddings; none in models that do not read tokens."""
    tables = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        tables |= {name for name, owner in model.named_modules() if owner is module}
    return tables
