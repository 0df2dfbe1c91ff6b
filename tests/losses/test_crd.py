import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchdistill.losses.mid_level import CRDLoss

from lightning_kd import losses
from lightning_kd.functional import crd, crd_nce
from lightning_kd.losses._bank import splitmix64


def _memory(samples: int = 50, negatives: int = 20, **kwargs: float) -> tuple[losses.CRD, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    s, t = torch.randn(8, 12), torch.randn(8, 20)
    loss = losses.CRD(dim=16, memory=samples, negatives=negatives, **kwargs)
    loss.build(s, t)
    return loss, s, t, torch.randperm(samples)[:8]


def _known(loss: losses.CRD) -> dict[str, Tensor]:
    """What of the banks is drawn at random."""
    assert loss.banks is not None
    return {key: loss.banks.get_buffer(key) for key in ("draws", "student", "teacher")}


def test_orthogonal_and_aligned_in_closed_form():
    torch.testing.assert_close(
        crd(torch.eye(4), torch.eye(4), temperature=0.5), torch.tensor(2 * math.log(1 + 3 * math.exp(-2)))
    )


def test_indistinguishable_in_closed_form():
    x = F.normalize(torch.ones(6, 4))
    torch.testing.assert_close(crd(x, x), torch.tensor(2 * math.log(6)))


def test_samples_of_the_same_class_are_no_negatives():
    """With the batch's classes taken two by two, each sample has four negatives of six."""
    x = F.normalize(torch.ones(6, 4))
    torch.testing.assert_close(crd(x, x, target=torch.tensor([0, 0, 1, 1, 2, 2])), torch.tensor(2 * math.log(5)))
    torch.testing.assert_close(crd(x, x, target=torch.zeros(6, dtype=torch.int64)), torch.tensor(0.0))


def test_teacher_head_learns_but_the_teacher_does_not():
    s, t = torch.randn(4, 6), torch.randn(4, 8, requires_grad=True)
    loss = losses.CRD(dim=3)
    loss.build(s, t)
    loss(s, t).backward()
    assert t.grad is None
    assert loss.teacher_head is not None
    assert loss.teacher_head.weight.grad is not None


def test_noise_contrastive_against_torchdistill():
    torch.manual_seed(0)
    scores, log_z = 3 * torch.randn(8, 21), torch.tensor(4.0)
    peer = CRDLoss.__new__(CRDLoss)  # its constructor does not run (it reads an attribute it has not set)
    nn.Module.__init__(peer)
    peer.eps, peer.num_samples = 0.0, 50
    expected = peer.compute_contrast_loss((scores - log_z).exp()).squeeze()
    torch.testing.assert_close(crd_nce(scores[:, 0], scores[:, 1:], log_z, 20 / 50), expected)


def test_scores_that_say_nothing_in_closed_form():
    """With e^x / Z = 1/M everywhere: log(K + 1) for the positive and K log(1 + 1/K), about 1, for others."""
    zero = torch.zeros(8, 20)
    loss = crd_nce(zero[:, 0], zero, torch.tensor(50.0).log(), 20 / 50)
    torch.testing.assert_close(loss, torch.tensor(math.log(21) + 20 * math.log(1 + 1 / 20)))


def test_banks_move_in_training_only_and_only_for_the_batch():
    loss, s, t, index = _memory()
    assert loss.banks is not None
    before = {key: value.clone() for key, value in loss.banks.state_dict().items()}
    loss.eval()(s, t, index=index)
    assert all(torch.equal(value, before[key]) or value.isnan().all() for key, value in loss.banks.state_dict().items())
    loss.train()(s, t, index=index)
    moved = (loss.banks.student != before["student"]).any(1)
    assert moved.nonzero().flatten().tolist() == sorted(index.tolist())
    torch.testing.assert_close(loss.banks.teacher.norm(dim=1), torch.ones(50))
    assert torch.isfinite(loss.banks.log_partition).all()


def test_momentum_0_stores_the_embedding_itself():
    loss, s, t, index = _memory(momentum=0.0)
    loss(s, t, index=index)
    assert loss.banks is not None
    assert loss.student_head is not None
    torch.testing.assert_close(loss.banks.student[index], F.normalize(loss.student_head(s)).detach())


def test_the_first_batch_sets_the_partition_once():
    loss, s, t, index = _memory(samples=50, negatives=50_000)
    assert loss.banks is not None
    bank = loss.banks.teacher.clone()
    assert loss.student_head is not None
    every = (F.normalize(loss.student_head(s)) @ bank.T / 0.07).exp().sum(1).mean().log()
    loss(s, t, index=index)
    first = loss.banks.log_partition.clone()
    torch.testing.assert_close(first[0], every.detach(), atol=0.05, rtol=0)  # a mean of M e^x over a sample
    loss(s, t, index=index)
    assert torch.equal(loss.banks.log_partition, first)
    assert losses.CRD(memory=9, partition=1.0).banks.log_partition.tolist() == [0.0, 0.0]


def test_known_labels_are_no_negatives():
    loss, s, t, index = _memory(samples=8, negatives=400, partition=1.0)
    index, labels = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    loss(s, t, labels, index)
    assert loss.banks is not None
    assert loss.banks.label.tolist() == [0] * 8
    others = loss.eval()(s, t, labels + 1, index)
    alone = loss.eval()(s, t, labels, index)
    assert alone < others / 10  # only the positive is left


def test_samples_without_a_label_are_of_no_class():
    """-100, twice, is not one class of two: nothing is known of either."""
    x = F.normalize(torch.ones(6, 4))
    same = crd(x, x, target=torch.tensor([0, 0, -100, -100, -100, -100]))
    expected = 2 * (2 * math.log(5) + 4 * math.log(6)) / 6
    torch.testing.assert_close(same, torch.tensor(expected))


def test_the_bank_forgets_no_label_for_a_sample_that_comes_without():
    loss, s, t, _ = _memory(samples=8, negatives=400, partition=1.0)
    index, labels = torch.arange(8), torch.tensor([0, 0, 1, 1, 2, 2, -100, -100])
    loss(s, t, labels, index)
    assert loss.banks is not None
    assert loss.banks.label.tolist() == [0, 0, 1, 1, 2, 2, -1, -1]
    loss(s, t, torch.full((8,), -100), index)
    assert loss.banks.label.tolist() == [0, 0, 1, 1, 2, 2, -1, -1]
    unlabelled = loss.eval()(s, t, torch.full((8,), -100), index)
    assert unlabelled == loss(s, t, None, index)


def test_the_sample_itself_is_no_negative():
    """Every score is 0: each side is log(1 + K/M) and, for each draw of the other sample, log(1 + M/K)."""
    loss = losses.CRD(dim=4, memory=2, negatives=1000, partition=1.0)
    loss.build(torch.zeros(1, 3), torch.zeros(1, 3))
    for parameter in loss.parameters():
        nn.init.zeros_(parameter)
    assert loss.banks is not None
    others = int((loss.banks.draw(1000) == 1).sum())
    assert 400 < others < 600
    value = loss(torch.zeros(1, 3), torch.zeros(1, 3), index=torch.tensor([0]))
    assert value.item() == pytest.approx(2 * (math.log(501) + others * math.log(1 + 1 / 500)), rel=1e-4)


def test_resume_is_exact():
    loss, s, t, index = _memory()
    loss(s, t, index=index)
    other = losses.CRD(dim=16, memory=50, negatives=20)
    other.build(s, t)
    other.load_state_dict(loss.state_dict(), strict=True)
    values = [[each(s, t, index=index).item() for _ in range(3)] for each in (loss, other, copy.deepcopy(loss))]
    assert values[0] == values[1] == values[2]
    assert len(set(values[0])) == 3


def test_splitmix64_gives_the_published_numbers():
    """The first outputs for the seed 1234567, as in Rosetta Code's test of the generator."""
    scrambled = splitmix64(1234567 + torch.arange(1, 4) * -0x61C8864680B583EB)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(x) % 2**64 for x in scrambled] == expected


def test_negatives_are_uniform_and_new_in_each_training_step():
    loss, s, t, index = _memory(negatives=20)
    assert loss.banks is not None
    counts = loss.banks.draw(50_000).bincount(minlength=50)
    assert len(counts) == 50
    assert ((counts - 1000).square() / 1000).sum() < 86  # chi-square, 49 degrees of freedom, p = 0.001
    first = loss.banks.draw(20)
    loss.eval()(s, t, index=index)
    assert torch.equal(loss.banks.draw(20), first)
    loss.train()(s, t, index=index)
    assert set(first.tolist()) != set(loss.banks.draw(20).tolist())


def test_the_students_randomness_is_left_alone():
    """Neither making the banks nor drawing from them moves torch's generator; its seed decides both."""
    before = torch.manual_seed(3).get_state()
    one, other = losses.CRD(dim=4, memory=9, negatives=5), losses.CRD(dim=4, memory=9, negatives=5)
    x = torch.zeros(2, 3)
    with torch.random.fork_rng():
        one.build(x, x)
        torch.manual_seed(4)
        another = losses.CRD(dim=4, memory=9, negatives=5)
    assert all(torch.equal(value, _known(other)[key]) for key, value in _known(one).items())
    assert not any(torch.equal(value, _known(another)[key]) for key, value in _known(one).items())
    one(x, x, index=torch.tensor([1, 2]))
    assert torch.equal(torch.get_rng_state(), before)


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_no_negative_is_gathered_per_sample():
    """Per sample, 64 x 16384 x 128 floats are half a gigabyte; shared, the largest tensor is (K, D)."""
    s, t = torch.randn(64, 32), torch.randn(64, 48)
    loss = losses.CRD(dim=128, memory=20_000, negatives=16384)
    loss.build(s, t)
    with _Largest() as largest:
        loss(s.requires_grad_(), t, index=torch.arange(64)).backward()
    assert largest.numel <= 20_000 * 128  # the bank itself
    assert s.grad is not None


def test_banks_are_made_on_the_device_that_is_asked_for():
    with torch.device("meta"):
        loss = losses.CRD(dim=4, memory=9)
    assert all(buffer.is_meta for buffer in loss.buffers())


def test_memory_compiles_in_one_graph():
    loss, s, t, index = _memory()
    target = torch.zeros(8, dtype=torch.int64)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.isfinite(compiled(s, t, target, index))


def test_extremes_with_memory():
    loss, s, t, index = _memory()
    s = (6e4 * s.sign()).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(s, (6e4 * t.sign()).half(), index=index)
    value.backward()
    assert torch.isfinite(value)
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


def test_bfloat16_weights():
    """Lightning's "bf16-true" casts every module that it finds, banks included."""
    loss, s, t, index = _memory()
    assert torch.isfinite(loss.bfloat16()(s.bfloat16(), t.bfloat16(), index=index))


def test_errors_give_the_remedy():
    loss, s, t, _ = _memory()
    with pytest.raises(ValueError, match=r"needs `index`.*pass index=\.\.\. to the callback.*CRD\(\) without memory"):
        loss(s, t)
    with pytest.raises(ValueError, match="momentum"):
        losses.CRD(momentum=1.0)
    with pytest.raises(ValueError, match="memory"):
        losses.CRD(memory=1)
    for dim in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="dim must be a whole number"):
            losses.CRD(dim=dim)
    with pytest.raises(ValueError, match="target=lambda batch: None"):
        loss(s, t, torch.rand(8), torch.arange(8))
    with pytest.raises(ValueError, match="partition"):
        losses.CRD(memory=10, partition=0.0)


@pytest.mark.parametrize("place", [-1, 24])
def test_a_place_outside_of_the_memory_is_refused(place: int):
    loss = losses.CRD(dim=4, memory=24, negatives=4)
    x = torch.randn(3, 6)
    loss.build(x, x)
    with pytest.raises(ValueError, match=r"index must be in \[0, 24\)"):
        loss(x, x, index=torch.full((3,), place))
