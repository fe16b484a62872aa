"""What this machine is and can do: devices, memory, disk and the versions a run depends on.

`qlora doctor` shows it with advice, every run folder records it. Nothing here needs a GPU, and
nothing asks the network.
"""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import bitsandbytes
import psutil
import torch

from qlora_trainer.base.dtype import NATIVE_BF16_CAPABILITY, cpu_multiplies_bf16
from qlora_trainer.errors import first_line
from qlora_trainer.units import format_bytes

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "datasets")


@dataclass(frozen=True)
class Finding:
    """One line of `qlora doctor`."""

    topic: str
    state: str
    level: str  # "good", "note" or "bad"
    advice: str = ""


def versions() -> dict[str, str]:
    """Versions of Python, the system, this package and what its numbers depend on."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "qlora-trainer": metadata.version("qlora-trainer"),
        **found,
        "cuda": torch.version.cuda or "none",
    }


def choose_device(requested: str, number: int = 0) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Args:
        requested: As in the run file.
        number: The GPU that `auto` and `cuda` mean; of several processes each has its own.

    Raises:
        ValueError: A GPU is asked for and torch finds none, or none of that number.
    """
    # A driver too old for this build is counted all the same, and fails whoever asks it more.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        return torch.device("cuda", number) if gpus else torch.device("cpu")
    device = torch.device(requested)
    if device.type != "cuda":
        return device
    index = number if device.index is None else device.index
    if index >= gpus:
        raise ValueError(f"torch finds {gpus} GPUs; `qlora doctor` says why")
    return torch.device("cuda", index)


def unused_gpu(device: torch.device) -> str | None:
    """Why torch leaves a GPU alone that this machine seems to have; None where nothing is amiss.

    Args:
        device: What `auto` came to.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    if device.type != "cpu" or hidden or not driver:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build"
    return "torch finds no usable GPU"


def windows_driver(system: str = sys.platform, release: str | None = None) -> bool:
    """Whether Windows' display driver has the cards: on Windows, and on WSL, which says `linux`.

    It cannot oversubscribe managed memory, so what is paged stands on the card
    (microsoft/WSL#7198), and it may spill into RAM without a word (microsoft/WSL#11050).

    Args:
        system: As `sys.platform` says it.
        release: Of the kernel; None asks for this machine's. WSL's own kernel says `microsoft` (in
            a container too), those people build for it say `WSL2`.
    """
    kernel = (platform.release() if release is None else release).lower()
    return system == "win32" or (system == "linux" and ("microsoft" in kernel or "wsl2" in kernel))


def host_memory_bytes() -> tuple[int, int]:
    """Host RAM as (total, available now), in bytes."""
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds the folder, or its nearest existing parent."""
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    return shutil.disk_usage(existing).free


def diagnose(folder: Path) -> list[Finding]:
    """Look at all a run needs of this machine.

    Args:
        folder: Where runs are going to be written.
    """
    findings = [_python(), *_gpus(), _cpu(), _nf4_works(), *_host(folder)]
    for name, version in versions().items():
        if name in _PACKAGES:
            findings.append(Finding(name, version, "good"))
    return findings


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()} on {platform.system()}", "good")


def _gpus() -> list[Finding]:
    if torch.version.cuda is None and torch.version.hip is None:
        state = f"torch {torch.__version__} is a CPU build"
        return [Finding("gpu", state, "note", "fine for small models; for a GPU install a CUDA "
                        "build of torch as its site tells for your driver")]  # fmt: skip
    if not torch.cuda.is_available():
        return [Finding("gpu", "torch has CUDA but finds no usable GPU", "bad",
                        "run `nvidia-smi`; install or update the driver, and see that "
                        "CUDA_VISIBLE_DEVICES does not hide the card")]  # fmt: skip
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    native = capability >= NATIVE_BF16_CAPABILITY
    state = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{format_bytes(free)} free of {format_bytes(total)}, {'bf16' if native else 'fp16'}"
    )
    busy = total - free > 0.1 * total
    advice = [
        "" if native else "bf16 is emulated on this card, so runs compute in fp16",
        "close what else uses the card" if busy else "",
        "the driver may spill into RAM silently: turn off sysmem fallback in the driver's panel "
        "(WSL may not heed it)"
        if windows_driver()
        else "",
    ]
    said = "; ".join(filter(None, advice))
    return Finding(f"gpu {index}", state, "note" if said else "good", said)


def _cpu() -> Finding:
    cores = f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores"
    if cpu_multiplies_bf16():
        return Finding("cpu", f"{cores}, bf16", "good")
    advice = "torch multiplies 16-bit numbers slowly on this CPU, so runs on it compute in fp32"
    return Finding("cpu", f"{cores}, fp32", "good", advice)


def _nf4_works() -> Finding:
    """Quantize a tensor and read it back, on the device a run would take."""
    device = choose_device("auto")
    try:
        weight = torch.linspace(-1, 1, 4096, device=device)
        codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        error = (bitsandbytes.functional.dequantize_4bit(codes, state) - weight).abs().max()
    except (RuntimeError, OSError, AttributeError) as failure:
        advice = "run `python -m bitsandbytes`; it tells which library is missing"
        if isinstance(failure, torch.OutOfMemoryError):
            advice = "another program fills the card; `nvidia-smi` names it"
        elif "no kernel image" in str(failure):
            advice = "install a build of torch with kernels for this card, as its site tells"
        return Finding("nf4", f"fails on {device}: {first_line(failure)}", "bad", advice)
    if not error < 0.2:
        state_text = f"values come back wrong by {float(error):.3f} on {device}"
        advice = "reinstall bitsandbytes for your CUDA version"
        return Finding("nf4", state_text, "bad", advice)
    return Finding("nf4", f"quantizes and reads back on {device}", "good")


def _host(folder: Path) -> list[Finding]:
    total, available = host_memory_bytes()
    disk = free_disk_bytes(folder)
    ram = f"{format_bytes(available)} available of {format_bytes(total)}"
    low_ram, low_disk = available < 4 * 2**30, disk < 20 * 2**30
    return [
        Finding("ram", ram, "note" if low_ram else "good",
                "loading a 7B base needs about 4.5 GiB on a CPU" if low_ram else ""),
        Finding("disk", f"{format_bytes(disk)} free at {folder}", "note" if low_disk else "good",
                "a merged 7B checkpoint needs 14 GiB" if low_disk else ""),
    ]  # fmt: skip
