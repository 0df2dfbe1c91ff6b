import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_kd.tasks import Pose
from PIL import Image
from torchvision.transforms import v2

from lightning_kd.data import KeypointCsv
from lightning_kd.data.keypoint_csv import FACE68_PAIRS


def write(root: Path, rows: list[dict[str, object]]) -> None:
    with (root / "keypoints.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(root: Path) -> list[dict[str, Any]]:
    with (root / "keypoints.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images of 20 x 40 pixels with a white dot at each joint, a red one at joint 0."""
    (tmp_path / "images").mkdir()
    rows: list[dict[str, object]] = []
    for i in range(6):
        points = [(4 + i, 5.5), (30.5, 12.5)]
        image = Image.new("RGB", (40, 20))
        for k, (x, y) in enumerate(points):
            for dx in (-1, 0, 1):
                for dy in (-1, 0, 1):
                    image.putpixel((int(x) + dx, int(y) + dy), (255, 255 * k, 255 * k))
        image.save(tmp_path / "images" / f"{i}.png")
        split = ("train", "train", "train", "train", "val", "test")[i]
        rows.append({"file": f"{i}.png", "subject": "s", "split": split})
        rows[-1] |= {f"{a}{k}": p for k, point in enumerate(points) for a, p in zip("xy", point, strict=True)}
    write(tmp_path, rows)
    return tmp_path


def dots(image: torch.Tensor) -> torch.Tensor:
    """The centres of the red and of the white dot, in pixels from the left upper corner."""
    found = []
    for there in (image[0] - image[1], image[1]):
        weight = there.float().clamp(min=0)
        rows, columns = torch.arange(image.shape[1]) + 0.5, torch.arange(image.shape[2]) + 0.5
        found.append(torch.stack(((weight.sum(0) * columns).sum(), (weight.sum(1) * rows).sum())) / weight.sum())
    return torch.stack(found)


@pytest.mark.parametrize("size", [(20, 40), (40, 40), (60, 80)])
def test_points_follow_the_resizing_and_the_mirror(root: Path, size: tuple[int, int]) -> None:
    for flip in (0.0, 1.0):
        data = KeypointCsv(str(root), size, flip=flip, flip_pairs=[], batch_size=2)
        data.setup("fit")
        for image, points in (data.splits["train"][i] for i in range(4)):
            centre = points[:, :2] + (torch.tensor([[0.5, 0.0], [0.0, 0.0]]) * size[1] / 40) * (-1 if flip else 1)
            torch.testing.assert_close(dots(image), centre, atol=0.35, rtol=0)
            assert points[:, 2].tolist() == [2, 2]


def test_pairs_change_places_in_the_mirror(root: Path) -> None:
    plain, mirrored = (
        KeypointCsv(str(root), (20, 40), flip=flip, flip_pairs=[(0, 1)], batch_size=2) for flip in (0.0, 1.0)
    )
    for data in (plain, mirrored):
        data.setup("fit")
    (_, one), (_, other) = plain.splits["train"][0], mirrored.splits["train"][0]
    torch.testing.assert_close(other[:, 0], 40 - one[[1, 0], 0])
    torch.testing.assert_close(other[:, 1], one[[1, 0], 1])


def test_transforms_are_of_image_and_points_and_of_training_only(root: Path) -> None:
    data = KeypointCsv(str(root), (20, 40), transforms=[v2.RandomAffine(0, translate=(0.1, 0.1)), v2.Identity()])
    for stage in ("fit", "test"):
        data.setup(stage)
    torch.manual_seed(0)
    image, points = data.splits["train"][0]
    assert (points[:, :2] - torch.tensor([[4.0, 5.5], [30.5, 12.5]])).abs().max() >= 1
    torch.testing.assert_close(dots(image)[1], points[1, :2], atol=0.35, rtol=0)
    torch.testing.assert_close(data.splits["test"][0][1][:, :2], torch.tensor([[9.0, 5.5], [30.5, 12.5]]))


def test_joints_without_a_label_and_outside_of_the_image_do_not_count(root: Path) -> None:
    rows = table(root)
    rows[0]["x0"] = rows[0]["y0"] = ""
    rows[1]["x1"] = "40.5"
    write(root, rows)
    data = KeypointCsv(str(root), (10, 20), batch_size=2)
    data.setup("fit")
    samples = [data.splits["train"][i] for i in range(4)]
    batch = torch.stack([image for image, _ in samples]), torch.stack([points for _, points in samples])
    assert Pose(2).joints(batch).tolist() == [[False, True], [True, False], [True, True], [True, True]]


def test_visibilities_are_read(root: Path) -> None:
    rows = [row | {"v0": "0", "v1": "1"} for row in table(root)]
    write(root, rows)
    data = KeypointCsv(str(root), (20, 40))
    data.setup("test")
    assert data.splits["test"][0][1][:, 2].tolist() == [0, 1]


def test_a_joint_that_was_not_looked_for_needs_no_place(root: Path) -> None:
    write(root, [row | {"x0": "", "y0": "", "v0": "-100", "x1": "", "y1": "", "v1": "2"} for row in table(root)])
    data = KeypointCsv(str(root), (20, 40))
    data.setup("test")
    image, points = data.splits["test"][0]
    assert points[:, 2].tolist() == [-100, 0]
    assert Pose(2).joints((image[None], points[None])).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x1": "left"}, r"keypoints\.csv, line 2: expected numbers as places.*left"),
        ({"x1": "nan"}, "line 2.*joint 1"),
    ],
)
def test_places_that_are_no_numbers_are_told(root: Path, change: dict[str, str], told: str) -> None:
    rows = table(root)
    rows[0] |= change
    write(root, rows)
    with pytest.raises(ValueError, match=told):
        KeypointCsv(str(root), (20, 40))


def test_files_that_are_not_there_or_damaged_are_told(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no list of keypoints at .*other\.csv"):
        KeypointCsv(str(root), (20, 40), csv_file="other.csv")
    data = KeypointCsv(str(root), (20, 40))
    data.setup("fit")
    (root / "images" / "1.png").write_bytes((root / "images" / "1.png").read_bytes()[:60])
    (root / "images" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        data.splits["train"][1]
    with pytest.raises(FileNotFoundError, match=r"no image at .*2\.png"):
        data.splits["train"][2]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no column 'file'"),
        ("file,split\n", "no column 'x0'"),
        ("file,split,x0\n", "no column 'y0'"),
        ("name,split,x0,y0\n", "no column 'file'"),
        ("file,split,x0,y0\n", "lists no image"),
        ("file,split,x0,y0\na.png,train,1\n", "line 2"),
    ],
)
def test_tables_of_another_form_are_told(root: Path, text: str, told: str) -> None:
    (root / "keypoints.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        KeypointCsv(str(root), (20, 40))


def test_what_does_not_fit_is_told(root: Path) -> None:
    with pytest.raises(ValueError, match="pairs of the joints 0 to 1"):
        KeypointCsv(str(root), (20, 40), flip_pairs="face68")
    with pytest.raises(ValueError, match="expected flip_pairs"):
        KeypointCsv(str(root), (20, 40), flip=0.5)
    data = KeypointCsv(str(root), (20, 40), transforms=[v2.CenterCrop(16)])
    data.setup("fit")
    with pytest.raises(ValueError, match="16 x 16 pixels after the transforms"):
        data.splits["train"][0]
    rows = [row | {"split": "train"} for row in table(root)]
    write(root, rows)
    with pytest.raises(ValueError, match=r"no row of .* has the split 'val'"):
        KeypointCsv(str(root), (20, 40)).setup("fit")


def test_every_point_of_a_face_has_its_like_or_is_in_the_middle() -> None:
    there = sorted(joint for pair in FACE68_PAIRS for joint in pair)
    assert len(there) == len(set(there))
    assert sorted(set(range(68)) - set(there)) == [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]


@pytest.mark.slow
def test_the_faces(data_dir: Path) -> None:
    data = KeypointCsv(str(data_dir / "face68_112"), (112, 112), flip=1.0, flip_pairs="face68")
    for stage in ("fit", "test"):
        data.setup(stage)
    for split, count in {"train": 2409, "val": 279, "test": 774}.items():
        part = data.splits[split]
        assert len(part) == count  # type: ignore[arg-type]
        image, points = part[0]
        assert (image.shape, points.shape) == ((3, 112, 112), (68, 3))
        assert points[36, 0] < points[45, 0]  # the eye on the left stays the one on the left, mirrored or not
