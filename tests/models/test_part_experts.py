from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning_kd.tasks import Pose

from lightning_kd import DistillationModule, Term, losses
from lightning_kd.data import KeypointScenes
from lightning_kd.models import PartExperts, PoseNet

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def net(joints: int, head: Any = "simcc", size: int = 32) -> PoseNet:
    return PoseNet("resnet10t", joints, (size, size), head=head, channels=8, stride=8)


@pytest.mark.parametrize("head", ["simcc", "heatmap", "coordinates"])
def test_each_joint_is_what_its_experts_say(head: Any) -> None:
    corners, centre = net(4, head).eval(), net(2, head).eval()
    experts = PartExperts([(corners, [3, 2, 1, 0]), (centre, [4, 0])], num_keypoints=6)
    images = torch.rand(2, 3, 32, 32)
    for whole, one, other in zip(experts(images), corners(images), centre(images), strict=True):
        torch.testing.assert_close(whole[:, [3, 2, 1, 4]], torch.cat((one[:, :3], other[:, :1]), dim=1))
        torch.testing.assert_close(whole[:, 0], (one[:, 3] + other[:, 1]) / 2)
        assert whole[:, 5].isnan().all()
    assert experts.known.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("loss", [losses.KD(temperature=1.0), losses.DIST()], ids=["KD", "DIST"])
def test_what_no_expert_knows_is_left_out_of_the_term(loss: torch.nn.Module) -> None:
    data = KeypointScenes(batch_size=4, train_size=8, val_size=4, test_size=4, size=32)
    experts = PartExperts([(net(4), [0, 1, 2, 3]), (net(2), [4, 7])], num_keypoints=9)
    terms = {"parts": Term(losses.Jointwise(loss), student="simcc", teacher="simcc")}
    module = DistillationModule(Pose(9), net(9), experts, terms)
    trainer = Trainer(max_steps=2, **QUIET, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["train/parts"]) > 0
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert not module.task.joints(batch)[:, [5, 6, 8]].any()  # type: ignore[operator]


def test_elsewhere_a_term_that_is_no_number_stops_the_run() -> None:
    experts = PartExperts([(net(4), [0, 1, 2, 3])], num_keypoints=9)
    said, taught = net(9)(torch.rand(2, 3, 32, 32)).simcc_x, experts(torch.rand(2, 3, 32, 32)).simcc_x
    assert losses.Jointwise(losses.KD())(said, taught).isnan()
    assert losses.Jointwise(losses.KD())(said, taught, experts.known.expand(2, 9)).isfinite()


def test_what_does_not_fit_is_told() -> None:
    images = torch.rand(2, 3, 32, 32)
    for joints in ([0, 0], [0, 7], [-1, 0]):
        with pytest.raises(ValueError, match="different numbers from 0 to 6"):
            PartExperts([(net(2), joints)], num_keypoints=7)
    with pytest.raises(ValueError, match="says something of 2 joints, and 3 are given"):
        PartExperts([(net(2), [0, 1, 2])], num_keypoints=7)(images)
    with pytest.raises(ValueError, match="the experts say different things"):
        PartExperts([(net(2), [0, 1]), (net(2, "heatmap"), [2, 3])], num_keypoints=7)(images)
