import torch

from lightning_kd.data import KeypointScenes
from lightning_kd.data.keypoint_scenes import JOINTS, cards


def test_scenes_are_decided_by_their_arguments() -> None:
    (images, points), (again, _), (other, _) = cards(4, seed=1), cards(4, seed=1), cards(4, seed=2)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert (images.dtype, images.shape, points.shape) == (torch.uint8, (4, 3, 64, 64), (4, len(JOINTS), 3))


def test_corners_are_a_square_that_is_read_upright() -> None:
    points = cards(200, seed=0)[1]
    corners, centre = points[:, :4, :2], points[:, 4, :2]
    torch.testing.assert_close(corners.mean(1), centre, atol=1e-3, rtol=0)
    sides = corners.roll(-1, dims=1) - corners
    length = sides.norm(dim=-1)
    torch.testing.assert_close(length, length[:, :1].expand(-1, 4), atol=1e-3, rtol=1e-4)
    right, down = sides[:, 0], sides[:, 1]
    torch.testing.assert_close(torch.stack((-right[:, 1], right[:, 0]), dim=-1), down, atol=1e-3, rtol=1e-4)
    assert (right[:, 0] > 0.75 * length[:, 0]).all()  # turned by 40 degrees at most


def test_the_card_is_where_the_corners_are() -> None:
    images, points = cards(50, seed=3, noise=0.0)
    for image, joints in zip(images.float(), points, strict=True):
        for corner in joints[:4]:
            towards = joints[4, :2] - corner[:2]
            inside, outside = (corner[:2] + d * 3 * towards / towards.norm() for d in (1, -1))
            ends = torch.stack((inside, outside))
            if bool(((ends >= 0) & (ends < 64)).all()):
                a, b = (image[:, int(p[1]), int(p[0])] for p in (inside, outside))
                assert (a - b).abs().max() > 4


def test_joints_outside_of_the_image_have_no_label() -> None:
    points = cards(300, seed=0)[1]
    inside = ((points[..., :2] >= 0) & (points[..., :2] < 64)).all(-1)
    assert torch.equal(points[..., 2] == 2, inside)
    assert torch.equal(points[..., 2] == 0, ~inside)
    assert 0.02 < (~inside).float().mean() < 0.3


def test_batches() -> None:
    data = KeypointScenes(batch_size=4, train_size=8, val_size=4, test_size=4, size=32)
    data.setup("fit")
    assert (data.num_keypoints, data.image_size) == (9, (32, 32))
    images, points = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert (images.shape, images.dtype, points.shape) == ((4, 3, 32, 32), torch.float32, (4, 9, 3))
