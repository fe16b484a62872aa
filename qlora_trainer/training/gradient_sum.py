"""Gradients added up over the processes of a run: once an optimizer step, in fp32, by buckets.

Each process has summed its own share of the window; the shares are added in one buffer of bounded
size that is filled, summed over the processes and emptied again. A parameter that no process
reached keeps no gradient, as with one process.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qlora_trainer.training.processes import Processes

BUCKET_BYTES = 64 * 2**20  # or one larger tensor; enough for the link, little beside a base


class GradientSum:
    """A sum about to be made; its buffer is there, so nothing can fail for want of it.

    Args:
        parameters: What is trained, in the same order everywhere.
        processes: Those of the run.
        device: Where the gradients are.
        bucket_bytes: Of the buffer at most, unless one tensor alone is larger.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        processes: Processes,
        device: torch.device,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._parameters, self._processes = list(parameters), processes
        self._buckets = list(_buckets(self._parameters, bucket_bytes))
        most = max(sum(p.numel() for p in bucket) for bucket in self._buckets)
        self._room = torch.empty(most, dtype=torch.float32, device=device)

    @torch.no_grad()
    def over(self, loss: Tensor) -> Tensor:
        """Put the sums in the gradients' places.

        Args:
            loss: This process' share of the window's, a scalar.

        Returns:
            The window's.
        """
        processes = self._processes
        untouched = [i for i, p in enumerate(self._parameters) if p.grad is None]
        nobodys = set.intersection(*(set(found) for found in processes.gather(untouched)))
        skipped = {id(self._parameters[index]) for index in nobodys}
        total = loss.reshape(1).clone()
        processes.add_up(total)
        for bucket in self._buckets:
            self._sum([p for p in bucket if id(p) not in skipped])
        return total[0]

    def _sum(self, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            return
        sizes = [p.numel() for p in parameters]
        room = self._room[: sum(sizes)]
        for p, piece in zip(parameters, room.split(sizes), strict=True):
            if p.grad is None:
                piece.zero_()
            else:
                piece.copy_(p.grad.reshape(-1))
        self._processes.add_up(room)
        for p, piece in zip(parameters, room.split(sizes), strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(piece.view_as(p))


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours that fit one buffer together."""
    bucket: list[nn.Parameter] = []
    taken_bytes = 0
    for p in parameters:
        size = 4 * p.numel()
        if bucket and taken_bytes + size > bucket_bytes:
            yield bucket
            bucket, taken_bytes = [], 0
        bucket.append(p)
        taken_bytes += size
    if bucket:
        yield bucket
