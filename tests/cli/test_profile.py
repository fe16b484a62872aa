"""`qlora profile`: flags, sweeps, the inverse question, pages, and faults with code 2."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from qlora_trainer.cli.app import main
from qlora_trainer.cli.flags import setting_flags
from qlora_trainer.units import format_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's config.json; nothing else is needed."""
    folder = tmp_path_factory.mktemp("tiny")
    LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder / "config.json")


Told = tuple[int, str, str]


@pytest.fixture
def profile(model: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `qlora profile` on the tiny model in this process: exit code, output, errors."""

    def run(*arguments: str, named: str = model, gpu: str | None = "rtx-3060-12gb") -> Told:
        with pytest.MonkeyPatch.context() as patch:
            card = [] if gpu is None else ["--gpu", gpu]
            known = ["qlora", "profile", "--model", named, *card]
            patch.setattr(sys, "argv", [*known, *arguments])
            with pytest.raises(SystemExit) as left:
                main()
        said = capsys.readouterr()
        return int(str(left.value.code)), said.out, said.err

    return run


def test_every_setting_of_memory_has_a_flag() -> None:
    named = {name for name, _ in setting_flags().values()}
    for setting in (
        "model.quantization", "model.attention", "adapter.rank", "adapter.layers", "adapter.dtype",
        "adapter.target_modules", "data.max_seq_len", "data.packing", "train.micro_batch_size",
        "train.optimizer", "train.activations", "train.loss_chunk_tokens", "memory.desktop_share",
    ):  # fmt: skip
        assert setting in named
    assert "train.learning_rate" not in named


def test_a_flag_says_what_set_says(profile: Any) -> None:
    flags = ("--rank", "4", "--max-seq-len", "64", "--target-modules", "q_proj,v_proj",
             "--no-double-quant", "--layers", "{last: 1}")  # fmt: skip
    changes = ("adapter.rank=4", "data.max_seq_len=64", "adapter.target_modules=[q_proj,v_proj]",
               "model.double_quant=false", "adapter.layers={last: 1}")  # fmt: skip
    sets = [part for change in changes for part in ("--set", change)]
    assert profile(*flags, "--json") == profile(*sets, "--json")


def test_several_axes_may_follow_one_sweep(profile: Any, tmp_path: Path) -> None:
    page = tmp_path / "new" / "out.html"
    axes = ("train.micro_batch_size=1,2", "data.max_seq_len=64,128")
    code, told, _ = profile("--sweep", *axes, "--json", "--report", str(page))
    found = [item["settings"] for item in json.loads(told)]
    assert code == 0
    assert len(found) == 4
    assert found[3] == ["train.micro_batch_size=2", "data.max_seq_len=128"]
    repeated = profile("--sweep", axes[0], "--sweep", axes[1], "--json")
    assert [item["settings"] for item in json.loads(repeated[1])] == found
    assert page.read_text().count('class="bar"') == 4
    assert {file.name for file in page.parent.iterdir()} == {
        "out.html", "out-bars.png", "out-timeline.png"
    }  # fmt: skip


def test_fit_ends_at_the_models_last_position_and_at_the_card(profile: Any) -> None:
    code, told, _ = profile("--fit", "seq", "--fit", "change", "--json", "--max-seq-len", "256")
    longest, change = json.loads(told)
    assert code == 0
    assert longest["settings"] == ["data.max_seq_len=512"]
    assert "no longer position" in longest["because"]
    assert change["found"] == "none needed"
    budget = f"{350 + 44} MiB"  # the context and little more
    code, told, _ = profile("--fit", "change", "--max-seq-len", "512", "--micro-batch-size", "64",
                            "--budget", budget, "--json")  # fmt: skip
    change = json.loads(told)[0]
    assert code in (0, 3)
    assert change["predicted"]["verdict"] != "does not fit"
    assert change["settings"][0].startswith("train.micro_batch_size=")


def test_what_does_not_fit_leaves_with_4(profile: Any) -> None:
    code, told, _ = profile("--max-seq-len", "512", "--budget", "360 MiB")
    assert code == 4
    assert told.startswith("does not fit")
    assert "--budget" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "adapter.rank = 0"),
        (["--activations", "maybe"], "train.activations = 'maybe'"),
        (["--max-seq-len", "1024"], "knows 512 positions"),
        (["--target-modules", "q_prj", "--max-seq-len", "64"], "q_prj"),
        (["--desktop-share", "much"], "memory.desktop_share = 'much'"),
        (["--budget", "-1 GiB"], "'-1 GiB' is not a size"),
        (["--fit", "everything"], "ask seq, batch, rank, change, models"),
        (["--fit", "seq", "--sweep", "adapter.rank=4,8"], "ask one at a time"),
        (["--report", "out.pdf"], "ending in .html"),
        (["--sweep", "adapter.rank"], "write section.setting=value,value"),
        (["--measure"], "without weights"),
        (
            ["--processes", "3", "--gradient-accumulation-steps", "2"],
            "train.gradient_accumulation_steps = 2: is dealt out over 3 processes, so 1 of them",
        ),
    ],
)
def test_a_fault_is_one_message_and_code_2(
    profile: Any, arguments: list[str], message: str
) -> None:
    code, _, err = profile(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama", ', "config.json"),
        ('{"model_type": "unheard-of"}', "unheard-of"),
        ("[1]", "config.json"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "does not describe a llama"),
        (None, "no such"),
    ],
)
def test_a_model_that_is_none_is_code_2(
    profile: Any, tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    code, _, err = profile(named=str(file))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_the_card_here_is_the_one_of_the_run(profile: Any) -> None:
    code, _, err = profile("--set", "model.device=cuda:63", gpu=None)
    assert code == 2
    assert "model.device = 'cuda:63': torch finds" in err
    code, _, err = profile("--sweep", "model.device=cuda:0,cuda:1", gpu=None)
    assert code == 2
    assert "a table is of one card" in err


def test_an_unknown_card_is_answered_with_the_nearest(profile: Any) -> None:
    code, _, err = profile(gpu="rtx3060")
    assert code == 2
    assert "did you mean rtx-3060" in err


def test_the_verdict_names_experts_left_in_16_bit_by_path_and_total(
    profile: Any, tmp_path: Path
) -> None:
    Qwen3MoeConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=256, num_experts=8,
        num_experts_per_tok=2, max_position_embeddings=512,
    ).save_pretrained(tmp_path)  # fmt: skip
    model = str(tmp_path / "config.json")
    experts = {
        "model.layers.*.mlp.experts.gate_up_proj (3)": 3 * 8 * 512 * 256 * 2,
        "model.layers.*.mlp.experts.down_proj (3)": 3 * 8 * 256 * 256 * 2,
    }
    found = json.loads(profile("--json", "--max-seq-len", "32", named=model)[1])
    assert found["large_unquantized_by_path"] == experts  # the small embeddings go unnamed
    assert found["large_unquantized_total_bytes"] == sum(experts.values()) == 9 * 2**20
    assert "model.layers.2.mlp.experts.down_proj" in found["large_unquantized"]
    told = profile("--max-seq-len", "32", named=model)[1].splitlines()
    assert told[1].strip() == "9.0 MiB are large weights outside NF4:"
    assert [line.split(maxsplit=2)[2] for line in told[2:4]] == list(experts)


def test_what_crosses_pcie_is_said_with_what_is_not_counted(profile: Any) -> None:
    lean = ("--max-seq-len", "32", "--set", "model.embeddings_on_host=true")
    found = json.loads(profile("--json", *lean)[1])
    ids, rows = 8 * 32, 32 * 64 * 2
    assert found["moved_bytes"] == 8 * (ids + rows)  # of eight passes
    assert found["paged_bytes"] == 0  # bitsandbytes pages no states so small
    told = profile(*lean)[1]
    assert f"over PCIe       {format_bytes(8 * (ids + rows))} a step" in told
    assert "not what the driver pages" not in told
    paged = profile(*lean, "--set", "adapter.rank=1024")[1]
    assert "not what the driver pages of optimizer states" in paged
    assert "over PCIe" not in profile("--max-seq-len", "32")[1]


def test_disk_and_host_ram_follow_the_settings(profile: Any) -> None:
    few, many = (
        json.loads(profile("--json", "--max-seq-len", "32", "--set", f"output.keep_last={kept}")[1])
        for kept in (1, 4)
    )
    state = few["disk_bytes"]["saved state"]
    assert few["disk_peak_bytes"]["saved states"] == 2 * state
    assert many["disk_peak_bytes"]["saved states"] == 5 * state
    assert few["disk_peak_bytes"]["merged export"] == few["disk_bytes"]["merged checkpoint"]
    assert few["host_peak_bytes"] == max(few["host_bytes_by_phase"].values())
    assert set(few["allocated_by_phase"]) < set(few["host_bytes_by_phase"])


def test_several_processes_are_told_what_host_ram_they_take_together(profile: Any) -> None:
    flags = ("--max-seq-len", "64", "--processes", "3", "--gradient-accumulation-steps", "3")
    code, told, _ = profile(*flags)
    each = json.loads(profile(*flags, "--json")[1])["host_peak_bytes"]
    assert code == 0
    line = next(line.split() for line in told.splitlines() if "3 processes" in line)
    together = f"on one machine together {format_bytes(3 * each)} of host RAM"
    assert " ".join(line) == f"3 processes each takes this of its card; {together}"
    assert "processes" not in profile("--max-seq-len", "64")[1]


def test_packing_changes_the_prediction_only_where_it_keeps_the_mask(profile: Any) -> None:
    def foreseen(*flags: str) -> Any:
        flags = ("--json", "--max-seq-len", "512", "--micro-batch-size", "1", *flags)
        return json.loads(profile(*flags)[1])

    plain, packed = foreseen(), foreseen("--packing")
    masked = foreseen("--packing", "--set", "data.mask_free_packing=false")
    assert "variable-length flash attention" in packed["kernels"]
    assert packed["allocated_bytes"] == pytest.approx(plain["allocated_bytes"], rel=0.01)
    assert "memory-efficient attention" in masked["kernels"]
    forward = [each["allocated_by_phase"]["forward"] for each in (packed, masked)]
    assert forward[1] >= forward[0] + 512 * 512


def test_eager_attention_is_said_with_the_verdict(profile: Any) -> None:
    flags = ("--max-seq-len", "64", "--attention", "eager")
    assert "builds all scores" in profile(*flags)[1]
    assert "builds all scores" in profile(*flags, "--fit", "rank")[1]
    assert "builds all scores" not in profile("--max-seq-len", "64")[1]
    notes = json.loads(profile(*flags, "--packing", "--json")[1])["notes"]
    assert any("keeps the mask of the whole packed row" in note for note in notes)
