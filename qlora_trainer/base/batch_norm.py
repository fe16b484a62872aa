"""Batch norms of a frozen base keep the statistics it was trained with.

In training mode a batch norm would use the statistics of the batch at hand and move its running
ones: the base would change without any parameter being trained, micro-batch size would change the
result, and the merged model would not be the trained one. So they evaluate, whatever the mode.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Frozen(_BatchNorm):
    def train(self, mode: bool = True) -> "_Frozen":
        """Stay in evaluation."""
        super().train(False)
        return self


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that always evaluates."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that always evaluates."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that always evaluates."""


_FROZEN: dict[type, type[_Frozen]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
}


def freeze_batch_norms(model: nn.Module) -> list[str]:
    """Put a batch norm that always evaluates in the place of each that has statistics.

    Parameters, buffers and their names are the same ones, so files see nothing of it.

    Returns:
        Their paths.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) in _FROZEN and getattr(module, "running_mean", None) is not None
    ]
    for path, module in found:
        frozen = _FROZEN[type(module)].__new__(_FROZEN[type(module)])
        frozen.__dict__.update(module.__dict__)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, frozen.train(False))
    return [path for path, _ in found]
