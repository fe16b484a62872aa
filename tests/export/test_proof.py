"""The proof: a stranger's process, the right positions, and a limit that a wrong export fails."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.base.load import BaseSpec
from qlora_trainer.errors import UserError
from qlora_trainer.export import plain, turns
from qlora_trainer.export.export import builtin_proof, export_merged
from qlora_trainer.export.fresh import compare_in_fresh_process, comparison_job
from qlora_trainer.export.merged import prepare, write_candidate
from qlora_trainer.export.plain import NOT_COUNTED, Comparison, compared_logits
from qlora_trainer.export.proof import Limits, ProofRequest, check_limits, chosen_rows
from qlora_trainer.export.reference import write_references
from tests.export import tiny


def test_best_keeps_the_way_a_stranger_finds_nearer_to_base_and_adapter_and_says_so(
    bench, tmp_path
):
    source = bench.source()
    proof = builtin_proof(source, precisions=("fp32",), limits=Limits(1e-6, 10.0))
    made = export_merged(source, tmp_path / "out", dtype="fp32", onto="best", proof=proof)
    figures = {way: part["proof"]["fp32"]["figures"] for way, part in made.report["ways"].items()}
    assert made.report["kept"] == "dequantized"
    assert made.report["ways"]["original"]["proof"]["fp32"]["of_ours"] == []
    assert figures["dequantized"]["relative_difference"] < 1e-5
    assert figures["original"]["mean_kl"] > figures["dequantized"]["mean_kl"]
    assert json.loads((made.folder / "export_report.json").read_text()) == made.report
    card = (made.folder / "README.md").read_text()
    assert "Merging onto dequantized weights was kept" in card
    assert "| mean KL divergence (nats) |" in card
    assert tiny.load(made.folder) is not None
    assert {entry.name for entry in made.folder.iterdir()} == {
        "README.md", "config.json", "export_report.json", "generation_config.json",
        "model.safetensors",
    }  # fmt: skip


def test_classifier_is_compared_on_one_choice_a_row(bench, tmp_path):
    source = bench.source("bert", target_modules=["query"], task_type="SEQ_CLS")
    rows = [
        {"input_ids": torch.arange(3, 9 + n), "labels": torch.tensor(n % 3)} for n in range(4)
    ]  # fmt: skip
    made = export_merged(
        source, tmp_path / "out", dtype="fp32", onto="dequantized",
        proof=ProofRequest(rows, precisions=("fp32",)),
    )  # fmt: skip
    figures = made.report["ways"]["dequantized"]["proof"]["fp32"]["figures"]
    assert figures["positions"] == 4
    assert figures["export_loss"] == pytest.approx(figures["reference_loss"], rel=1e-5)
    assert made.report["auto_class"] == "AutoModelForSequenceClassification"


def test_export_above_its_limit_is_refused_and_leaves_nothing(bench, tmp_path):
    source = bench.source()
    proof = builtin_proof(source, limits=Limits(mean_kl=0.0))
    with pytest.raises(UserError, match=r"is not the model that was trained.*mean KL"):
        export_merged(source, tmp_path / "out", dtype="bf16", onto="dequantized", proof=proof)
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_wrong_weights_are_far_outside_the_limit_and_lost_ones_are_named(bench, tmp_path):
    source = bench.source()
    prepared = prepare(
        source.base_folder, source.adapter_folder, source.model_class, source.spec, dtype="bf16"
    )
    out = tmp_path / "out"
    out.mkdir()
    write_candidate(prepared, out, "dequantized", max_shard_bytes=10**9)
    request = builtin_proof(source)
    references = write_references(
        tmp_path, source, prepared.adapter, request, request.rows, precision="native"
    )

    def compare():
        return compare_in_fresh_process(
            out, references, request, precision="native", trust_remote_code=False
        )

    damage(out, lambda t: t["model.layers.0.self_attn.v_proj.weight"].neg_())
    fault = check_limits(compare()["figures"], "dequantized", Limits().mean_kl)
    assert fault is not None
    assert "mean KL divergence" in fault
    damage(out, lambda t: t.update(lost=t.pop("model.norm.weight")))
    match = r"(?s)not find every weight.*missing_keys: model.norm.weight.*unexpected_keys: lost"
    with pytest.raises(UserError, match=match):
        compare()


ADAPTED = {
    "llama": {"modules_to_save": ["lm_head"]},
    "gpt2": {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
    "bert": {"target_modules": ["query", "pooler.dense"], "task_type": "SEQ_CLS"},
    "resnet": {"target_modules": ["convolution"], "modules_to_save": ["classifier"]},
    "vit": {"modules_to_save": ["classifier"]},
    "t5": {},
    "bart": {},
    "marian": {},
    "m2m_100": {},
    "bart classifier": {"modules_to_save": ["classification_head"], "task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize(
    ("family", "precision"),
    [("llama", "native"), ("llama", "fp32"), ("gpt2", "native"), ("bert", "fp32"),
     ("resnet", "native"), ("vit", "fp32"), ("t5", "native"), ("bart", "fp32")],
)  # fmt: skip
def test_layer_by_layer_both_sides_compute_the_same_bits(bench, tmp_path, family, precision):
    source = bench.source(family, **ADAPTED[family])
    source = replace(source, spec=BaseSpec("nf4", compute_dtype=torch.bfloat16))
    prepared = prepare(
        source.base_folder, source.adapter_folder, source.model_class, source.spec, dtype="bf16"
    )
    out = tmp_path / "out"
    out.mkdir()
    write_candidate(prepared, out, "original", max_shard_bytes=10**9)
    request = builtin_proof(source)
    found, written = [], []
    for by in ("model", "layer"):
        (tmp_path / by).mkdir()
        references = write_references(
            tmp_path / by, source, prepared.adapter, request, chosen_rows(request, 96),
            precision=precision, by=by,
        )  # fmt: skip
        written.append(references.file.read_bytes())
        job = comparison_job(out, references, request, precision=precision, by=by)
        found.append(plain.compare(job, turns))
    assert written[0] == written[1]
    assert found[0] == found[1]
    assert found[0]["bad_keys"] == []
    assert found[0]["figures"]["mean_kl"] > 0


@pytest.mark.parametrize("family", ["bart", "marian", "m2m_100", "bart classifier"])
def test_models_that_shift_labels_in_their_own_way_are_proven(bench, tmp_path, family):
    source = bench.source(family, **ADAPTED[family])
    proof = builtin_proof(source, precisions=("fp32",), by="model")
    made = export_merged(source, tmp_path / "out", dtype="fp32", onto="dequantized", proof=proof)
    figures = made.report["ways"]["dequantized"]["proof"]["fp32"]["figures"]
    # These two make their positions anew when loaded, in the precision of that moment.
    rounded = family in ("marian", "m2m_100")
    assert figures["relative_difference"] < (1e-2 if rounded else 1e-5)
    assert ("export_loss" in figures) == (family != "bart classifier")


def test_decoder_reads_the_labels_moved_one_to_the_right_in_every_family(bench):
    row = {"input_ids": torch.arange(3, 12), "labels": torch.tensor([5, 9, 30, 2])}
    for family in ("bart", "marian", "m2m_100", "t5"):
        model = tiny.load(bench.base(family), family)
        found, labels = plain.compared_logits(model, row, shift=False, device=torch.device("cpu"))
        expected = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).logits[0]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(labels, row["labels"])


def test_classifier_that_has_a_decoder_takes_one_label_a_row(bench):
    model = tiny.load(bench.base("bart classifier"), "bart classifier")
    row = {"input_ids": torch.tensor([5, 6, 7, 2]), "labels": torch.tensor(1)}
    found, labels = plain.compared_logits(model, row, shift=False, device=torch.device("cpu"))
    torch.testing.assert_close(found, model(input_ids=row["input_ids"][None]).logits.detach())
    assert labels.tolist() == [1]


def test_export_proven_layer_by_layer_in_a_fresh_process_says_so(bench, tmp_path):
    proof = builtin_proof(bench.source(), by="layer")
    made = export_merged(
        bench.source(), tmp_path / "out", dtype="bf16", onto="dequantized", proof=proof
    )
    assert (made.report["rows"]["by"], made.report["rows"]["base_by"]) == ("layer", "layer")
    part = made.report["ways"]["dequantized"]["proof"]["native"]
    assert part["figures"]["top1_agreement"] > 0.9
    assert "layer by layer" in (made.folder / "README.md").read_text()


def test_rows_that_count_nothing_are_no_proof():
    silent = {"input_ids": torch.arange(4), "labels": torch.full((4,), NOT_COUNTED)}
    with pytest.raises(UserError, match="nothing to compare: none of 2 rows"):
        chosen_rows(ProofRequest([silent, silent]), 10)


def test_rows_are_cut_to_the_positions_that_may_be_compared():
    long = {"input_ids": torch.arange(50), "labels": torch.arange(50)}
    chosen = chosen_rows(ProofRequest([long, long], max_positions=20), 10)
    assert [len(row["labels"]) for row in chosen] == [20]


def test_best_without_a_proof_is_refused(bench, tmp_path):
    with pytest.raises(UserError, match="needs the proof"):
        export_merged(bench.source(), tmp_path / "out", dtype="bf16", onto="best", proof=None)


def test_only_trained_positions_are_compared_each_with_the_token_it_predicts(bench):
    model = tiny.load(bench.base())
    ids = torch.tensor([5, 6, 7, 8])
    labels = torch.tensor([NOT_COUNTED, NOT_COUNTED, 7, 8])
    logits, found = compared_logits(
        model, {"input_ids": ids, "labels": labels}, shift=True, device=torch.device("cpu")
    )
    with torch.no_grad():
        whole = model(input_ids=ids[None]).logits[0]
    assert found.tolist() == [7, 8]
    assert torch.equal(logits, whole[1:3])


def test_comparison_agrees_with_the_plain_definitions():
    torch.manual_seed(0)
    reference, other = torch.randn(700, 11), torch.randn(700, 11)
    labels = torch.randint(0, 11, (700,))
    comparison = Comparison()
    comparison.add(reference, other, labels)
    figures = comparison.figures()
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert figures["mean_kl"] == pytest.approx(float(kl.mean()))
    assert figures["max_kl"] == pytest.approx(float(kl.max()))
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert figures["top1_agreement"] == pytest.approx(float(agreement))
    assert figures["export_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(other.double(), labels))
    )
    assert figures["max_logit_difference"] == float((reference - other).abs().max())


def test_base_that_does_not_tell_limits_apart_uses_the_tight_one():
    limits = Limits(mean_kl=0.1, mean_kl_original=0.9)
    assert limits.of("original", quantized=True) == 0.9
    assert limits.of("original", quantized=False) == limits.of("dequantized", quantized=True) == 0.1
    assert replace(limits, mean_kl=0.2).of("dequantized", quantized=True) == 0.2
