"""The benchmark's arithmetic, and everybody's step on a tiny model, for real."""

import json

import pytest
import torch
from benchmark_step import main, step_flops, summarize
from step_cases import CONTENDERS, PARTS, TECHNIQUES
from step_contender import activation_plan
from transformers import LlamaConfig, LlamaForCausalLM


def turn(ours: float, peft: float) -> dict:
    made = {"peak_step_bytes": 100, "losses": [2.0, 1.0]}
    seconds = {"ours": ours, "peft": peft}
    return {
        name: {"step_seconds": taken, "tokens_per_second": 8 / taken, **made}
        for name, taken in seconds.items()
    }


def test_a_ratio_is_the_median_of_pairs_not_of_all() -> None:
    # a slow moment of the machine hits both of its turn
    found = summarize([turn(1, 2), turn(10, 20), turn(1, 3)], [4.0, 4.0, 4.0], 2.0)
    assert found["times_faster"] == {"peft": 2}
    assert found["spread"] == {"peft": [2, 3]}
    assert found["tokens_per_second"] == {"ours": 8, "peft": 8 / 3}
    assert found["ceiling_share"] == pytest.approx(0.5)
    assert found["memory_share"] == {"peft": 1}
    assert found["loss_difference"] == {"peft": 0}


def test_parts_name_known_contenders_and_begin_with_ours() -> None:
    for part in PARTS.values():
        assert set(part["contenders"]) <= set(CONTENDERS)
        assert CONTENDERS[part["contenders"][0]]["kind"] == "ours"
    left_out = {name for name in PARTS["ablation-1x512"]["contenders"] if name != "ours"}
    assert len(left_out) == len(TECHNIQUES)
    for name in left_out:
        assert len(CONTENDERS[name]["techniques"]) == len(TECHNIQUES) - 1


def test_the_tables_show_every_contender_and_the_load(tmp_path, monkeypatch) -> None:
    from tables import common, step

    turns = [turn(1, 2), turn(1, 3)]
    for found in turns:
        found["ours"]["cores_busy_elsewhere"], found["peft"]["cores_busy_elsewhere"] = 0.25, None
    figures = summarize(turns, [4.0, 4.0], 2.0)
    settings = {"threads": 2, "data": None, "steps": 50}
    part = figures | {"settings": settings, "turns": turns}
    keeping = [found | {"ours-own": found["ours"] | {"tokens_per_second": 16}} for found in turns]
    own = summarize(keeping, [4.0, 4.0], 2.0) | {"settings": settings, "turns": keeping}
    left_out = {"ours": 8.0, "ours-without-fused-mlp": 6.0}
    memory = dict.fromkeys(left_out, 3 * 2**20)
    ablation = {"tokens_per_second": left_out, "peak_step_bytes": memory, "settings": settings}
    compiled = {"ours-plain": {"tokens_per_second": 4}, "ours-compiled": {"tokens_per_second": 3}}
    parts = {
        "compile-1x512": {"turns": [compiled]},
        "equal-1x512": part,
        "equal-4x512": own,
        "ablation-1x512": ablation,
        "same-losses": part,
    }
    (tmp_path / "step.json").write_text(json.dumps(parts))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    table = step.step()
    assert "| 135M, 1 x 512: ours, recomputing | 8 | - | - | 0 MiB | 50% |" in table
    assert "| 135M, 1 x 512: PEFT, recomputing | 3 | 2.50 (2.00 to 3.00) | - | 0 MiB | - |" in table
    assert "PEFT, recomputing | 3 | 2.50 (2.00 to 3.00) | 5.00 (4.00 to 6.00) |" in table
    assert "0.0 to 0.2 of the cores busy" in table
    assert "Turns of a comparison: 2 to 2." in table
    assert "norms and MLPs is 0.75 (0.75 to 0.75) times as fast" in table
    assert "50 steps from one fp32 adapter" in table
    assert "| without fused mlp | 6 | 3 MiB |" in step.step_ablation()


def test_some_layers_are_recomputed_and_the_others_kept() -> None:
    assert activation_plan("recompute:2", 3) == ["recompute", "recompute", "keep"]
    assert activation_plan("keep", 3) == "keep"


def test_every_contender_trains_a_tiny_model_to_the_same_losses(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = tmp_path / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    written = tmp_path / "found.json"
    arguments = ["--model", str(model), "--tokens", "32", "--steps", "2", "--repeats", "1"]
    code = main([*arguments, "--threads", "1", "--peers", "peft", "--json", str(written)])
    assert code == 0, capsys.readouterr().err
    found = json.loads(written.read_text())
    names = {"ours", "ours-plain", "peft"}
    assert set(found["tokens_per_second"]) == set(found["peak_step_bytes"]) == names
    assert found["final_loss"]["ours"] == pytest.approx(found["final_loss"]["peft"], rel=0.005)
    assert step_flops(model, 32) == 4 * 32 * (2 * (64 * 192 + 3 * 64 * 128) + 64 * 128)
