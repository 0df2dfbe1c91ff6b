import pytest
import torch
from torch import nn

from lightning_kd import losses


def test_it_is_the_mean_over_the_lengths():
    student, teacher, target = torch.randn(8, 16), torch.randn(8, 16), torch.randint(4, (8,))
    for loss in (losses.LEAF(), losses.KD(), losses.DKD()):
        labels = (target,) if isinstance(loss, losses.DKD) else ()
        expected = sum(loss(student[:, :d], teacher[:, :d], *labels) for d in (4, 16)) / 2
        torch.testing.assert_close(losses.Matryoshka(loss, [4, 16])(student, teacher, *labels), expected)


def test_relations_of_what_is_cut_to_those_of_the_whole_teacher():
    student, teacher = torch.randn(8, 16), torch.randn(8, 32)
    expected = (losses.RKD()(student[:, :4], teacher) + losses.RKD()(student, teacher)) / 2
    loss = losses.Matryoshka(losses.RKD(), [4, 16], whole_teacher=True)
    torch.testing.assert_close(loss(student, teacher), expected)


def test_a_cut_student_finds_in_a_cut_index():
    """Which one that was distilled as a whole does less well."""
    torch.manual_seed(0)
    teacher, inputs = torch.randn(64, 16), torch.randn(64, 20)
    found = {}
    for name, dims in (("whole", [16]), ("cut", [2, 16])):
        torch.manual_seed(1)
        student = nn.Linear(20, 16)
        optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
        for _ in range(60):
            loss = losses.Matryoshka(losses.LEAF(normalize=True), dims)(student(inputs), teacher)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[name] = nn.functional.cosine_similarity(student(inputs)[:, :2], teacher[:, :2]).mean()
    assert found["cut"] > found["whole"] + 0.02


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="CRD learns parameters for embeddings of one length"):
        losses.Matryoshka(losses.CRD(), [4])
    with pytest.raises(ValueError, match="dims are the lengths"):
        losses.Matryoshka(losses.LEAF(), [])
    for student, teacher in ((8, 4), (4, 8)):
        with pytest.raises(ValueError, match=r"embeddings \(B, D\) that can be cut to 8"):
            losses.Matryoshka(losses.LEAF(), [2, 8])(torch.randn(3, student), torch.randn(3, teacher))
