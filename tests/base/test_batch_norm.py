import copy

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from qlora_trainer.base.batch_norm import freeze_batch_norms


def tiny() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def test_training_moves_no_statistics_and_reads_the_bases_own():
    model, pictures = tiny().eval(), torch.randn(2, 3, 32, 32)
    expected = model(pictures).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = freeze_batch_norms(model)
    assert len(paths) == sum("running_mean" in name for name in before)
    model.train()
    assert torch.equal(model(pictures).logits, expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_picture_trains_the_same_alone_as_in_a_batch():
    model, pictures = tiny(), torch.randn(3, 3, 32, 32)
    freeze_batch_norms(model)
    model.train()
    together = model(pictures).logits
    alone = torch.cat([model(pictures[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_gradients_pass_through_and_copies_stay_frozen():
    model = tiny()
    freeze_batch_norms(model)
    copied = copy.deepcopy(model).train()
    pictures = torch.randn(1, 3, 32, 32, requires_grad=True)
    copied(pictures).logits.sum().backward()
    assert pictures.grad is not None
    assert not any(m.training for m in copied.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d])
def test_norms_of_every_dimension_are_frozen_and_those_without_statistics_left(kind):
    model = nn.Sequential(kind(4), kind(4, track_running_stats=False))
    assert freeze_batch_norms(model) == ["0"]
