"""The cards people own: what `profiles/gpus/*.json` says of them, and the card of this machine.

The context size (CUDA's own memory, kernels, libraries) lies outside torch's allocator and differs
by driver; it is an assumption and is printed apart.
"""

import difflib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qlora_trainer.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
MIB = 2**20
# What a card should have left. Reserved memory was foreseen 3.55 % too small at worst (README);
# kernels loaded late, cuBLAS' own memory and the desktop want the same bytes.
SPARE_SHARE = 0.05
_LEAST_SPARE_BYTES = 3 * 2**30 // 10


@dataclass(frozen=True)
class Gpu:
    """What the rules must know of a card."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int

    @property
    def capability(self) -> int:
        """As in `sm_86`: 86."""
        return 10 * self.compute_capability[0] + self.compute_capability[1]


@dataclass(frozen=True)
class GpuProfile:
    """One card.

    Attributes:
        key: What the command line calls it, such as `rtx-3060-12gb`.
        name: As people write it.
        memory_bytes: What the card reports as its total.
        usable_bytes: What one process can have on an otherwise idle card.
        context_bytes: CUDA context and loaded kernels.
        compute_capability: Major and minor.
        multiprocessors: SMs.
    """

    key: str
    name: str
    memory_bytes: int
    usable_bytes: int
    context_bytes: int
    compute_capability: tuple[int, int]
    multiprocessors: int

    @property
    def card(self) -> Gpu:
        """What the CUDA rules need of it."""
        return Gpu(self.name, self.compute_capability, self.multiprocessors)

    def to_json(self) -> dict[str, object]:
        """As the profile file has it."""
        return asdict(self) | {"compute_capability": list(self.compute_capability)}


def profiles_folder(part: str) -> Path:
    """Where `gpus` or `models` are: in the installed package, else at the repository's top."""
    installed = _PACKAGE / "profiles" / part
    return installed if installed.is_dir() else _PACKAGE.parent / "profiles" / part


def gpu_keys() -> list[str]:
    """Names of all cards with a profile."""
    return sorted(path.stem for path in profiles_folder("gpus").glob("*.json"))


def read_gpu(key: str) -> GpuProfile:
    """The profile of a card.

    Raises:
        UserError: No such card.
    """
    file = profiles_folder("gpus") / f"{key}.json"
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        values["compute_capability"] = tuple(values["compute_capability"])
        return GpuProfile(**values)
    keys = gpu_keys()
    near = difflib.get_close_matches(key.lower(), keys, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    known = ", ".join(keys) or "none installed"
    raise UserError(f"--gpu {key}: no profile of that name; {meant}known cards: {known}")


def plannable_bytes(free_bytes: int) -> int:
    """What of a card's free memory may be planned into where there is a choice.

    A plan of a size that nobody asked for shall not be the reason of running out; whether a run
    fits is still asked of all that is free.

    >>> plannable_bytes(10 * 2**30) / 2**30
    9.5
    """
    spare = max(math.ceil(SPARE_SHARE * free_bytes), _LEAST_SPARE_BYTES)
    return max(0, free_bytes - spare)


def gpu_of_this_machine(device: torch.device) -> tuple[GpuProfile, int] | None:
    """The card at hand and the bytes of it that are free now; None without one."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    # asking made this process' context, which is therefore no longer among what is free
    return GpuProfile(
        key="this-machine",
        name=properties.name,
        memory_bytes=total,
        usable_bytes=total,
        context_bytes=0,
        compute_capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
    ), free
