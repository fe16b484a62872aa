"""Whatever is wrong with base, adapter, values or disk: a clear error, no output, no harm done."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import UserError
from qlora_trainer.export.export import export_merged
from qlora_trainer.export.folder import building
from qlora_trainer.export.source import ExportSource
from tests.export import tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def source(bench, tmp_path) -> ExportSource:
    """A source of its own, which a test may damage."""
    made = bench.source()
    shutil.copytree(made.base_folder, tmp_path / "base")
    shutil.copytree(made.adapter_folder, tmp_path / "adapter")
    return replace(made, base_folder=tmp_path / "base", adapter_folder=tmp_path / "adapter")


def fingerprint(*folders: Path) -> dict[str, str]:
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def assert_refused(source: ExportSource, out: Path, match: str, *, dtype: str = "bf16") -> None:
    before = fingerprint(source.base_folder, source.adapter_folder)
    with pytest.raises(UserError, match=match):
        export_merged(source, out, dtype=dtype, onto="original", proof=None)
    assert not out.exists()
    assert not [entry for entry in out.parent.iterdir() if entry.name.startswith(".")]
    assert fingerprint(source.base_folder, source.adapter_folder) == before


def change_adapter(source: ExportSource, change) -> None:
    tensors = load_file(source.adapter_folder / WEIGHTS)
    change(tensors)
    save_file(tensors, source.adapter_folder / WEIGHTS, metadata={"format": "pt"})


def test_truncated_base_shard_is_named(source, tmp_path):
    shard = source.base_folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(source, tmp_path / "out", "model.safetensors has")


def test_corrupt_adapter_is_named(source, tmp_path):
    (source.adapter_folder / WEIGHTS).write_bytes(b"\xff" * 500)
    assert_refused(source, tmp_path / "out", "not a whole safetensors file")


def test_adapter_of_another_base_is_refused_with_every_misfit(bench, source, tmp_path):
    other = bench.base("gpt2")
    adapter = bench.adapter(other, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    assert_refused(replace(source, adapter_folder=adapter), tmp_path / "out", "c_attn|no module")


def test_wrong_rank_is_refused_by_name(source, tmp_path):
    config = source.adapter_folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    assert_refused(source, tmp_path / "out", r"misshapen: .*q_proj.lora_A.weight is \(4, 64\)")


def test_missing_and_left_over_keys_are_all_listed(source, tmp_path):
    def change(tensors):
        key = next(key for key in tensors if "q_proj.lora_B" in key)
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight"] = tensors.pop(key)

    change_adapter(source, change)
    assert_refused(source, tmp_path / "out", r"(?s)missing: .*left over: .*layers\.9")


def test_nan_in_the_adapter_is_named(source, tmp_path):
    def change(tensors):
        tensors[next(key for key in tensors if "v_proj.lora_A" in key)][0, 0] = float("nan")

    change_adapter(source, change)
    assert_refused(source, tmp_path / "out", r"v_proj.*NaN")


def test_nan_in_the_base_is_named(source, tmp_path):
    path = source.base_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    assert_refused(source, tmp_path / "out", "model.norm.weight: 1 values are NaN or infinite")


def test_value_beyond_fp16_names_tensor_count_and_largest_value(source, tmp_path):
    path = source.base_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][5, 6] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    match = r"(?s)bf16 has fp32's range.*up_proj.weight: 1 values beyond 65504.*largest is 999424"
    assert_refused(source, tmp_path / "out", match, dtype="fp16")


def test_untrained_adapter_is_refused_since_it_changes_nothing(source, tmp_path):
    def change(tensors):
        for key in tensors:
            if "lora_B" in key:
                tensors[key].zero_()

    change_adapter(source, change)
    assert_refused(source, tmp_path / "out", "the merge changed nothing")


def test_existing_folder_is_overwritten_only_when_asked(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        export_merged(source, out, dtype="bf16", onto="original", proof=None)
    assert (out / "precious").read_text() == "x"
    export_merged(source, out, dtype="bf16", onto="original", proof=None, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "precious").exists()


def test_failing_export_leaves_the_folder_it_would_replace(source, tmp_path):
    out = tmp_path / "out"
    export_merged(source, out, dtype="bf16", onto="original", proof=None)
    before = fingerprint(out)
    (source.adapter_folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError):
        export_merged(source, out, dtype="bf16", onto="original", proof=None, overwrite=True)
    assert fingerprint(out) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from qlora_trainer.base.load import BaseSpec
from qlora_trainer.export.export import export_merged
from qlora_trainer.export.source import ExportSource
from qlora_trainer.export.folder import building
base, adapter, out = map(Path, sys.argv[1:])
def progress(name, done, total):
    if done * 2 > total:
        os.kill(os.getpid(), signal.SIGKILL)
source = ExportSource(base, adapter, AutoModelForCausalLM, BaseSpec("nf4"), str(base))
export_merged(source, out, dtype="bf16", onto="original", proof=None, progress=progress)
"""


def test_killed_export_leaves_nothing_under_its_name_and_the_next_one_starts_clean(
    source, tmp_path
):
    out = tmp_path / "out"
    before = fingerprint(source.base_folder, source.adapter_folder)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source.base_folder, source.adapter_folder, out],
        cwd=Path(__file__).parents[2], capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert (tmp_path / ".out.exporting").is_dir()
    assert fingerprint(source.base_folder, source.adapter_folder) == before
    export_merged(source, out, dtype="bf16", onto="original", proof=None)
    assert tiny.load(out) is not None
    assert not (tmp_path / ".out.exporting").exists()


def test_two_exports_to_one_target_exclude_each_other(source, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        busy = tmp_path / ".out.exporting"
        busy.mkdir()
        (busy / ".exporting-process").write_text(str(other.pid))
        with pytest.raises(UserError, match=f"process {other.pid} is exporting there"):
            export_merged(source, tmp_path / "out", dtype="bf16", onto="original", proof=None)
        assert busy.is_dir()
    finally:
        other.kill()
        other.wait()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    made = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, check=False
    ).returncode  # fmt: skip
    if not made:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    time.sleep(0.05)
    subprocess.run(["umount", "-l", place], check=True)


def test_too_small_a_disk_is_refused_before_the_first_byte(source, small_disk):
    assert_refused(source, small_disk / "out", "the export needs .* are free")


def test_disk_that_fills_up_on_the_way_is_a_clear_error(source, small_disk, tmp_path):
    # Free space can go while an export runs: more companions than were counted for do it here.
    (source.base_folder / "LICENSE").write_bytes(b"x" * 3 * 2**20)
    from qlora_trainer.export.merged import prepare, write_candidate

    prepared = prepare(
        source.base_folder, source.adapter_folder, source.model_class, source.spec, dtype="bf16"
    )
    out = small_disk / "out"
    with pytest.raises(UserError, match="the disk filled up"), building(out, overwrite=False) as f:
        write_candidate(prepared, f, "original", max_shard_bytes=10**9)
    assert list(small_disk.iterdir()) == []


def test_replacing_a_folder_that_is_being_read_is_refused_whatever_is_asked(source, tmp_path):
    before = fingerprint(source.base_folder, source.adapter_folder)
    for out in (source.base_folder, source.adapter_folder, tmp_path):
        with pytest.raises(UserError, match="replacing it would delete"):
            export_merged(source, out, dtype="bf16", onto="original", proof=None, overwrite=True)
    assert fingerprint(source.base_folder, source.adapter_folder) == before


def test_nan_in_a_quantized_weight_is_named_both_ways(source, tmp_path):
    path = source.base_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    for onto in ("original", "dequantized"):
        with pytest.raises(UserError, match=r"1.mlp.down_proj.weight: 1 values are NaN"):
            export_merged(source, tmp_path / "out", dtype="bf16", onto=onto, proof=None)
    assert not (tmp_path / "out").exists()


def test_export_cut_short_between_two_renames_gives_the_old_folder_back(source, tmp_path):
    old = tmp_path / ".out.replaced"
    old.mkdir()
    (old / "precious").write_text("x")
    with (
        pytest.raises(UserError, match="exists already"),
        building(tmp_path / "out", overwrite=False),
    ):
        pass
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_lock_of_a_dead_process_whose_number_is_used_again_is_forgotten(source, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        busy = tmp_path / ".out.exporting"
        busy.mkdir()
        (busy / ".exporting-process").write_text(f"{other.pid} 1000.0")
        with building(tmp_path / "out", overwrite=False) as folder:
            (folder / "x").write_text("x")
        assert (tmp_path / "out" / "x").is_file()
    finally:
        other.kill()
        other.wait()
