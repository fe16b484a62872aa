"""Joined adapters compute the weighted sum of what each computes."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.base.load import BaseSpec
from qlora_trainer.errors import UserError
from qlora_trainer.export.adapter import LowRank
from qlora_trainer.export.combine import combine_adapters, joined_factors
from qlora_trainer.export.serving import serving_notes
from qlora_trainer.lora.merge import low_rank_delta
from tests.export import tiny
from tests.export.test_merged import export, relative

SPEC = BaseSpec("nf4", compute_dtype=torch.float32)
KINDS = st.sampled_from(["linear", "conv1d", "conv2d", "embedding"])


def make_update(kind, rank: int, scale: float, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a = (rank, 6, 3, 3) if kind == "conv2d" else (rank, 6)
    b = (5, rank, 1, 1) if kind == "conv2d" else (5, rank)
    return LowRank(
        torch.randn(a, generator=generator), torch.randn(b, generator=generator), scale, kind
    )


@settings(max_examples=25, deadline=None)
@given(KINDS, st.lists(st.tuples(st.integers(1, 5), st.floats(-2, 2), st.floats(0.1, 3)),
                       min_size=1, max_size=4))  # fmt: skip
def test_joined_factors_make_the_weighted_sum(kind, parts):
    updates = [
        (make_update(kind, rank, scale, seed), weight)
        for seed, (rank, weight, scale) in enumerate(parts)
    ]
    a, b = joined_factors(updates)
    expected = torch.stack(
        [low_rank_delta(u.lora_A, u.lora_B, u.scale, kind) * weight for u, weight in updates]
    ).sum(0)
    assert torch.allclose(low_rank_delta(a, b, 1.0, kind), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_joined_adapter_equals_pefts_weighted_adapter(bench, tmp_path, family):
    base = bench.base(family)
    kinds = {
        "llama": ({"target_modules": "all-linear"}, {"target_modules": ["q_proj"], "r": 2}),
        "gpt2": ({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
                 {"target_modules": ["c_attn"], "r": 3, "fan_in_fan_out": True}),
    }[family]  # fmt: skip
    folders = [bench.adapter(base, family, seed=n, **kind) for n, kind in enumerate(kinds)]
    combined = combine_adapters(
        base, list(zip(folders, (0.7, -0.4), strict=True)), tmp_path / "joined",
        model_class=tiny.CLASSES[family], spec=SPEC,
    )  # fmt: skip
    assert combined.largest_rank == 4 + kinds[1]["r"]
    out = export(base, combined.folder, family, tmp_path / "out")
    state = tiny.load(base, family).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for folder, weight in zip(folders, (0.7, -0.4), strict=True):
            merged = peft.PeftModel.from_pretrained(tiny.load(base, family), folder)
            own = tiny.load(base, family).state_dict()
            for name, value in merged.merge_and_unload().state_dict().items():
                state[name] = state[name] + weight * (value - own[name])
    expected = tiny.load(base, family)
    expected.load_state_dict(state)
    assert relative(
        tiny.logits(tiny.load(out, family), family), tiny.logits(expected, family)
    ) < 1e-5  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_by_peft = peft.PeftModel.from_pretrained(tiny.load(base, family), combined.folder)
    assert relative(tiny.logits(read_by_peft.eval(), family), tiny.logits(expected, family)) < 1e-5


def test_modules_trained_in_full_move_by_their_weighted_differences(bench, tmp_path):
    base = bench.base("llama", tied=False)
    kind = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    folders = [bench.adapter(base, seed=n, **kind) for n in range(2)]
    combine_adapters(
        base, list(zip(folders, (0.5, 0.25), strict=True)), tmp_path / "joined",
        model_class=tiny.CLASSES["llama"], spec=SPEC,
    )  # fmt: skip
    out = export(base, tmp_path / "joined", "llama", tmp_path / "out")
    own = tiny.load(base).lm_head.weight
    heads = []
    for n, folder in enumerate(folders):
        alone = export(base, folder, "llama", tmp_path / f"alone-{n}")
        heads.append(tiny.load(alone).lm_head.weight)
    expected = own + 0.5 * (heads[0] - own) + 0.25 * (heads[1] - own)
    assert relative(tiny.load(out).lm_head.weight, expected) < 1e-6


def test_one_adapter_or_a_weight_of_nothing_is_refused(bench, tmp_path):
    base = bench.base()
    adapter = bench.adapter(base)
    with pytest.raises(UserError, match=r"(?s)weight nan.*at least two"):
        combine_adapters(
            base, [(adapter, float("nan"))], tmp_path / "joined",
            model_class=tiny.CLASSES["llama"], spec=SPEC,
        )  # fmt: skip


def with_labels(folder: Path, place: Path, names: list[str], **settings: str) -> Path:
    """A copy of an adapter with the configuration a run leaves beside it."""
    shutil.copytree(folder, place)
    labels = {str(number): name for number, name in enumerate(names)}
    (place / "config.json").write_text(json.dumps({"id2label": labels, **settings}))
    return place


def test_heads_of_labels_in_another_order_or_sense_are_not_averaged(bench, tmp_path):
    base = bench.base("bert")
    adapter = bench.adapter(
        base, "bert", target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"]
    )
    first = with_labels(adapter, tmp_path / "first", ["bad", "fair", "good"])
    other = with_labels(adapter, tmp_path / "other", ["good", "fair", "bad"])
    several = with_labels(
        adapter, tmp_path / "several", ["bad", "fair", "good"],
        problem_type="multi_label_classification",
    )  # fmt: skip

    def join(second: Path) -> Path:
        return combine_adapters(
            base, [(first, 0.5), (second, 0.5)], tmp_path / "joined",
            model_class=tiny.CLASSES["bert"], spec=SPEC,
        ).folder  # fmt: skip

    for second, setting in ((other, "id2label"), (adapter, "id2label"), (several, "problem_type")):
        with pytest.raises(UserError, match=f"{setting} is not the same for all"):
            join(second)
    same = with_labels(adapter, tmp_path / "same", ["bad", "fair", "good"])
    written = join(same) / "config.json"
    assert written.read_bytes() == (first / "config.json").read_bytes()


def test_joined_configuration_speaks_of_scale_one(bench, tmp_path):
    base = bench.base()
    adapters = [(bench.adapter(base, use_rslora=True), 1.0), (bench.adapter(base), 2.0)]
    combine_adapters(
        base, adapters, tmp_path / "joined", model_class=tiny.CLASSES["llama"], spec=SPEC
    )
    written = json.loads((tmp_path / "joined" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (8, 8, False)


def test_serving_notes_name_setting_reason_and_way_out():
    notes = serving_notes(rank=48, kinds=["linear"], modules_to_save=["lm_head"])
    said = [str(note) for note in notes]
    assert [note.server for note in notes] == ["vLLM", "vLLM", "llama.cpp"]
    assert "modules_to_save = lm_head" in said[0]
    assert "--max-lora-rank 64" in said[1]
    assert serving_notes(rank=16, kinds=["linear"]) == []


def test_serving_notes_tell_of_scales_that_servers_get_wrong():
    said = [
        str(note)
        for note in serving_notes(
            rank=16, kinds=["linear"], rank_pattern=[16, 8], alpha_pattern=True, rslora=True
        )
    ]
    assert any("vLLM: rank_pattern, alpha_pattern" in line for line in said)
    assert any("llama.cpp: rslora = true" in line and "sqrt(rank)" in line for line in said)
    assert any("llama.cpp: alpha_pattern" in line for line in said)
    assert serving_notes(rank=16, kinds=["linear"], rank_pattern=[16, 16]) == []
