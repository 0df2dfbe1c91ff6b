import pytest
import torch
from torch.nn import functional as F

from lightning_kd import losses


def test_of_unit_vectors_it_is_their_angle():
    student, teacher = (F.normalize(torch.randn(8, 16)) for _ in range(2))
    expected = (2 - 2 * F.cosine_similarity(student, teacher)).mean()
    torch.testing.assert_close(losses.LEAF()(student, teacher), expected)
    torch.testing.assert_close(losses.LEAF(normalize=True)(3 * student, teacher / 7), expected)


def test_a_student_of_another_length_could_not_search():
    with pytest.raises(ValueError, match=r"student \(8, 4\) and teacher \(8, 16\).*of one length.*last layer"):
        losses.LEAF()(torch.randn(8, 4), torch.randn(8, 16))
