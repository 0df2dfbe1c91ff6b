import pytest
import torch

from lightning_kd.teachers import LabelNoise


def test_the_image_stays_and_every_class_has_one_value_per_image() -> None:
    images = torch.randn(2, 3, 6, 6)
    target = torch.randint(0, 4, (2, 6, 6))
    target[:, 0] = 255
    made = LabelNoise(num_classes=4, noise=0.0)(images, target=target)
    assert torch.equal(made[:, :3], images)
    for image, labels in zip(made[:, 3], target, strict=True):
        values = [image[labels == k].unique() for k in (0, 1, 2, 3, 255)]
        assert all(len(value) == 1 for value in values)
        assert len(torch.cat(values).unique()) == 5
    assert not torch.equal(made[0, 3].unique(), made[1, 3].unique())  # drawn for each image
    assert not torch.equal(LabelNoise(4, noise=0.0)(images, target=target), made)  # and anew


def test_drawn_values_are_standard_normal_and_noise_is_as_told() -> None:
    images, target = torch.zeros(4000, 1, 2, 2), torch.tensor([[0, 0], [1, 1]]).expand(4000, 2, 2)
    channel = LabelNoise(2, noise=0.5, scale=3.0)(images, target=target)[:, 1]
    assert channel.mean().abs() < 0.2
    of_class = channel.mean(2)  # of two pixels
    assert abs(of_class.std().item() - 3.0 * (1 + 0.5**2 / 2) ** 0.5) < 0.1
    within = channel[:, 0, 0] - channel[:, 0, 1]
    assert abs(within.std().item() - 3.0 * 0.5 * 2**0.5) < 0.1


def test_spread_values_are_those_of_the_authors_code_for_21_classes() -> None:
    target = torch.arange(22).view(1, 2, 11)
    channel = LabelNoise(21, values="spread", noise=0.0)(torch.zeros(1, 3, 2, 11), target=target)[0, 3]
    torch.testing.assert_close(channel.flatten(), (torch.arange(22.0) - 11) / 10)


def test_labels_of_another_resolution() -> None:
    target = torch.tensor([[[0, 1], [2, 3]]])
    channel = LabelNoise(4, noise=0.0)(torch.zeros(1, 3, 4, 4), target=target)[0, 3]
    assert all(len(block.unique()) == 1 for block in (channel[:2, :2], channel[:2, 2:], channel[2:, :2]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 1}, "at least two classes"),
        ({"num_classes": 3, "noise": -1.0}, "noise=-1.0"),
        ({"num_classes": 3, "scale": 0.0}, "positive scale"),
        ({"num_classes": 3, "values": "random"}, "'drawn' or 'spread', got 'random'"),
    ],
)
def test_bad_arguments(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LabelNoise(**options)  # type: ignore[arg-type]


def test_bad_labels() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 4\) and torch.int64 \(2,\)"):
        LabelNoise(3)(torch.zeros(2, 3, 4, 4), target=torch.zeros(2, dtype=torch.long))
