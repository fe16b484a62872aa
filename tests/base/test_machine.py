"""What is said of this machine, also where its driver, its torch and its GPU do not go together."""

from pathlib import Path

import pytest
import torch

from qlora_trainer.base.machine import choose_device, diagnose, unused_gpu, windows_driver

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")


@needs_no_gpu
def test_a_card_whose_driver_is_too_old_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's library counts it; whoever asks more of it gets an exception from torch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto") == CPU
    for asked in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match="qlora doctor"):
            choose_device(asked)


@needs_no_gpu
def test_a_gpu_that_torch_leaves_alone_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unused_gpu(CPU) is None
    tool = tmp_path / "nvidia-smi"
    tool.touch(mode=0o755)
    assert unused_gpu(CPU) in (
        f"torch {torch.__version__} is a CPU build",
        "torch finds no usable GPU",
    )
    assert unused_gpu(torch.device("cuda", 0)) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert unused_gpu(CPU) is None


def test_a_card_that_gives_no_memory_is_a_finding_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore")

    monkeypatch.setattr(torch, "linspace", refuse)
    found = {finding.topic: finding for finding in diagnose(tmp_path)}
    assert found["nf4"].level == "bad"
    assert "out of memory" in found["nf4"].state
    assert "more" not in found["nf4"].state
    assert "another program" in found["nf4"].advice


@pytest.mark.parametrize(
    ("system", "release", "windows"),
    [
        ("win32", "11", True),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", True),
        ("linux", "4.4.0-19041-Microsoft", True),
        ("linux", "6.6.30-custom-WSL2", True),
        ("linux", "6.8.0-45-generic", False),
        ("linux", "6.8.0-1015-azure", False),
        ("darwin", "23.6.0", False),
    ],
)
def test_windows_has_the_cards_of_wsl_as_well(system: str, release: str, windows: bool) -> None:
    assert windows_driver(system, release) is windows
