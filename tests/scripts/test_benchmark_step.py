"""The benchmark's arithmetic, and everybody's step on a tiny model, for real."""

import json

import pytest
import torch
from benchmark_step import main, step_flops, summarize
from transformers import LlamaConfig, LlamaForCausalLM


def turn(ours: float, peft: float) -> dict:
    made = {"peak_step_bytes": 100, "losses": [2.0, 1.0]}
    return {"ours": {"step_seconds": ours, **made}, "peft": {"step_seconds": peft, **made}}


def test_a_ratio_is_the_median_of_pairs_not_of_all() -> None:
    # a slow moment of the machine hits both of its turn
    found = summarize([turn(1, 2), turn(10, 20), turn(1, 3)], [4.0, 4.0, 4.0], 8, 2.0)
    assert found["times_faster"] == {"peft": 2}
    assert found["spread"] == {"peft": [2, 3]}
    assert found["tokens_per_second"] == {"ours": 8, "peft": 8 / 3}
    assert found["ceiling_share"] == pytest.approx(0.5)


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
    found = json.loads(written.read_text())["figures"]
    names = {"ours", "ours-plain", "peft"}
    assert set(found["tokens_per_second"]) == set(found["peak_step_bytes"]) == names
    assert found["final_loss"]["ours"] == pytest.approx(found["final_loss"]["peft"], rel=0.005)
    assert step_flops(model, 32) == 4 * 32 * (2 * (64 * 192 + 3 * 64 * 128) + 64 * 128)
