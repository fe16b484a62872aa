"""Adapter files go both ways between us and PEFT, and a bad one is refused whole."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.errors import UserError
from qlora_trainer.lora.files import load_adapter, restore_adapter, save_adapter
from qlora_trainer.lora.inject import adapted_layers, adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec

# PEFT asks transformers for something it has renamed; not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

Make = Callable[..., nn.Module]
Logits = Callable[[nn.Module], torch.Tensor]
Stir = Callable[[nn.Module], None]

# name: model, targets, what else of the spec, task
CASES: dict[str, tuple[str, Any, dict[str, Any], str | None]] = {
    "llama": ("llama", ("q_proj", "v_proj", "down_proj"), {}, "CAUSAL_LM"),
    "llama, all linear": ("llama", "all-linear", {"dropout": 0.1}, "CAUSAL_LM"),
    "llama, regular expression": ("llama", r".*\.(q|k)_proj", {}, "CAUSAL_LM"),
    "llama, two layers": ("llama", ("q_proj", "up_proj"), {"layers": (0, 2)}, "CAUSAL_LM"),
    "llama, rsLoRA and patterns": (
        "llama",
        ("q_proj", "v_proj", "up_proj"),
        {
            "rslora": True,
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"q_proj": 3, r"layers\.2\.mlp\.up_proj": 5},
        },
        "CAUSAL_LM",
    ),
    "llama, head": ("llama", ("q_proj", "lm_head"), {}, "CAUSAL_LM"),
    "llama, embedding": ("llama", ("embed_tokens", "v_proj"), {}, "CAUSAL_LM"),
    "llama, head in full": ("llama", ("q_proj",), {"modules_to_save": ("lm_head",)}, "CAUSAL_LM"),
    "llama, norms in full": ("llama", ("q_proj",), {"modules_to_save": ("norm",)}, "CAUSAL_LM"),
    "gpt2": ("gpt2", ("c_attn", "c_proj", "c_fc"), {}, "CAUSAL_LM"),
    "gpt2, embedding": ("gpt2", ("wte", "c_attn"), {}, "CAUSAL_LM"),
    "bert": ("bert", ("query", "value"), {"modules_to_save": ("classifier",)}, "SEQ_CLS"),
    "bert, all linear": ("bert", "all-linear", {"modules_to_save": ("classifier",)}, "SEQ_CLS"),
    "resnet": ("resnet", ("convolution",), {"modules_to_save": ("classifier",)}, None),
}


def make_spec(targets: Any, more: dict[str, Any]) -> AdapterSpec:
    return AdapterSpec(rank=4, alpha=8, target_modules=targets, **more)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(case: str, tiny: Make, logits: Logits, stir: Stir, tmp_path: Path) -> None:
    name, targets, more, task = CASES[case]
    model, spec = tiny(name), make_spec(targets, more)
    plain = logits(model)
    inject_adapter(model, spec, dtype=torch.float32)
    assert_same(logits(model), plain)
    stir(model)
    ours = logits(model)
    assert (ours - plain).abs().max() > 1e-3
    save_adapter(model, spec, tmp_path / "adapter", base_source="", task_type=task)
    theirs = peft.PeftModel.from_pretrained(  # every warning is an error: no key may be missing
        tiny(name), str(tmp_path / "adapter"), autocast_adapter_dtype=False
    ).eval()
    assert_same(ours, logits(theirs))


@pytest.mark.parametrize("case", CASES)
def test_we_read_peft(case: str, tiny: Make, logits: Logits, stir: Stir, tmp_path: Path) -> None:
    name, targets, more, task = CASES[case]
    more = dict(more)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=more.pop("rslora", False),
        lora_dropout=more.pop("dropout", 0.0),
        layers_to_transform=list(more.pop("layers", ())) or None,
        modules_to_save=list(more.pop("modules_to_save", ())) or None,
        task_type=task,
        **more,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of fan_in_fan_out and of saved embeddings
        theirs = peft.get_peft_model(tiny(name), config, autocast_adapter_dtype=False).eval()
        stir(theirs)
        theirs.save_pretrained(str(tmp_path))
    model = tiny(name)
    load_adapter(model, tmp_path, dtype=torch.float32, trainable=False)
    assert_same(logits(model), logits(theirs))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_we_read_bit_for_bit(
    case: str, tiny: Make, logits: Logits, stir: Stir, tmp_path: Path
) -> None:
    name, targets, more, task = CASES[case]
    model, spec = tiny(name), make_spec(targets, more)
    inject_adapter(model, spec, dtype=torch.float32)
    stir(model)
    save_adapter(model, spec, tmp_path, base_source=None, task_type=task)
    again = tiny(name)
    read = load_adapter(again, tmp_path, dtype=torch.float32, trainable=True)
    assert torch.equal(logits(model), logits(again))
    ours, theirs = adapter_parameters(model), adapter_parameters(again)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(p.requires_grad for p in theirs.values())
    scales = {n: layer.scale for n, layer in adapted_layers(model).items()}
    assert {n: layer.scale for n, layer in adapted_layers(again).items()} == scales
    assert read.rank_pattern == spec.rank_pattern
    assert read.dropout == spec.dropout


@pytest.fixture
def written(tiny: Make, stir: Stir, tmp_path: Path) -> Path:
    """Folder with a good adapter for the tiny Llama."""
    model, spec = tiny("llama"), make_spec(("q_proj", "v_proj"), {})
    inject_adapter(model, spec, dtype=torch.float32)
    stir(model)
    save_adapter(model, spec, tmp_path / "good", base_source="base", task_type="CAUSAL_LM")
    return tmp_path / "good"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def load(model: nn.Module, folder: Path) -> None:
    load_adapter(model, folder, dtype=torch.float32, trainable=False)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def test_missing_extra_and_misshapen_keys_are_all_listed_and_the_model_is_untouched(
    tiny: Make, written: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[KEY]
        tensors[KEY.replace("layers.1", "layers.9")] = torch.zeros(4, 32)
        wrong = KEY.replace("layers.1", "layers.0")
        tensors[wrong] = torch.zeros(4, 31)

    edit_tensors(written, spoil)
    model = tiny("llama")
    with pytest.raises(UserError, match=r"3 faults") as error:
        load(model, written)
    text = str(error.value)
    assert f"missing: {KEY} (4, 32)" in text
    assert f"extra: {KEY.replace('layers.1', 'layers.9')} (4, 32)" in text
    assert "is (4, 31), the model needs (4, 32)" in text
    assert not adapted_layers(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(
    tiny: Make, written: Path, bad: float
) -> None:
    edit_tensors(written, lambda tensors: tensors[KEY].view(-1)[3:5].fill_(bad))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj.*2 of 128 values"):
        load(tiny("llama"), written)


# Every field of PEFT's LoraConfig that changes the computation, at a value that is not its default.
FEATURES: dict[str, Any] = {
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 3},
    "bias": "lora_only",
    "corda_config": {"corda_method": "ipm"},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 2.0},
    "init_lora_weights": "pissa_niter_4",
    "kasa_config": {"beta": 1},
    "layer_replication": [[0, 2], [1, 3]],
    "loftq_config": {"loftq_bits": 4},
    "lora_bias": True,
    "lora_ga_config": {"scale": "stable"},
    "megatron_config": {"a": 1},
    "monteclora_config": {"num_samples": 3},
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": [1, 2],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"scale": 1.0},
    "a_field_of_the_future": "on",
}


@pytest.mark.parametrize("field", FEATURES)
def test_peft_features_we_lack_are_refused_by_name(tiny: Make, written: Path, field: str) -> None:
    edit_config(written, **{field: FEATURES[field]})
    with pytest.raises(UserError, match=rf"- {field} = "):
        load(tiny("llama"), written)


def test_every_field_of_peft_is_either_carried_out_or_neutral_or_refused() -> None:
    from qlora_trainer.lora.peft_config import FIELDS, NEUTRAL

    known = {*FIELDS, *NEUTRAL, *FEATURES}
    unknown = set(peft.LoraConfig().to_dict()) - known
    assert not unknown, f"peft {peft.__version__} has new fields: decide what they mean"


def test_unknown_fields_that_are_falsy_are_fine(tiny: Make, written: Path) -> None:
    edit_config(
        written, a_field_of_the_future=False, another=None, third={}, init_lora_weights="gaussian"
    )
    load(tiny("llama"), written)


def test_a_config_of_peft_s_first_year_is_read(tiny: Make, written: Path) -> None:
    old = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none"}
    old |= {"enable_lora": None, "merge_weights": False, "target_modules": ["q_proj", "v_proj"]}
    (written / "adapter_config.json").write_text(json.dumps(old))
    load(tiny("llama"), written)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": "4"}, r"r = '4': must be a whole number"),
        ({"r": True}, r"r = True: must be a whole number"),
        ({"r": 0}, r"rank = 0: must be a whole number of at least 1"),
        ({"lora_alpha": None}, r"lora_alpha = None: must be a number"),
        ({"target_modules": None}, r"target_modules = None: must be a list of names"),
        ({"target_modules": "q_proj("}, r"'q_proj\(' is not a regular expression"),
        ({"rank_pattern": {"q": 0.5}}, r"rank_pattern = .*: must be a table of whole numbers"),
        ({"lora_dropout": 1.5}, r"dropout = 1.5: must be at least 0 and less than 1"),
        ({"peft_type": "LOHA"}, r"peft_type = 'LOHA': only 'LORA'"),
        ({"target_modules": ["self_attn"]}, r"LlamaAttention, which cannot carry an adapter"),
        ({"target_modules": ["nothing"]}, r"matches no module"),
    ],
)
def test_broken_fields_are_refused_with_the_rule(
    tiny: Make, written: Path, changes: dict[str, Any], match: str
) -> None:
    edit_config(written, **changes)
    with pytest.raises(UserError, match=match):
        load(tiny("llama"), written)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"r": 4,\n "x" 1}', r"adapter_config\.json, line 2, column 6: not JSON"),
        (b'{"r": "\xff"}', r"byte 7 is not UTF-8"),
        (b"[1]", r"holds a list, must be an object"),
        (b"", r"line 1, column 1: not JSON"),
    ],
)
def test_a_broken_config_is_located(tiny: Make, written: Path, content: bytes, match: str) -> None:
    (written / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match=match):
        load(tiny("llama"), written)


def test_missing_files_are_named(tiny: Make, written: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.adapter_config\.json: there is no such file"):
        load(tiny("llama"), written / "nowhere")
    (written / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no adapter weights"):
        load(tiny("llama"), written)


def test_pickled_weights_are_refused_with_the_way_out(tiny: Make, written: Path) -> None:
    (written / "adapter_model.safetensors").rename(written / "adapter_model.bin")
    with pytest.raises(UserError, match="safe_serialization=True"):
        load(tiny("llama"), written)


def test_a_torn_file_is_refused(tiny: Make, written: Path) -> None:
    path = written / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(tiny("llama"), written)


def test_restore_reads_into_a_model_that_carries_the_adapter(
    tiny: Make, logits: Logits, written: Path
) -> None:
    model = tiny("llama")
    inject_adapter(model, make_spec(("q_proj", "v_proj"), {}), dtype=torch.float32)
    restore_adapter(model, written)
    expected = tiny("llama")
    load(expected, written)
    assert torch.equal(logits(model), logits(expected))
    other = tiny("llama")
    inject_adapter(other, make_spec(("q_proj",), {}), dtype=torch.float32)
    with pytest.raises(UserError, match=r"extra: .*v_proj"):
        restore_adapter(other, written)


def test_a_second_adapter_is_refused(tiny: Make, written: Path) -> None:
    model = tiny("llama")
    load(model, written)
    with pytest.raises(UserError, match=r"q_proj already carries an adapter"):
        load(model, written)


def test_names_are_short_where_they_mean_the_same(tiny: Make, tmp_path: Path) -> None:
    for layers, expected in (
        (None, ["q_proj"]),
        ((1,), ["model.layers.1.self_attn.q_proj"]),
    ):
        model, spec = tiny("llama"), make_spec(("q_proj",), {"layers": layers})
        inject_adapter(model, spec, dtype=torch.float32)
        save_adapter(model, spec, tmp_path, base_source=None)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["target_modules"] == expected


def test_other_files_in_the_folder_stay_and_nothing_temporary_is_left(
    tiny: Make, tmp_path: Path
) -> None:
    model, spec = tiny("llama"), make_spec(("q_proj",), {})
    inject_adapter(model, spec, dtype=torch.float32)
    save_adapter(model, spec, tmp_path / "a", base_source=None)
    (tmp_path / "a" / "README.md").write_text("card")
    save_adapter(model, spec, tmp_path / "a", base_source=None)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["README.md", "a", "adapter_config.json", "adapter_model.safetensors"]


def test_an_untrained_head_is_written_where_peft_looks_for_it(
    tiny: Make, logits: Logits, stir: Stir, tmp_path: Path
) -> None:
    model, spec = tiny("bert"), make_spec(("query",), {})
    inject_adapter(model, spec, dtype=torch.float32)
    stir(model)
    save_adapter(model, spec, tmp_path, base_source="", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny("bert"), str(tmp_path)).eval()
    assert_same(logits(model), logits(theirs))
    again = tiny("bert")
    load(again, tmp_path)
    assert torch.equal(logits(model), logits(again))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other_head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) + self.other_head(x)


def test_what_peft_takes_a_name_for_is_in_the_file(stir: Stir, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain, again = TwoHeads(), TwoHeads(), TwoHeads()
    plain.load_state_dict(model.state_dict())
    again.load_state_dict(model.state_dict())
    spec = make_spec(("body",), {"modules_to_save": ("head",)})
    inject_adapter(model, spec, dtype=torch.float32)
    stir(model)
    save_adapter(model, spec, tmp_path, base_source=None)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))  # "other_head" ends in "head"
    load(again, tmp_path)
    x = torch.randn(3, 4)
    assert_same(model(x), theirs(x))
    assert torch.equal(model(x), again(x))


def test_tied_copies_stay_tied_through_files(
    tiny: Make, logits: Logits, stir: Stir, tmp_path: Path
) -> None:
    spec = make_spec(("q_proj",), {"modules_to_save": ("embed_tokens", "lm_head")})
    model = tiny("llama tied")
    inject_adapter(model, spec, dtype=torch.float32)
    stir(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_adapter(model, spec, tmp_path, base_source="", task_type="CAUSAL_LM")
    again = tiny("llama tied")
    load(again, tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(again))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights in modules_to_save
        theirs = peft.PeftModel.from_pretrained(tiny("llama tied"), str(tmp_path)).eval()
    assert_same(logits(model), logits(theirs))


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_copies_peft_has_untied_load_untied_and_say_so(
    tiny: Make,
    logits: Logits,
    stir: Stir,
    tmp_path: Path,
    saved: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny("llama tied"), config).eval()
        stir(theirs)
        theirs.save_pretrained(str(tmp_path))
    model = tiny("llama tied")
    load(model, tmp_path)
    assert_same(logits(model), logits(theirs))
    assert "no longer tied" in caplog.text
    assert model.config.tie_word_embeddings is False


def test_embeddings_of_another_vocabulary_in_the_file_are_refused(
    tiny: Make, stir: Stir, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(tiny("llama", seed=1), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    load(tiny("llama", seed=1), tmp_path)  # the same base: the copy says nothing new
    with pytest.raises(UserError, match=r"extra: .*embed_tokens\.base_layer\.weight"):
        load(tiny("llama", seed=2), tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_moves_between_plain_and_4_bit_bases(
    name: str, tiny: Make, logits: Logits, stir: Stir, tmp_path: Path
) -> None:
    model = tiny(name)
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or "embed" in path or path in HEADS:
            continue
        turned = type(module).__name__ == "Conv1D"
        bias = getattr(module, "bias", None)
        quantized = NF4Linear.quantize(
            weight,
            bias,
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
            fan_in_fan_out=turned,
        )
        model.set_submodule(path, quantized)
    plain = logits(model)
    spec = make_spec("all-linear", {})
    selected = inject_adapter(model, spec, dtype=torch.float32)
    assert torch.equal(logits(model), plain)
    stir(model)
    assert (logits(model) - plain).abs().max() > 1e-3
    save_adapter(model, spec, tmp_path, base_source="", task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(tiny(name), str(tmp_path))
    assert len([m for m in theirs.modules() if hasattr(m, "lora_A")]) == len(selected)


HEADS = ("lm_head", "transformer.wte", "transformer.wpe")
