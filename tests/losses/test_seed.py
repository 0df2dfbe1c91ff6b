import pytest
import torch
from torch.nn import functional as F

from lightning_kd import functional, losses


def built(queue: int = 6, dim: int = 5) -> losses.SEED:
    loss = losses.SEED(queue)
    loss.build(torch.zeros(1, dim), torch.zeros(1, dim))
    return loss


def test_its_gradient_is_that_of_the_authors_cross_entropy():
    student, teacher, others = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.randn(6, 5)
    others = F.normalize(others)
    (ours,) = torch.autograd.grad(functional.seed(student, teacher, others, 0.2, 0.1), student)
    s, t = F.normalize(student), F.normalize(teacher)
    keys = torch.cat([t.unsqueeze(1), others.expand(4, 6, 5)], dim=1)  # of each sample, its own and the queue
    said = (torch.einsum("bd,bkd->bk", t, keys) / 0.1).softmax(1)
    cross = F.cross_entropy(torch.einsum("bd,bkd->bk", s, keys) / 0.2, said)
    (theirs,) = torch.autograd.grad(cross, student)
    torch.testing.assert_close(ours, theirs)


def test_at_equal_temperatures_the_teacher_itself_is_the_minimum():
    loss = losses.SEED(6, temperature=0.1, teacher_temperature=0.1)
    teacher = torch.randn(4, 5)
    loss.build(teacher, teacher)
    assert loss(3 * teacher, teacher) < 1e-6


def test_the_queue_holds_the_latest_in_turns():
    loss, batches = built(), torch.randn(4, 2, 5)
    for batch in batches:
        loss(torch.randn(2, 5), batch)
    expected = F.normalize(torch.cat([batches[3], batches[1], batches[2]]))
    torch.testing.assert_close(loss.bank, expected)
    assert int(loss.place) == 2
    loss.eval()(torch.randn(2, 5), torch.randn(2, 5))
    torch.testing.assert_close(loss.bank, expected)


def test_it_is_saved_and_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    loss, other = built(), built()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(loss.bank, other.bank)
    loss(torch.randn(4, 5), torch.randn(4, 5))
    assert loss.state_dict().keys() == {"bank", "place"}
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss.bank, other.bank)


def test_a_batch_that_the_queue_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="a batch of 7 does not fit into queue=6"):
        built()(torch.randn(7, 5), torch.randn(7, 5))
