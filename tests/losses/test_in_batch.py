import pytest
import torch
from torch import nn

from lightning_kd import losses
from lightning_kd.losses.in_batch import scores


def test_scores_are_cosines_with_the_others_in_their_order():
    x = torch.randn(5, 7)
    every = 3.0 * torch.cosine_similarity(x[:, None], x[None], dim=-1)
    expected = torch.stack([torch.cat([row[:i], row[i + 1 :]]) for i, row in enumerate(every)])
    torch.testing.assert_close(scores(x, 3.0), expected)


def test_a_student_that_only_turned_its_embeddings_has_nothing_to_learn():
    teacher = torch.randn(6, 4)
    turned = 2.0 * teacher @ torch.linalg.qr(torch.randn(4, 4)).Q
    loss = losses.InBatch(losses.KD(temperature=1.0))
    assert loss(turned, teacher) < 1e-5 < loss(torch.randn(6, 9), teacher)


def test_a_schedule_reaches_the_temperature_and_the_scale_keeps_the_gradient():
    loss = losses.InBatch(losses.KD(temperature=1.0))
    loss.temperature = 3.0
    assert loss.loss.temperature == 3.0
    student, teacher = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    tempered = losses.InBatch(losses.KD(temperature=0.05), scale=1.0)(student, teacher)
    scaled = losses.InBatch(losses.KD(temperature=1.0), scale=20.0)(student, teacher)
    torch.testing.assert_close(scaled, 400 * tempered)


@pytest.mark.parametrize("inner", [losses.NKD, lambda: losses.SEED(queue=8), lambda: losses.CRD(dim=4)])
def test_losses_that_need_labels_or_parameters_are_refused(inner: type[nn.Module]):
    with pytest.raises(ValueError, match="InBatch wraps losses that do neither"):
        losses.InBatch(inner())


def test_two_samples_have_no_choice():
    with pytest.raises(ValueError, match="at least 3 samples are needed, got 2"):
        losses.InBatch(losses.KD())(torch.randn(2, 4), torch.randn(2, 4))
