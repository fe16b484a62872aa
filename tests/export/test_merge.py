"""How many threads make a merge's pieces changes nothing in what is written or reported."""

import dataclasses
import hashlib
import threading

import pytest
import torch

from qlora_trainer.base.load import BaseSpec
from qlora_trainer.errors import UserError
from qlora_trainer.export import blocks
from qlora_trainer.export.blocks import torch_threads
from qlora_trainer.export.merged import prepare, write_candidate
from tests.export import tiny

SPEC = BaseSpec("nf4", compute_dtype=torch.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many pieces even of tiny tensors."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)


def merged(base, adapter, family, out, threads, onto):
    prepared = prepare(base, adapter, tiny.CLASSES[family], SPEC, dtype="fp16")
    out.mkdir()
    told = []
    with torch_threads(threads):
        figures = write_candidate(
            prepared, out, onto, max_shard_bytes=60_000,
            progress=lambda *said: told.append((*said, torch.get_num_threads())),
        )  # fmt: skip
        assert torch.get_num_threads() == threads
    files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.iterdir()}
    return files, dataclasses.asdict(figures), told


@pytest.mark.parametrize("onto", ["original", "dequantized"])
@pytest.mark.parametrize(("family", "settings"), [
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj", "down_proj"]}),
    ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
])  # fmt: skip
def test_one_thread_and_several_write_and_report_the_same_bits(
    bench, tmp_path, small_blocks, family, settings, onto
):
    base = bench.base(family)
    adapter = bench.adapter(base, family, **settings)
    alone = merged(base, adapter, family, tmp_path / "1", 1, onto)
    together = merged(base, adapter, family, tmp_path / "3", 3, onto)
    assert together == alone
    assert len(alone[2]) == alone[1]["tensors"]


def test_merge_that_is_stopped_leaves_no_thread_behind(bench, tmp_path, small_blocks):
    base = bench.base()
    prepared = prepare(base, bench.adapter(base), tiny.CLASSES["llama"], SPEC, dtype="fp16")

    def stop(*_):
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        write_candidate(prepared, tmp_path, "original", max_shard_bytes=60_000, progress=stop)
    assert set(threading.enumerate()) == before
    assert not (tmp_path / "config.json").exists()


def test_every_bad_tensor_is_named_though_pieces_are_made_ahead(bench, tmp_path, small_blocks):
    base = bench.base()
    prepared = prepare(base, bench.adapter(base), tiny.CLASSES["llama"], SPEC, dtype="fp16")
    updates = prepared.adapter.updates
    for update in updates.values():
        update.lora_B[-1] = 1e9
    with pytest.raises(UserError) as caught:
        write_candidate(prepared, tmp_path, "original", max_shard_bytes=60_000)
    for name in updates:
        assert f"{name}: {updates[name].lora_A.shape[1]} values beyond 65504" in str(caught.value)
