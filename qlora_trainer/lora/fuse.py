"""Replacing the gated MLPs of a model instance by one that runs as a single function.

Only layouts that were read and are tested are replaced, by the name of the transformers class:
anything else keeps its own forward, and the caller is told which. The projections stay modules
under their names, so adapter files, the audit and the merge see the model they know.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_trainer.lora.gated_mlp import GatedMLP, activate, gated_mlp
from qlora_trainer.lora.kind import is_plain_linear, kind_of
from qlora_trainer.lora.layer import LowRankLayer
from qlora_trainer.lora.projections import Projection
from qlora_trainer.lora.trained import set_module

_SEPARATE = ("gate_proj", "up_proj", "down_proj")
_JOINED = ("gate_up_proj", "down_proj")
# transformers class -> its projections and its activation; forward is down(f(gate) * up) in all
LAYOUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "LlamaMLP": (_SEPARATE, "act_fn"),
    "MistralMLP": (_SEPARATE, "act_fn"),
    "Qwen2MLP": (_SEPARATE, "act_fn"),
    "Qwen3MLP": (_SEPARATE, "act_fn"),
    "GemmaMLP": (_SEPARATE, "act_fn"),
    "Gemma2MLP": (_SEPARATE, "act_fn"),
    "Gemma3MLP": (_SEPARATE, "act_fn"),
    "SmolLM3MLP": (_SEPARATE, "act_fn"),
    "Phi3MLP": (_JOINED, "activation_fn"),
}
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Replaced:
    """What a technique was put on.

    Attributes:
        modules: Paths of the replaced modules.
        kept: Path -> why its own forward stays.
    """

    modules: tuple[str, ...]
    kept: dict[str, str]


class FusedGatedMLP(nn.Module):
    """A gated MLP in one autograd function; see `gated_mlp`.

    Args:
        plain: The module it takes the place of.
        names: Of its projections: gate, up, down; or gate and up in one, down.
        activation: One of `gated_mlp.ACTIVATIONS`.
        tile_tokens: Tokens at one time; None takes all.

    Attributes:
        keeps_inner: Keep what gate and up give for the backward, where the layer lets it.
        is_recomputed: Whether the layer computes its activations again: then keeping would only
            compute more.
    """

    def __init__(
        self, plain: nn.Module, names: tuple[str, ...], activation: str, tile_tokens: int | None
    ) -> None:
        super().__init__()
        self.names, self.activation, self.tile_tokens = names, activation, tile_tokens
        self.keeps_inner = self.is_recomputed = False
        for name in names:
            self.add_module(name, getattr(plain, name))
        self.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in the dtype of x."""
        if not self.training and not torch.is_grad_enabled():
            return self._evaluated(x)
        projections = tuple(Projection.of(getattr(self, name)) for name in self.names)
        # A 4-bit base says what it computes in, as in `LowRankLayer`.
        computed = x.to(getattr(projections[0].base, "compute_dtype", x.dtype))
        keeps = self.keeps_inner and not self.is_recomputed
        mlp = GatedMLP(projections, self.activation, self.tile_tokens, keeps)
        return gated_mlp(computed, mlp).to(x.dtype)

    def _evaluated(self, x: Tensor) -> Tensor:
        """Without gradients the modules' own forward: it may know a kernel for few rows."""
        rows = x.reshape(-1, x.shape[-1])
        spans = GatedMLP((), self.activation, self.tile_tokens).spans(rows.shape[0])
        if len(spans) == 1:
            return self._plain(x)
        y = torch.empty_like(rows)
        for first, last in spans:
            y[first:last] = self._plain(rows[first:last])
        return y.view(x.shape)

    def _plain(self, x: Tensor) -> Tensor:
        *into, down = (getattr(self, name) for name in self.names)
        z, u = (into[0](x).chunk(2, dim=-1)) if len(into) == 1 else (into[0](x), into[1](x))
        h: Tensor = down(activate(self.activation, z).mul_(u))
        return h

    def extra_repr(self) -> str:
        """Activation and tile, for `print(model)`."""
        return f"activation={self.activation}, tile_tokens={self.tile_tokens}"


def fuse_mlps(
    model: nn.Module, tile_tokens: int | None = None, *, keeps_inner: bool = False
) -> Replaced:
    """Replace every gated MLP we know by the fused one; call it again to change how it runs.

    Args:
        model: Adapters already on it.
        tile_tokens: Tokens at one time; None takes all.
        keeps_inner: Keep what gate and up give, in layers that are not computed again.
    """
    replaced: list[str] = []
    kept: dict[str, str] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, FusedGatedMLP):
            module.tile_tokens, module.keeps_inner = tile_tokens, keeps_inner
            replaced.append(path)
            continue
        kind = type(module).__name__
        if not kind.endswith("MLP"):
            continue
        reason = _why_not(module)
        if reason is not None:
            kept[path] = reason
            continue
        names, holder = LAYOUTS[kind]
        activation = _ACTIVATIONS[type(getattr(module, holder)).__name__]
        fused = FusedGatedMLP(module, names, activation, tile_tokens)
        fused.keeps_inner = keeps_inner
        set_module(model, path, fused)
        replaced.append(path)
    return Replaced(tuple(replaced), kept)


def _why_not(module: nn.Module) -> str | None:
    """Why a module cannot be replaced; None where it can."""
    reason = why_not_layout(module, LAYOUTS)
    if reason is not None:
        return reason
    names, holder = LAYOUTS[type(module).__name__]
    activation = type(getattr(module, holder)).__name__
    if activation not in _ACTIVATIONS:
        return f"its activation {activation} is none we know"
    reason = why_not_projections(module, names)
    if reason is not None:
        return reason
    first, last = getattr(module, names[0]), getattr(module, names[-1])
    if first.in_features != last.out_features:
        return "its output is not as wide as its input"
    return None


def why_not_layout(module: nn.Module, layouts: Container[str]) -> str | None:
    """Why a module is none of these classes of transformers; None where it is."""
    kind = type(module).__name__
    if kind not in layouts or not type(module).__module__.startswith("transformers.models."):
        return f"{kind} is no layout we know"
    return None


def why_not_projections(module: nn.Module, names: Iterable[str]) -> str | None:
    """Why a function of ours cannot compute these parts of `module`; None where it can."""
    for name in names:
        part = getattr(module, name)
        base = part.base if isinstance(part, LowRankLayer) else part
        if isinstance(part, LowRankLayer) and not part.fused:
            return f"{name} carries an adapter that is no plain linear map"
        if kind_of(base) is None or not is_plain_linear(base):
            return f"{name} is a {type(base).__name__}"
        if any(parameter.requires_grad for parameter in base.parameters()):
            return f"{name} is itself trained"
    return None
