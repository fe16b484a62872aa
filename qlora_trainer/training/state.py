"""Saved state: all that a run needs to go on as if it had never stopped, whole or not there.

`states/step-00000100/` holds `adapter.safetensors` (the trained tensors, exactly),
`optimizer.safetensors` (states and the low halves of bf16 values), `trainer.json` (step, best
metric, loss scale, ...) and `manifest.json` (bytes and SHA-256 of each). Written beside its place,
forced to disk, renamed; older states go only after the new one stands. Random states and data
order need no saving: both are pure functions of seed and step. No pickle.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.base.checksums import sha256_of_file
from qlora_trainer.base.files import replace_folder
from qlora_trainer.errors import UserError
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.processes import Processes

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d+)\..*\.(tmp|old)")
_FILES = ("adapter.safetensors", "optimizer.safetensors", "trainer.json")


@dataclass(frozen=True)
class SavedState:
    """A state read back, on the CPU.

    Attributes:
        folder: Where it stood.
        step: Applied steps.
        parameters: Trained tensors by name.
        optimizer_tensors: As `AdapterAdamW.state` gave them.
        trainer: The loop's own values, and `optimizer` for the optimizer's.
        passed_over: Newer states that are damaged.
    """

    folder: Path
    step: int
    parameters: dict[str, Tensor]
    optimizer_tensors: dict[str, Tensor]
    trainer: dict[str, Any]
    passed_over: tuple[Path, ...] = ()


def save_state(
    states: Path,
    step: int,
    *,
    optimizer: AdapterAdamW,
    trainer: Mapping[str, Any],
    keep_last: int,
    damaged: Sequence[Path] = (),
) -> Path:
    """Write a state, then remove all but the newest `keep_last` whole ones.

    Args:
        states: Folder of all states.
        step: Applied steps.
        optimizer: Holds parameters and states.
        trainer: The loop's values; must be JSON.
        keep_last: States kept, this one included.
        damaged: States that were passed over on resuming: they go, and take no whole one's place.

    Returns:
        The state's folder.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    values = optimizer.state()[1]
    content = {**trainer, "format_version": FORMAT_VERSION, "step": step, "optimizer": values}

    def fill(folder: Path) -> None:
        for name, tensors in held_tensors(optimizer).items():
            save_file(on_host(tensors), folder / name)
        (folder / _FILES[2]).write_text(json.dumps(content, indent=1), encoding="utf-8")
        manifest = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
            for name in _FILES
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    target = states / f"step-{step:08d}"
    try:
        replace_folder(target, fill)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target}: the state cannot be saved ({error}); earlier states are untouched. Make "
            "room or mend the folder, then run the same command again"
        ) from error
    # Anything newer is a damaged state, too.
    lost = set(damaged) - {target}
    older = [folder for number, folder in _listed(states) if number <= step and folder not in lost]
    kept = older[:keep_last]
    for _, folder in _listed(states):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def held_tensors(optimizer: AdapterAdamW) -> dict[str, dict[str, Tensor]]:
    """What a state's files of tensors are made of: file -> name -> tensor where it is held."""
    parameters = {name: p.detach() for name, p in optimizer.parameters.items()}
    return {_FILES[0]: parameters, _FILES[1]: optimizer.state()[0]}


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of one file's tensors on the host, one by one; nothing more on the card."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def newest_good_state(states: Path, say: Callable[[str], None]) -> SavedState | None:
    """Read the newest state that is whole; say which were passed over and why.

    Leftovers of interrupted writes are removed.

    Raises:
        UserError: States are there but none is whole, or a newer version of us wrote them.
    """
    if not states.is_dir():
        return None
    for entry in list(states.iterdir()):
        if match := _LEFTOVER.fullmatch(entry.name):
            whole = states / match.group(1)
            if match.group(2) == "old" and not whole.exists():
                entry.rename(whole)  # set aside to be replaced, and never was
            else:
                shutil.rmtree(entry, ignore_errors=True)
    broken: dict[Path, str] = {}
    for step, folder in _listed(states):
        try:
            saved = _read(folder, step)
        except (
            OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError,
        ) as error:  # fmt: skip
            broken[folder] = f"{folder}: {error}"
            continue
        for line in broken.values():
            say(f"saved state passed over, it is damaged: {line}")
        if broken:
            say(f"resuming from the newest whole one, {folder.name}")
        return replace(saved, passed_over=tuple(broken))
    if broken:
        raise UserError.from_faults(
            "no saved state is whole; pass --restart to begin again, or restore one",
            list(broken.values()),
        )
    return None


def _listed(states: Path) -> list[tuple[int, Path]]:
    """Steps and folders, newest first."""
    found = [(_NAME.fullmatch(entry.name), entry) for entry in states.iterdir() if entry.is_dir()]
    steps = [(int(match.group(1)), entry) for match, entry in found if match]
    return sorted(steps, reverse=True)


def _read(folder: Path, step: int) -> SavedState:
    """Read one state whole.

    Raises:
        ValueError: A file is missing, torn or altered (OSError and others for what cannot be read).
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name in _FILES:
        path, expected = folder / name, manifest[name]
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        if sha256_of_file(path) != expected["sha256"]:
            raise ValueError(f"{name} is not what was written (SHA-256 differs)")
    trainer = json.loads((folder / _FILES[2]).read_text(encoding="utf-8"))
    if trainer["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{folder}: written by a newer version of qlora_trainer (state format "
            f"{trainer['format_version']}, known: {FORMAT_VERSION}); update the package"
        )
    if trainer["step"] != step:
        raise ValueError(f"it says step {trainer['step']}")
    # On the CPU first: the card holds the run's own tensors and takes the values one by one.
    return SavedState(
        folder, step, load_file(folder / _FILES[0]), load_file(folder / _FILES[1]), trainer
    )


@torch.no_grad()
def restore(saved: SavedState, optimizer: AdapterAdamW) -> None:
    """Copy a state into the run's parameters and optimizer.

    Raises:
        UserError: Names, shapes or dtypes differ; lists every fault.
    """
    faults = []
    ours = optimizer.parameters
    faults += [f"{n}: not in the saved state" for n in sorted(ours.keys() - saved.parameters)]
    faults += [f"{n}: not trained by this run" for n in sorted(saved.parameters.keys() - ours)]
    for name in sorted(ours.keys() & saved.parameters.keys()):
        p, value = ours[name], saved.parameters[name]
        if (p.shape, p.dtype) != (value.shape, value.dtype):
            faults.append(
                f"{name}: saved {tuple(value.shape)} {value.dtype}, here {tuple(p.shape)} {p.dtype}"
            )
    if faults:
        raise UserError.from_faults(f"{saved.folder} does not fit this run's adapters", faults)
    optimizer.load(saved.optimizer_tensors, saved.trainer["optimizer"])
    for name, p in ours.items():
        p.copy_(saved.parameters[name])


def start_alike(
    processes: Processes, optimizer: AdapterAdamW, trainer: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Give all processes the main one's parameters and optimizer, and the loop's values it read.

    Args:
        processes: Those of the run; one alone has all of it.
        optimizer: Holds parameters and states.
        trainer: Of the state that the main process has restored, if there was one.
    """
    if processes.count == 1:
        return trainer
    found: dict[str, Any] | None = processes.from_main(trainer)
    for tensors in held_tensors(optimizer).values():
        for tensor in tensors.values():
            processes.take_from_main(tensor)
    if found is not None:
        optimizer.steps = {name: int(found["optimizer"]["steps"][name]) for name in optimizer.steps}
    return found
