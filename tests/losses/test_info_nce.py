import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import NTXentLoss

from lightning_kd import functional, losses


def test_it_is_the_contrastive_loss_of_another_library():
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    ours = functional.info_nce(student, teacher, temperature=0.2)
    labels = torch.arange(6)
    theirs = NTXentLoss(temperature=0.2)(student, labels, ref_emb=teacher, ref_labels=labels.clone())
    torch.testing.assert_close(ours, theirs)
    (ours,), (theirs,) = (torch.autograd.grad(each, student) for each in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_candidates_that_are_orthogonal_in_closed_form():
    expected = math.log(1 + 3 * math.exp(-2))
    assert float(functional.info_nce(3 * torch.eye(4), torch.eye(4), 0.5)) == pytest.approx(expected)


def test_others_of_the_class_are_no_candidates_and_what_has_no_class_is():
    student, teacher, target = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 0, -100, -100])
    s, t = F.normalize(student), F.normalize(teacher)
    logits = s @ t.T / 0.07
    logits[0, 1] = logits[1, 0] = -torch.inf
    expected = F.cross_entropy(logits, torch.arange(4))
    torch.testing.assert_close(functional.info_nce(student, teacher, target=target), expected)


def test_an_embedding_that_nobody_is_confused_with_is_left_where_it_is():
    """Unlike LEAF, it asks for the nearest and not for equality."""
    teacher = torch.eye(4, 8)
    student = (teacher + torch.eye(4, 8).roll(4, 1)).requires_grad_()  # half of it is where no candidate is
    assert functional.info_nce(student, teacher, 0.05) < 1e-5 < functional.leaf(student, teacher, normalize=True)


def test_embeddings_of_two_lengths_and_maps_are_refused():
    with pytest.raises(ValueError, match="map the student's embedding to the teacher's length"):
        losses.InfoNCE()(torch.randn(4, 5), torch.randn(4, 6))
    with pytest.raises(ValueError, match="must be embeddings"):
        losses.InfoNCE()(torch.randn(4, 5, 2, 2), torch.randn(4, 5, 2, 2))
