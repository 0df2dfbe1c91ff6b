from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_kd.data import Omniglot, UnseenDigits


def test_digits_of_the_test_are_never_trained_on() -> None:
    data = UnseenDigits(batch_size=20, per_class=5)
    data.setup("fit")
    seen, held, unseen = (set(data.splits[name].labels.tolist()) for name in ("train", "val", "test"))  # type: ignore[attr-defined]
    assert seen == held == set(range(6))
    assert unseen == {6, 7, 8, 9}
    assert sum(map(len, data.splits.values())) == 1797  # type: ignore[arg-type]


def test_training_batches_are_balanced() -> None:
    data = UnseenDigits(batch_size=20, per_class=5)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 43
    for _, labels in batches:
        assert labels.unique(return_counts=True)[1].tolist() == [5] * 4


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"batch_size": 30, "per_class": 4}, "batch_size=30 is not a multiple of per_class=4"),
        ({"batch_size": 30, "per_class": 1}, "is not a multiple of per_class=1, which is at least 2"),
        ({"unseen": [3]}, "unseen are two to eight of the digits"),
        ({"unseen": [3, 12]}, "unseen are two to eight of the digits"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        UnseenDigits(**wrong)


def test_more_classes_in_a_batch_than_there_are_is_refused() -> None:
    data = UnseenDigits(batch_size=40, per_class=5)
    data.setup("fit")
    with pytest.raises(ValueError, match="the training data has 6 classes, and a batch of batch_size=40"):
        data.train_dataloader()


@pytest.mark.slow
def test_omniglot_has_no_character_on_both_sides(data_dir: Path) -> None:
    data = Omniglot(root=str(data_dir), size=20)
    data.setup("fit")
    sizes = {name: (len(split), len(split.labels.unique())) for name, split in data.splits.items()}  # type: ignore[attr-defined,arg-type]
    assert sizes == {"train": (136 * 16, 136), "val": (136 * 4, 136), "test": (106 * 20, 106)}
    images, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (128, 1, 20, 20)
    assert images[:, 0, 0].mean() < -0.9  # paper at the border
    assert 0.02 < (images > 0).float().mean() < 0.2  # ink
    trained, unseen = (data.splits[name].images.flatten(1) for name in ("train", "test"))  # type: ignore[attr-defined]
    same = torch.cdist(unseen.float(), trained.float()).amin(1) == 0
    assert not same.any()


def test_without_the_drawings_it_is_said_where_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no drawings at .*omniglot/images_background_small1.zip"):
        Omniglot(root=str(tmp_path)).setup("fit")
