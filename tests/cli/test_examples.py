"""The picture of examples, without training: what is shown, beside what, and when there is none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning_kd.tasks import Classification, Detection, Retrieval, Segmentation, TaskAdapter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_kd.answers import answers
from lightning_kd.cli import compare, examples
from lightning_kd.cli.report import Row
from lightning_kd.data import Digits, MaskScenes, UnseenDigits
from lightning_kd.data.box_images import BoxDataModule
from lightning_kd.drawing import Drawing


class Constant(nn.Module):
    """Says that every pixel is of one class."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 11, *images.shape[-2:])
        logits[:, self.kind] = 5.0
        return logits


def network(task: TaskAdapter, data: LightningDataModule, student: nn.Module) -> Any:
    cli = SimpleNamespace(datamodule=data, trainer=None, model=SimpleNamespace(task=task, student=student))
    return SimpleNamespace(cli=lambda: cli, settings={"data": id(data)})


def row(name: str) -> Row:
    return Row(name, "distilled", {0: {"miou": 0.5}}, higher={"miou": True})


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be plotted."""
    kept: dict[str, Any] = {}
    plot = examples._plot

    def keep(columns: Any, legend: Any, path: Path) -> None:
        kept.update({title: (pictures, lines) for title, pictures, lines in columns}, legend=legend)
        plot(columns, legend, path)

    monkeypatch.setattr(examples, "_plot", keep)
    return kept


def test_a_column_each_of_the_same_images_and_none_of_others(tmp_path: Path, columns: dict[str, Any]) -> None:
    def scenes(count: int) -> MaskScenes:
        return MaskScenes(train_size=4, val_size=2, test_size=count)

    task = Segmentation(11, class_names=scenes(1).class_names)
    each = {"teacher": Constant(3), "student_alone": Constant(0)}
    networks = {name: network(task, scenes(12), student) for name, student in each.items()}
    networks["other"] = network(task, scenes(5), Constant(1))
    assert examples.save([row(name) for name in networks], networks, tmp_path / "e.png")
    assert (tmp_path / "e.png").stat().st_size > 10_000
    assert list(columns) == ["image", "truth", "teacher\nmiou 50.0 %", "student alone\nmiou 50.0 %", "legend"]
    data = scenes(12)
    data.setup("test")
    shown = torch.stack(columns["image"][0])[:, :, ::5, ::5]
    assert torch.equal(shown, torch.stack([data.splits["test"].images[i] for i in (1, 4, 7, 10)]))
    taught, alone = columns["teacher\nmiou 50.0 %"][0][0], columns["student alone\nmiou 50.0 %"][0][0]
    assert (alone == alone[:1]).all()  # nothing but background: the image in grey
    assert (taught != taught[:1]).any(dim=0).all()  # all in the colour of one class


class OddBoxes(BoxDataModule):
    """Images of different sizes, one of them without boxes."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__(2, 0)

    def setup(self, stage: str) -> None:
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
        target = {"boxes": torch.tensor([[2.0, 2.0, 20.0, 30.0]] * 2), "labels": torch.tensor([0, 1])}
        target["ignore"] = torch.tensor([False, True])
        self.splits["test"] = [(torch.rand(3, 40, 60), target), (torch.rand(3, 50, 40), empty)]  # type: ignore[assignment]


class Finder(nn.Module):
    """Finds one box in each image, surely, and one that it is not sure of."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0], [0.0, 0.0, 5.0, 5.0]])
        return [{"boxes": boxes, "scores": torch.tensor([0.9, 0.1]), "labels": torch.tensor([2, 1])} for _ in images]


def test_boxes_of_images_of_any_size(tmp_path: Path, columns: dict[str, Any]) -> None:
    networks = {"student": network(Detection(2, class_names=["cat", "dog"]), OddBoxes(), Finder())}
    assert examples.save([row("student")], networks, tmp_path / "e.png")
    assert list(columns["legend"]) == ["cat", "does not count", "dog"]
    image, truth = columns["image"][0], columns["truth"][0]
    assert [tuple(each.shape[1:]) for each in image] == [(320, 480), (400, 320)]
    assert torch.equal(image[1], truth[1])
    found = (columns["student\nmiou 50.0 %"][0][1] != image[1]).any(dim=0).nonzero()
    assert found.amin() > 5 * 8  # the surer one alone


def test_classes_are_captions(tmp_path: Path, columns: dict[str, Any]) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    networks = {"student": network(Classification(10, class_names=list("abcdefghij")), Digits(), student)}
    assert examples.save([row("student")], networks, tmp_path / "e.png")
    truth, said = columns["truth"][1], columns["student\nmiou 50.0 %"][1]
    assert set(truth) <= set("abcdefghij")
    assert all((line[0] == "✓") == (line[2] == name) for line, name in zip(said, truth, strict=True))


def test_what_is_found_among_other_images(tmp_path: Path, columns: dict[str, Any]) -> None:
    networks = {"student": network(Retrieval(None), UnseenDigits(), nn.Flatten())}
    assert examples.save([row("student")], networks, tmp_path / "e.png")
    assert set(columns["legend"]) == {"of another", "of its class"}
    digits, frame = UnseenDigits(), 6
    digits.setup("test")
    split: Any = digits.splits["test"]
    chosen = [(2 * i + 1) * len(split) // 800 for i in range(400)]
    pixels, labels = split.images[chosen].flatten(1).float(), split.labels[chosen]
    shown = columns["image"][0]
    assert len(shown) == 4
    green = torch.tensor(columns["legend"]["of its class"])
    for image, truth, found in zip(shown, columns["truth"][0], columns["student\nmiou 50.0 %"][0], strict=True):
        (query,) = torch.nonzero((pixels == image[0, ::40, ::40].flatten()).all(1)).flatten().tolist()
        normal = torch.nn.functional.normalize(pixels / 127.5 - 1)
        near = (normal @ normal[query]).index_fill(0, torch.tensor([query]), -2).topk(4).indices
        half = found.shape[-1] // 2
        corners = [found[:, y + frame, x + frame] for y in (0, half) for x in (0, half)]
        assert [torch.equal(c, green) for c in corners] == (labels[near] == labels[query]).tolist()
        middle = [found[0, y + half // 2, x + half // 2] for y in (0, half) for x in (0, half)]
        assert [int(m) for m in middle] == pixels[near].view(4, 8, 8)[:, 4, 4].int().tolist()
        assert all(torch.equal(truth[:, y + frame, x + frame], green) for y in (0, half) for x in (0, half))


def in_role(name: str, role: str) -> Row:
    return Row(name, role, {0: {"recall@1": 0.5}}, higher={"recall@1": True})


class Turned(nn.Module):
    """Embeddings with the numbers in another order: nearest to each other as before, and far from where they were."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).roll(32, dims=1)


class Half(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, ::2]


def test_what_a_student_finds_in_its_teachers_index(tmp_path: Path, columns: dict[str, Any]) -> None:
    students = {"teacher": nn.Flatten(), "alone": Turned(), "same": nn.Flatten(), "turned": Turned(), "half": Half()}
    networks = {name: network(Retrieval(None), UnseenDigits(), student) for name, student in students.items()}
    rows = [in_role("teacher", "teacher"), in_role("alone", "alone")]
    rows += [in_role(name, "distilled") for name in ("same", "turned", "half")]
    assert examples.save(rows, networks, tmp_path / "e.png")
    names = [name.replace("\nrecall@1 50.0 %", "") for name in columns]
    searched = ["same", "same\nin the teacher's index", "turned", "turned\nin the teacher's index", "half"]
    assert names == ["image", "truth", "teacher", "alone", *searched, "legend"]
    shown = {
        name: torch.stack(found[0]) for name, found in zip(names, columns.values(), strict=True) if name != "legend"
    }
    assert torch.equal(shown["turned"], shown["teacher"])  # in its own index nothing is turned
    assert torch.equal(shown["same\nin the teacher's index"], shown["teacher"])
    assert not torch.equal(shown["turned\nin the teacher's index"], shown["teacher"])


def test_of_two_teachers_it_is_not_known_whose_index_a_student_searches(
    tmp_path: Path, columns: dict[str, Any]
) -> None:
    networks = {name: network(Retrieval(None), UnseenDigits(), nn.Flatten()) for name in ("one", "two", "student")}
    rows = [in_role("one", "teacher"), in_role("two", "teacher"), in_role("student", "distilled")]
    assert examples.save(rows, networks, tmp_path / "e.png")
    assert not any("index" in name for name in columns)


def test_images_that_are_all_different_find_nothing() -> None:
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 3
    assert Retrieval(None).draw(images, (torch.zeros(3, 1, 8, 8), torch.arange(3)), torch.rand(3, 4)) is None


def test_few_queries_are_all_drawn_once() -> None:
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 3
    drawn = Retrieval(None).draw(images, (torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 0])), torch.rand(3, 4))
    assert drawn is not None
    assert drawn.of == [0, 2]


class Readings(Dataset[Any]):
    """Three documents and two questions, of which one is answered by the third; they are points."""

    names = ("north", "east", "south | west", "whither?", "of nobody")

    def __init__(self) -> None:
        self.points = torch.tensor([[1.0, 0.0], [0.7, 0.7], [0.0, 1.0], [0.1, 0.9], [1.0, 1.0]])

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        answer = torch.tensor([12 if index == 3 else -1, -1])
        return self.points[index], torch.tensor([10, 11, 12, -1, -1])[index], answer


class Library(LightningDataModule):
    def __init__(self, shuffle: bool = False) -> None:
        super().__init__()
        self.shuffle = shuffle

    def test_dataloader(self) -> Any:
        return DataLoader(Readings(), batch_size=2, shuffle=self.shuffle)


class Mirrored(nn.Module):
    def forward(self, points: Tensor) -> Tensor:
        return points.flip(1)


def library(shuffle: bool = False) -> tuple[list[Row], dict[str, Any]]:
    task, data = Retrieval(None, relevance="judgments"), Library(shuffle)
    networks = {
        name: network(task, data, model) for name, model in {"teacher": nn.Identity(), "far": Mirrored()}.items()
    }
    return [in_role("teacher", "teacher"), in_role("far", "distilled")], networks


def test_what_is_found_among_texts_is_told_in_a_table(tmp_path: Path) -> None:
    rows, networks = library()
    assert not examples.save(rows, networks, tmp_path / "e.png")
    assert examples.write(rows, networks, tmp_path / "e.md")
    assert (tmp_path / "e.md").read_text().splitlines() == [
        "**whither?** (1 of 3 documents answers it)",
        "",
        "| found by | 1 | 2 | 3 |",
        "|---|---|---|---|",
        "| teacher | ✓ south \\| west | east | north |",
        "| far | ✓ south \\| west | east | north |",
        "| far, in the teacher's index | north | east | ✓ south \\| west |",
    ]


@pytest.mark.parametrize("why", ["in another order", "too many", "without names", "of labels"])
def test_what_cannot_be_read_is_not_told(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, networks = library(shuffle=why == "in another order")
    if why == "too many":
        networks["teacher"].cli().model.task.told_among = 4
    elif why == "without names":
        monkeypatch.delattr(Readings, "names")
    elif why == "of labels":
        networks = {row.name: network(Retrieval(None), Library(), nn.Identity()) for row in rows}
    assert not examples.write(rows, networks, tmp_path / "e.md")
    assert not list(tmp_path.iterdir())


def test_long_texts_are_shortened_between_words() -> None:
    points, numbers = torch.eye(2)[[0, 1, 0]], torch.tensor([0, 1, -1])
    texts = ["a long text about birds", "unbreakablelongword", "a question that stays whole"]
    told = answers(texts, numbers, [(), (), (0, 1)], {"teacher": (points, points)}, length=12)
    assert told.splitlines()[0] == "**a question that stays whole** (2 of 2 documents answer it)"
    assert told.splitlines()[-1] == "| teacher | ✓ a long text … | ✓ unbreakablel … |"


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield torch.rand(3, 8, 8), 0


class Streamed(LightningDataModule):
    def test_dataloader(self) -> Any:
        return DataLoader(Stream())


class Silent(Segmentation):
    def draw(self, images: Any, batch: Any, prediction: Any = None) -> None:
        return None


class Plain(TaskAdapter):
    def loss(self, output: Any, batch: Any) -> Tensor:
        return output.sum()


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (Segmentation(11), Streamed()),
        (Plain(), LightningDataModule()),
        (Silent(11), MaskScenes(train_size=2, val_size=2, test_size=2)),
    ],
)
def test_where_nothing_can_be_drawn_there_is_no_file(
    task: TaskAdapter, data: LightningDataModule, tmp_path: Path
) -> None:
    assert not examples.save([row("student")], {"student": network(task, data, Constant(0))}, tmp_path / "e.png")
    assert not list(tmp_path.iterdir())


class Dicts(LightningDataModule):
    def test_dataloader(self) -> Any:
        return DataLoader([{"image": torch.rand(3, 8, 8)}] * 4)  # type: ignore[arg-type]


class OfDicts(Plain):
    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"])

    def draw(self, images: Any, batch: Any, prediction: Any = None) -> Drawing:
        return Drawing(images)


class Failing(OfDicts):
    def inputs(self, batch: Any) -> Any:
        return batch["image"]

    def draw(self, images: Any, batch: Any, prediction: Any = None) -> Drawing:
        raise IndexError("no such colour")


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (OfDicts(), "a dict with the keys 'image'. Let the data set return such pairs, or override inputs() of the ta"),
        (Failing(), "e.png is left out: no such colour (IndexError, test_examples.py, line "),
    ],
)
def test_what_keeps_pictures_from_being_drawn_is_told_and_the_comparison_goes_on(
    task: TaskAdapter, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not compare._draw([row("student")], {"student": network(task, Dicts(), Constant(0))}, tmp_path / "e.png")
    assert told in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
