"""The proof: a stranger's process, the right positions, and a limit that a wrong export fails."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import UserError
from qlora_trainer.export import export as export_module
from qlora_trainer.export.export import builtin_proof, export_merged
from qlora_trainer.export.merged import write_candidate
from qlora_trainer.export.plain import NOT_COUNTED, Comparison, compared_logits
from qlora_trainer.export.proof import Limits, ProofRequest
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


def test_wrong_weights_fail_the_proof_and_leave_nothing(bench, tmp_path, monkeypatch):
    def damaged(prepared, folder, onto, **settings):
        figures = write_candidate(prepared, folder, onto, **settings)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.0.self_attn.v_proj.weight"].neg_()
        save_file(tensors, path, metadata={"format": "pt"})
        return figures

    monkeypatch.setattr(export_module, "write_candidate", damaged)
    source = bench.source()
    with pytest.raises(UserError, match=r"is not the model that was trained.*mean KL"):
        export_merged(
            source, tmp_path / "out", dtype="bf16", onto="dequantized",
            proof=builtin_proof(source),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_weights_transformers_does_not_find_fail_the_proof(bench, tmp_path, monkeypatch):
    def incomplete(prepared, folder, onto, **settings):
        figures = write_candidate(prepared, folder, onto, **settings)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.nrom.weight"] = tensors.pop("model.norm.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return figures

    monkeypatch.setattr(export_module, "write_candidate", incomplete)
    source = bench.source()
    match = r"(?s)not find every weight.*missing_keys: model.norm.weight"
    with pytest.raises(UserError, match=match):
        export_merged(
            source, tmp_path / "out", dtype="bf16", onto="dequantized",
            proof=builtin_proof(source),
        )  # fmt: skip


def test_model_that_reads_no_text_needs_rows(bench):
    source = bench.source("resnet", target_modules=["convolution"], modules_to_save=["classifier"])
    with pytest.raises(UserError, match="give held-out rows"):
        builtin_proof(source)


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
