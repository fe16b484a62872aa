"""The benchmark's arithmetic, and everybody's step on a tiny model, for real."""

import json

import pytest
import torch
from benchmark_step import main, of_part
from step_cases import CONTENDERS, PARTS, PEERS, TECHNIQUES, in_dtype
from step_ceiling import flops_per_token
from step_contender import activation_plan
from step_figures import ratios_of, summarize
from step_rounds import SideBySide, turned
from steps import Stop
from transformers import LlamaConfig, LlamaForCausalLM


def made(ours: float, peft: float, loss: float = 1.0, peak: int = 100) -> dict:
    """A round of steps of 8 tokens, by their seconds."""
    other = {"tokens": 8, "peak_step_bytes": peak, "loss": loss, "products_per_second": 4.0}
    seconds = {"ours": ours, "peft": peft}
    return {
        name: {"step_seconds": taken, "tokens_per_second": 8 / taken, **other}
        for name, taken in seconds.items()
    }


def test_a_ratio_is_the_median_of_rounds_not_of_all_steps() -> None:
    # a slow moment of the machine hits both of its round
    found = summarize([made(50, 1)], [made(1, 2), made(10, 20), made(1, 3), made(1, 4)], 0.25)
    assert found["times_faster"] == {"peft": 2.5}
    assert found["spread"] == {"peft": [2, 4]}
    assert found["quartiles"] == {"peft": [2, 3.25]}
    assert found["tokens_per_second"] == {"ours": 8, "peft": pytest.approx((8 / 3 + 2) / 2)}
    assert found["ceiling_share"] == pytest.approx(0.5)
    assert found["ceiling_shares"]["peft"] == pytest.approx((0.5 / 3 + 0.5 / 4) / 2)


def test_rows_of_different_lengths_are_compared_by_tokens_per_second() -> None:
    steps = made(1, 2)
    steps["peft"] |= {"tokens": 32, "tokens_per_second": 16}
    assert ratios_of([steps], "ours", "peft") == [0.5]


def test_the_round_that_warms_up_counts_for_memory_and_losses_only() -> None:
    found = summarize([made(9, 1, loss=4.0, peak=300)], [made(1, 2)], 0.25)
    assert found["times_faster"] == {"peft": 2}
    assert found["peak_step_bytes"] == {"ours": 300, "peft": 300}
    assert found["losses"]["ours"] == [4.0, 1.0]
    assert found["final_loss"]["peft"] == 1.0
    assert found["memory_share"] == {"peft": 1}
    assert found["loss_difference"] == {"peft": 0}


def test_everybody_begins_a_round_once() -> None:
    names = ["ours", "peft", "trainer"]
    assert [turned(names, number)[0] for number in range(4)] == [*names, "ours"]
    assert all(sorted(turned(names, number)) == names for number in range(3))


def test_parts_name_known_contenders_and_begin_with_ours() -> None:
    for part in PARTS.values():
        assert set(part["contenders"]) <= set(CONTENDERS)
        assert CONTENDERS[part["contenders"][0]]["kind"] == "ours"
    left_out = {name for name in PARTS["ablation-1x512"]["contenders"] if name != "ours"}
    assert len(left_out) == len(TECHNIQUES)
    for name in left_out:
        assert len(CONTENDERS[name]["techniques"]) == len(TECHNIQUES) - 1
    bare, *alone = (CONTENDERS[name]["techniques"] for name in PARTS["alone-1x512"]["contenders"])
    assert bare == ()
    assert sorted(alone) == sorted((technique,) for technique in TECHNIQUES)


def test_all_compute_in_the_comparisons_dtype_where_none_is_named() -> None:
    trainer = in_dtype(CONTENDERS["trainer"], "bfloat16")
    assert trainer["compute_dtype"] == trainer["adapter_dtype"] == "bfloat16"
    assert trainer["arguments"]["bf16"] is True
    for name in ("trainer", "trl", "trl-packed"):
        plain = in_dtype(CONTENDERS[name], "float32")
        assert plain["compute_dtype"] == plain["adapter_dtype"] == "float32"
        assert plain["arguments"]["bf16"] is False  # which is not TRL's default
    assert in_dtype(CONTENDERS["trainer-defaults"], "float32")["arguments"] == {}
    named = in_dtype(CONTENDERS["peft-fp32"], "float32")
    assert (named["compute_dtype"], named["adapter_dtype"]) == ("bfloat16", "float32")


def test_the_tables_show_every_contender_and_the_load(tmp_path, monkeypatch) -> None:
    from tables import common, step

    turns = [made(1, 2), made(1, 3)]
    for found in turns:
        found["ours"]["cores_busy_elsewhere"], found["peft"]["cores_busy_elsewhere"] = 0.25, None
    settings = {"threads": 2, "data": None, "steps": 50, "tokens": 1024}
    part = summarize([], turns, 0.25) | {"settings": settings, "turns": turns}
    keeping = [found | {"ours-own": found["ours"] | {"tokens_per_second": 16}} for found in turns]
    own = summarize([], keeping, 0.25) | {"settings": settings, "turns": keeping}
    packed = [{"ours-packed": found["ours"], "trainer-defaults": found["peft"]} for found in turns]
    step_of = made(1, 1)["ours"] | {"peak_step_bytes": 3 * 2**20}
    rounds = [
        {
            "ours": step_of | {"tokens_per_second": 8},
            "ours-without-fused-mlp": step_of | {"tokens_per_second": slow},
            "ours-without-tiled-norms": step_of | {"tokens_per_second": same},
        }
        for slow, same in ((6, 7), (5, 8), (4, 10))
    ]
    ablation = summarize([], rounds, 0.25) | {"settings": settings, "turns": rounds}
    compiled = {"ours-plain": {"tokens_per_second": 4}, "ours-compiled": {"tokens_per_second": 3}}
    given_back = {
        "ours-own": {"tokens_per_second": 9},
        "ours-own-without-freed-pages": {"tokens_per_second": 6},
    }
    parts = {
        "compile-1x512": {"turns": [compiled]},
        "pages-1x512": {"turns": [given_back]},
        "equal-1x512": part,
        "equal-4x512": own,
        "ablation-1x512": ablation,
        "real": summarize([], packed, 0.25) | {"settings": settings, "turns": packed},
        "same-losses": {
            "settings": settings,
            "losses": {
                "ours-fp32": [2.002, 1.0],
                "peft-fp32": [2.0, 1.005],
                "ours-all-fp32": [2.00002, 1.0],
                "peft-all-fp32": [2.0, 1.0],
            },
        },
    }
    (tmp_path / "step.json").write_text(json.dumps(parts))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    table = step.step()
    assert "| 135M, 1 x 512: ours, recomputing | 8 | - | - | 0 MiB | 50% |" in table
    assert "| 135M, 1 x 512: PEFT, recomputing | 3 | 2.50 (2.25 to 2.75) | - | 0 MiB |" in table
    assert "PEFT, recomputing | 3 | 2.50 (2.25 to 2.75) | 5.00 (4.50 to 5.50) |" in table
    assert "Trainer as it comes | 3 | - | 2.50 (2.25 to 2.75) | 0 MiB |" in table
    assert "packed to 1,024 tokens where not said and padded in batches of 8" in table
    assert "0.0 to 0.2 of the cores busy" in table
    assert "Rounds of a comparison: 2." in table
    assert "norms and MLPs is 0.75 (0.75 to 0.75) times as fast" in table
    assert "that keeps all 1.50 (1.50 to 1.50) times as fast" in table
    assert "2 steps from one fp32 adapter on the instructions, packed to 1,024 tokens" in table
    assert "computed in fp32, no step's loss is more than 0.0010% from PEFT's" in table
    assert "In bf16 ours are at most 0.50% from PEFT's, in the mean 0.30%;" in table
    assert "moves ours by +0.05% in the mean, PEFT's by +0.25%." in table
    told = {**part, "settings": {**settings, "dtype": "fp32", "cpu": "AVX2"}}
    dtypes = {
        "turns": [
            {"ours-all-fp32": {"tokens_per_second": 12}, "ours-fp32": {"tokens_per_second": 3}}
        ]
    }
    fewer = told | {"turns": turns[:1]}
    bare = {name.replace("without", "only"): step for name, step in rounds[0].items()}
    by_itself = [{"ours-bare": bare.pop("ours") | {"tokens_per_second": 4}, **bare}]
    alone = summarize([], by_itself, 0.25) | {"settings": settings, "turns": by_itself}
    parts = {
        "equal-1x512": told, "equal-4x512": fewer, "dtype-1x512": dtypes, "alone-1x512": alone,
    }  # fmt: skip
    (tmp_path / "step-fp32.json").write_text(json.dumps(parts))
    table = step.step_fp32()
    assert "On 2 cores (AVX2, all in fp32), medians of rounds" in table
    assert "Rounds of a comparison: 1 to 2." in table
    assert "keeps all is 4.00 (4.00 to 4.00) times as fast in fp32 as in bf16." in table
    brought = step.step_alone()
    assert "| none | 4 | - | 3 MiB |" in brought
    assert "| fused mlp alone | 6 | 1.50 (1.50 to 1.50) | 3 MiB |" in brought
    left_out = step.step_ablation()
    assert "| without fused mlp | 5 | 1.60 (1.47 to 1.80) | 3 MiB |" in left_out
    assert "| without tiled norms | 8 | 1.00 (0.90 to 1.07), within the noise |" in left_out


def test_some_layers_are_recomputed_and_the_others_kept() -> None:
    assert activation_plan("recompute:2", 3) == ["recompute", "recompute", "keep"]
    assert activation_plan("keep", 3) == "keep"


@pytest.mark.parametrize(
    ("part", "peers", "chosen"),
    [
        ("equal-1x512", [], ["ours", "ours-own"]),
        ("equal-1x512", ["trainer"], ["ours", "ours-own", "trainer"]),
        ("real", ["trl"], ["ours-packed", "trl-packed", "trl-packed-512"]),
        ("real", list(PEERS), PARTS["real"]["contenders"]),
    ],
)
def test_a_part_is_run_with_the_peers_that_were_chosen(part, peers, chosen) -> None:
    assert of_part(part, peers) == chosen


def test_a_contender_that_fails_is_named_with_its_own_last_words(tmp_path) -> None:
    missing = str(tmp_path / "missing")
    job = {"model": missing, "adapter": missing, "threads": 1, "steps": 1}
    with pytest.raises(Stop, match=r"(?s)^ours failed with exit code 1:.*missing"):
        SideBySide(
            {"ours": {**job, **in_dtype(CONTENDERS["ours"], "bfloat16"), "contender": "ours"}}
        ).__enter__()


def test_every_contender_trains_a_tiny_model_to_the_same_losses(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = tmp_path / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    written = tmp_path / "found.json"
    arguments = ["--model", str(model), "--tokens", "32", "--rounds", "2"]
    code = main([*arguments, "--threads", "1", "--peers", "peft", "--json", str(written)])
    assert code == 0, capsys.readouterr().err
    found = json.loads(written.read_text())
    names = {"ours", "ours-plain", "peft"}
    assert set(found["tokens_per_second"]) == set(found["peak_step_bytes"]) == names
    assert found["final_loss"]["ours"] == pytest.approx(found["final_loss"]["peft"], rel=0.005)
    assert all(len(losses) == 3 for losses in found["losses"].values())
    assert found["loss_difference"]["peft"] < 0.005
    assert flops_per_token(model) == 4 * (2 * (64 * 192 + 3 * 64 * 128) + 64 * 128)
