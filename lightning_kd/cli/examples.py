"""Examples: some test images or questions, the truth, and what every network of a comparison says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.report import Row, in_percent, mean_std, metric_names
from lightning_kd.cli.runs import Tested
from lightning_kd.cli.settings import fingerprint
from lightning_kd.drawing import Colour, Drawing, enlarged, in_order, looks, spread
from lightning_kd.task import TaskAdapter

COUNT = 4
"""Images, evenly spread over the test data; a task that draws several together chooses among them."""

WIDTH = 1.9
"""Of a column, in inches."""


class Example(NamedTuple):
    """One test image, or those among which the task draws.

    Attributes:
        images: As they look.
        batch: These alone, as the network gets them.
    """

    images: list[Tensor]
    batch: Any


Column = tuple[str, list[Tensor], list[str]]
"""Title, pictures, captions."""


def save(rows: Sequence[Row], tested: Mapping[str, Tested], path: Path) -> bool:
    """Draw the examples, one row each, with a column for every network; its first seed stands for it.

    Args:
        rows: Of the table.
        tested: By the rows' names, the networks.
        path: Where to.

    Returns:
        Whether there was something to draw: a task that draws, and images.
    """
    columns: list[Column] = []
    legend: dict[str, Colour] = {}
    by_data: dict[str, list[Example]] = {}
    first: list[Example] = []
    taught: list[Any] = []
    for row in rows:
        cli = tested[row.name].cli()
        if type(cli.model.task).draw is TaskAdapter.draw:  # its data may be anything: leave them alone
            return False
        key = fingerprint({"data": tested[row.name].settings["data"]})
        if key not in by_data:
            by_data[key] = examples(cli)
        mine = by_data[key]
        if not columns:
            first = mine
            truth = list(drawings(cli, mine))
            if not truth:
                return False
            images = [one.images[i] for one, each in zip(mine, truth, strict=True) for i in _of(one, each)]
            columns = [("image", [enlarged(image)[0] for image in images], []), _column(truth)]
            _add(legend, truth)
        same = len(mine) == len(first) and all(
            a.shape == b.shape and torch.equal(a, b)
            for one, other in zip(mine, first, strict=True)
            for a, b in zip(one.images, other.images, strict=True)
        )
        if same:  # else its data show other images: there is nothing to stand beside
            said = list(predicted(cli, [batch for _, batch in mine]))
            found = list(drawings(cli, mine, said))
            columns.append(_column(found, _title(row, rows)))
            _add(legend, found)
            if row.name == _only_teacher(rows):
                taught = said
            if taught and row.role == "distilled":
                both = list(drawings(cli, mine, said, taught))
                columns += [_column(both, f"{row.name.replace('_', ' ')}\n{both[0].title}")] if both else []
    _plot(columns, legend, path)
    return True


def write(rows: Sequence[Row], tested: Mapping[str, Tested], path: Path) -> bool:
    """Write about data that are read, such as texts; the first seed of every network stands for it.

    Args:
        rows: Of the table.
        tested: By the rows' names, the networks.
        path: Where to.

    Returns:
        Whether there was something to tell: a task that does, and ``names`` of all that is in the test data.
    """
    first = tested[rows[0].name]
    task, data = first.cli().model.task, first.settings["data"]
    if type(task).tell is TaskAdapter.tell or not task.told_among:
        return False
    loader, _ = _loader(first.cli())
    dataset = getattr(loader, "dataset", None)
    names = getattr(dataset, "names", None)
    batched = getattr(loader, "batch_sampler", None)
    in_order = type(batched) is BatchSampler and isinstance(batched.sampler, SequentialSampler)
    if names is None or not in_order or not 0 < len(names) <= task.told_among:
        return False
    batches: list[Any] = []
    said = {}
    for row in rows:
        if tested[row.name].settings["data"] == data:
            cli = tested[row.name].cli()
            batches = batches or [_arrived(cli, raw) for raw in _loader(cli)[0]]
            said[row.name] = list(predicted(cli, batches))
    text = task.tell(names, batches, said, _only_teacher(rows))
    if text is None:
        return False
    path.write_text(f"{text}\n", encoding="utf-8")
    return True


def examples(cli: DistillationCLI) -> list[Example]:
    """Returns images of the test data; [] if there are none.

    Each is a batch of its own, since their sizes may differ, unless the task draws several together.
    """
    loader, data = _loader(cli)
    dataset: Any = getattr(loader, "dataset", None)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return []
    together, found = cli.model.task.drawn_among, []
    chosen = spread(len(dataset), COUNT if together == 1 else together)
    several = getattr(dataset, "__getitems__", None)
    for indices in [chosen[i : i + together] for i in range(0, len(chosen), together)]:
        raw = loader.collate_fn(several(indices) if several else [dataset[index] for index in indices])
        # As the loader gives them: what the data module does on the device, it need not undo.
        images = looks(cli.model.task.inputs(raw), getattr(data, "mean", None), getattr(data, "std", None))
        if images is None:
            return []
        found.append(Example(images, _arrived(cli, raw)))
    return found


def _loader(cli: DistillationCLI) -> tuple[Any, Any]:
    """The loader of the test data, and the data."""
    data: Any = cli.datamodule
    data.trainer = cli.trainer
    data.setup("test")
    return data.test_dataloader(), data


def _arrived(cli: DistillationCLI, raw: Any) -> Any:
    """A batch as the network gets it."""
    data: Any = cli.datamodule
    return data.on_after_batch_transfer(data.on_before_batch_transfer(raw, 0), 0)


def predicted(cli: DistillationCLI, batches: Sequence[Any]) -> Iterator[Any]:
    """Yields what the network predicts of each batch."""
    task, student = cli.model.task.eval(), cli.model.student.eval()
    for batch in batches:
        with torch.no_grad():
            found = task.predict_batch(task(student, batch), batch)
        yield found


def drawings(
    cli: DistillationCLI, given: Sequence[Example], said: Sequence[Any] = (), taught: Sequence[Any] = ()
) -> Iterator[Drawing]:
    """Yields what the task draws of each example: the truth, what the network said, or what it and its teacher did."""
    task = cli.model.task
    for i, (images, batch) in enumerate(given):
        if taught:
            drawn = task.draw_with_teacher(images, batch, said[i], taught[i])
        else:
            drawn = task.draw(images, batch, said[i] if said else None)
        if drawn is not None:
            yield drawn


def _only_teacher(rows: Sequence[Row]) -> str:
    """The name of the teacher's row, where there is one only."""
    teachers = [row.name for row in rows if row.role == "teacher"]
    return teachers[0] if len(teachers) == 1 else ""


def _of(example: Example, drawn: Drawing) -> Sequence[int]:
    return range(len(example.images)) if drawn.of is None else drawn.of


def _column(drawn: Sequence[Drawing], title: str = "truth") -> Column:
    return title, [image for each in drawn for image in each.images], [line for each in drawn for line in each.captions]


def _add(legend: dict[str, Colour], drawn: Sequence[Drawing]) -> None:
    for each in drawn:
        legend.update(each.legend)


def _title(row: Row, rows: Sequence[Row]) -> str:
    name = row.name.replace("_", " ")
    metric = metric_names([row])[0]
    if not row.values(metric):
        return name
    mean, _ = mean_std(row.values(metric))
    value = f"{100 * mean:.1f} %" if in_percent(rows, metric) else f"{mean:.3g}"
    return f"{name}\n{metric.replace('_', ' ')} {value}"


def _plot(columns: Sequence[Column], legend: Mapping[str, Colour], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - of an extra
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    images = columns[0][1]
    heights = [WIDTH * image.shape[-2] / image.shape[-1] for image in images]
    captions = 0.22 if any(lines for _, _, lines in columns) else 0.0
    width = WIDTH * len(columns)
    longest = max((len(name) for name in legend), default=0)
    per_line = min(max(1, int(width / (0.45 + 0.075 * longest))), max(1, len(legend)))
    below = 0.17 * -(-len(legend) // per_line) + 0.1 if legend else 0.0
    size = (width, sum(heights) + captions * len(images) + below + 0.32)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=size, layout=layout, dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for column, (title, pictures, lines) in enumerate(columns):
        for row, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="antialiased")
            axis.set_axis_off()
            if row == 0:
                _write_title(axis, title)
            if lines:
                axis.text(0.5, -0.03, lines[row], transform=axis.transAxes, ha="center", va="top", fontsize=8)
    if legend:
        patches = [
            Patch(color="#{:02x}{:02x}{:02x}".format(*colour), label=name) for name, colour in in_order(legend).items()
        ]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=per_line, frameon=False, fontsize=8,
            handlelength=1.0, handleheight=1.0, columnspacing=1.2, handletextpad=0.5,
        )  # fmt: skip
    figure.savefig(path)


def _write_title(axis: Any, title: str) -> None:
    name, _, metric = title.partition("\n")
    axis.set_title(f"{name}\n" if not metric else name, fontsize=9, pad=14 if metric else 2)
    if metric:
        axis.text(0.5, 1.03, metric, transform=axis.transAxes, ha="center", va="bottom", fontsize=7.5, color="#5b6470")
