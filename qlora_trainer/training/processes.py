"""The processes of one run: which of them this is, and what they do together.

`torchrun` and `accelerate launch` start several. Each holds a base of its own and computes its
share of every window; what is not computing (writing, telling) the main one does alone. They meet
in two groups: torch's default one (NCCL between cards, gloo between CPUs) adds up gradients, and
one of gloo on the hosts carries short JSON messages. Before cards talk to each other, all have
answered on the host: there a process that has died is found at once (its connection is closed),
and one that is silent after `WAIT_SECONDS`; NCCL alone would wait.

What fails in one fails in all (`together`), so that nobody waits for who has left. Where they
share the layers of the base, whoever needs one says so (`meet`), and all gather it at that point of
their exchange: also those that wait there for something else. One process alone talks to nobody,
and nothing here changes what it does.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_trainer.errors import ToldElsewhereError, UserError
from qlora_trainer.training.messages import (
    HeardError,
    Message,
    PeerLostError,
    everyones,
    first_error,
)

WAIT_SECONDS = 1200.0  # for a process that does not answer; a silent host, a machine that hangs


@dataclass(frozen=True)
class Processes:
    """One process among those of a run.

    Attributes:
        rank: Its number; 0 is the main one, which writes and tells.
        count: How many there are.
        local_rank: Its number on this machine, and so of its card.
        local_count: How many share this machine.
        hosts: The group that carries messages; without one nobody is talked to, as foresight does.
        wait_seconds: How long an answer may take.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    hosts: Any = None
    wait_seconds: float = WAIT_SECONDS
    _joins: list[Callable[[int], None]] = field(default_factory=list, init=False, repr=False)

    @property
    def is_main(self) -> bool:
        """It writes and tells."""
        return self.rank == 0

    def share(self, number: int) -> range:
        """Which of so many this process does: dealt out in turn, like cards."""
        return range(self.rank, number, self.count)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process (JSON), by rank.

        Raises:
            UserError: One has failed, or is gone.
        """
        if self.hosts is None:
            return [value]
        return [message["value"] for message in self._exchange({"value": value})]

    def from_main(self, value: Any) -> Any:
        """The main process' value (JSON), on all of them.

        Raises:
            UserError: One has failed, or is gone.
        """
        return self.gather(value if self.is_main else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when all have come through it; what fails in one fails in all.

        Raises:
            torch.OutOfMemoryError: Memory did not suffice in one of them.
            UserError: One has failed otherwise, or is gone.
        """
        if self.hosts is None:
            yield
            return
        try:
            yield
        except PeerLostError:
            raise
        except HeardError as heard:
            raise heard.error from heard
        except Exception as error:
            instead = self._tell(error)
            if instead is not None:
                raise instead from error
            raise
        self.gather(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process of every machine goes through the block first, however long it takes.

        What it downloads or stores is there for the others, who come after it.
        """
        if self.hosts is None:
            yield
            return
        if self.local_rank:
            self.gather(None)
            yield
            return
        with self.busy():
            yield
        self.gather(None)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Within, others may wait longer than an answer may take: they are told that we live."""
        if self.hosts is None:
            yield
            return
        done, lost = threading.Event(), list[Exception]()

        def answer() -> None:
            try:
                while not done.wait(self.wait_seconds / 4):
                    self._exchange({"busy": True})
            except (UserError, torch.OutOfMemoryError) as error:
                # the block is not to be cut short by it
                lost.append(error)

        thread = threading.Thread(target=answer, name="busy", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if lost:
            raise lost[0]

    def serve(self, join: Callable[[int], None]) -> None:
        """Call `join` with its number whenever another process gathers a layer.

        It takes the place of the one before: one model is trained at a time.
        """
        self._joins[:] = [join]

    def meet(self, layer: int) -> None:
        """Return when all are about to gather this layer; take part in others until then.

        Raises:
            UserError: One is gone. What has failed in one is raised where `together` ends.
        """
        if self.hosts is None:
            return
        try:
            self._exchange({"layer": layer})
        except PeerLostError:
            raise
        except (UserError, torch.OutOfMemoryError) as error:
            raise HeardError(error) from error

    def add_up(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place; all must have answered just before."""
        if self.hosts is not None:
            with self.linked():
                dist.all_reduce(tensor)

    def take_from_main(self, tensor: Tensor) -> None:
        """Copy the main process' tensor into everyone's, bit for bit."""
        if self.hosts is None:
            return
        # NCCL knows neither int16 nor managed memory: bytes, in a tensor of their own. Nor does it
        # know the CPU, whose tensors paged states are to torch, wherever their pages lie.
        copy = tensor.detach().reshape(-1).clone()
        group = self.hosts if copy.device.type == "cpu" else None
        with self.linked():
            dist.broadcast(copy.view(torch.uint8), 0, group=group)
        tensor.detach().copy_(copy.view(tensor.shape))

    def require_same(self, facts: dict[str, Any]) -> None:
        """See that all processes have the same facts (JSON) before them.

        Raises:
            UserError: Names every fact that differs from the main process'.
        """
        found = self.gather(facts)
        faults = [
            f"process {rank}: {name} is {theirs.get(name)!r}, in process 0 {value!r}"
            for rank, theirs in enumerate(found)
            for name, value in found[0].items()
            if theirs.get(name) != value
        ]
        if faults:
            title = "the processes of this run do not have the same before them"
            raise self._told(UserError.from_faults(title, faults))

    def _tell(self, error: Exception) -> Exception | None:
        """Tell the others what has failed here; -> what is to be raised in its place, if anything.

        What all have is told to the user by the main process; a defect of ours keeps its traceback.
        """
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        known = out_of_memory or isinstance(error, UserError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        try:
            found = self._exchange({"error": "memory" if out_of_memory else "fault", "said": said})
        except PeerLostError:
            return None
        if out_of_memory:
            graver = first_error(found, "fault")
            return None if graver is None else self._told(UserError(graver))
        return self._told(error) if isinstance(error, UserError) else None

    def _told(self, error: UserError) -> UserError:
        """An error that all have: the main process tells it."""
        return error if self.is_main else ToldElsewhereError(str(error))

    def _raise_for(self, found: Sequence[Message]) -> None:
        fault, memory = first_error(found, "fault"), first_error(found, "memory")
        if fault is not None:
            raise self._told(UserError(fault))
        if memory is not None:
            raise torch.OutOfMemoryError(memory)

    def _exchange(self, message: Message) -> list[Message]:
        """Everyone's message, by rank; rounds go on while one is busy or asks for a layer.

        Who asks has its answer when that layer's turn has come, the lowest rank's first.

        Raises:
            UserError: One has failed (unless this process tells of its own failure), or is gone.
            torch.OutOfMemoryError: One is out of memory, likewise.
        """
        while True:
            found = self._round(message)
            if "error" in message:
                return found
            self._raise_for(found)
            if "busy" in message:
                return found
            if any("busy" in answer for answer in found):
                continue
            asked = next((answer["layer"] for answer in found if "layer" in answer), None)
            if asked is None or asked == message.get("layer"):
                return found
            self._joins[0](asked)

    def _round(self, message: Message) -> list[Message]:
        with self.linked():
            return everyones(message, self.count, self.hosts)

    @contextmanager
    def linked(self) -> Iterator[None]:
        """Within, tell a link that breaks as a process that is gone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise PeerLostError(
                f"process {self.rank} of {self.count}: another process of this run is gone, or "
                f"has not answered for {self.wait_seconds:g} s ({first}). What it said last tells "
                "why; the same command goes on from the last saved state"
            ) from error


ALONE = Processes()
