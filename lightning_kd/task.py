"""What a task adds to distillation: how its model is called, supervised, measured and tapped."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_kd.drawing import Drawing
from lightning_kd.numbers import is_whole
from lightning_kd.predictions import PredictionFile
from lightning_kd.wiring import describe

UNLABELLED = -100
"""The class of a sample that has none: torch's cross-entropy leaves it out."""


class TaskAdapter(nn.Module, ABC):
    """Adapts ``DistillationModule`` to a task.

    The smallest adapter has a supervised ``loss``; everything else has a default for batches of
    ``(inputs, target)`` and models that take the inputs.

    Example:
        >>> import torch
        >>> class Regression(TaskAdapter):
        ...     def loss(self, output, batch):
        ...         return torch.nn.functional.mse_loss(output, batch[1])
        >>> batch = torch.ones(2, 3), torch.zeros(2, 3)
        >>> float(Regression().loss(Regression()(torch.nn.Identity(), batch), batch))
        1.0
    """

    teacher_input: Callable[..., Any] | None = None
    """Makes the teacher's arguments out of the student's, where the task's models are called otherwise to teach than to
    learn; ``teacher_input`` of the module comes before it."""

    student_input: Callable[..., Any] | None = None
    """Makes the student's arguments in training where there is a teacher, likewise: another view, or targets out of
    what the teacher said, which a keyword-only parameter ``teacher`` asks for."""

    as_taught: Callable[..., Any] | None = None
    """Set before ``meet``: all that makes the arguments of the teacher's network out of the student's, the ``input`` of
    a ``Frozen`` included, for a task that calls it itself; None where they are equal."""

    only_trains: ClassVar[Sequence[str]] = ()
    """Arguments without which ``deployed`` makes the same, and that may be left out: data to train with, say."""
    main_metric: str = ""
    """The metric by which ``lightning-kd compare`` judges, of those in ``metrics()``; unless said the first by its
    name, as torchmetrics orders them."""

    with_teacher: bool = False
    """Whether what is said of a batch depends on the teacher that was met: then ``lightning-kd compare`` measures the
    student alone without one."""

    drawn_among: int = 1
    """How many test images ``draw`` gets at once: more than one where what is said of an image is other images."""

    told_among: int = 0
    """Up to how many test samples ``tell`` gets at once; where there are more, or with 0, it is not asked."""

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        """Is told which models meet, before they are called: to refuse a pair, or for its ``teacher_input``."""

    def begin_epoch(self, epoch: int) -> None:
        """Is told that an epoch of the training begins, for models that change with it."""

    def begin_validation(self) -> None:
        """Is told that a validation begins, for what is calibrated on its batches; not of the sanity check."""

    def end_validation(self, student: nn.Module) -> None:
        """Is told that it has ended, before its metrics are logged: what was calibrated may be kept in the student."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model on a batch, for training and evaluation; returns what it returns."""
        inputs = self.inputs(batch)
        try:
            return model(inputs)
        except TypeError as error:
            if isinstance(inputs, tuple | Mapping):
                error.add_note(
                    f"{type(self).__name__}.inputs returned {describe(inputs)}, which is one argument of the model. "
                    "Override the task's forward(model, batch) to call it with several: model(*self.inputs(batch))."
                )
            raise

    def inputs(self, batch: Any) -> Any:
        """Returns the model's one argument of a batch, images say; a batch that is one tensor is that itself."""
        return batch if isinstance(batch, Tensor) else self._part(batch, 0)

    def target(self, batch: Any) -> Any:
        """Returns the labels of a batch, for losses that need them."""
        return self._part(batch, 1)

    def _part(self, batch: Any, place: int) -> Any:
        short = isinstance(batch, (tuple, list)) and len(batch) <= place
        if short or isinstance(batch, (Mapping, Tensor)):
            raise ValueError(
                f"{type(self).__name__} takes batches (inputs, target), and this one is {describe(batch)}. Let the "
                f"data set return such pairs, or override {('inputs', 'target')[place]}() of the task."
            )
        return batch[place]

    def index(self, batch: Any) -> Any:
        """Returns the samples' indices in the data set, for losses with a memory of it; None where there are none."""
        return batch[2] if isinstance(batch, (tuple, list)) and len(batch) > 2 else None

    def labels(self) -> Mapping[str, Callable[[Any], Any]]:
        """Returns how to get out of a batch what losses ask for by name.

        ``target`` and ``index`` unless a task knows more: a ``mask`` of the positions of a map that count.
        """
        return {"target": self.target, "index": self.index}

    @abstractmethod
    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns the supervised loss, a scalar, of what ``forward`` returned.

        In evaluation it may be None, where a model returns no losses then, and nothing is logged.
        """

    def values(self) -> Mapping[str, Tensor | float]:
        """Returns what else is logged of the training step that ``loss`` was computed for, as ``train/<name>``."""
        return {}

    def metrics(self) -> MetricCollection:
        """Returns fresh metrics of the student against the labels, by the names they are logged under.

        One that computes a dict, of many values at once, is logged under its keys. All are computed at an epoch's end.
        """
        return MetricCollection({})

    def update(self, metrics: MetricCollection, output: Any, batch: Any) -> None:
        """Updates the metrics with what ``forward`` returned."""
        if len(metrics):  # without any, a batch needs no labels
            metrics.update(output, self.target(batch))

    def agreement(self) -> Metric | None:
        """Returns a fresh metric of how often student and teacher agree, or None where that means nothing.

        One that computes a dict, of many values at once, is logged under its keys.
        """
        return None

    def update_agreement(self, metric: Metric, student: Any, teacher: Any) -> None:
        """Updates the agreement with what ``forward`` returned for both models."""
        metric.update(student, teacher)

    def update_agreement_batch(self, metric: Metric, student: Any, teacher: Any, batch: Any) -> None:
        """Likewise with the batch at hand, for what student and teacher do together, measured by the labels."""
        self.update_agreement(metric, student, teacher)

    def predict(self, output: Any) -> Any:
        """Turns what ``forward`` returned into what a user wants to have predicted."""
        return output

    def predict_batch(self, output: Any, batch: Any) -> Any:
        """Likewise with the batch at hand, for predictions that depend on it, on the images' size for one."""
        return self.predict(output)

    def prediction_file(self) -> PredictionFile | None:
        """Returns how ``lightning-kd predict`` is to write predictions; None for one file that ``torch.load`` reads."""
        return None

    def deployed(self, student: nn.Module) -> nn.Module:
        """Returns what runs where the student is used, and is exported, counted and timed: the student, in most tasks.

        Where it is another network, ``lightning-kd export`` makes task and teacher again out of the configuration.
        """
        return student

    def draw(self, images: Sequence[Tensor], batch: Any, prediction: Any = None) -> Drawing | None:
        """Returns pictures of what was predicted, or of the truth, for ``lightning-kd compare``; None to have none.

        Args:
            images: Those of the batch, as they look: ``(3, H, W)`` uint8 each; ``drawn_among`` of them.
            batch: As the model gets it.
            prediction: What ``predict_batch`` returned; None asks for the truth.
        """
        return None

    def draw_with_teacher(self, images: Sequence[Tensor], batch: Any, prediction: Any, teacher: Any) -> Drawing | None:
        """Returns pictures of what a distilled student and its teacher predict together, likewise; None to have none.

        Args:
            images: As of ``draw``.
            batch: As the model gets it.
            prediction: What ``predict_batch`` returned of the student.
            teacher: What it returned of the teacher.
        """
        return None

    def tell(
        self, names: Sequence[str], batches: Sequence[Any], predictions: Mapping[str, Sequence[Any]], teacher: str
    ) -> str | None:
        """Returns Markdown about test data that are read and not looked at, for ``lightning-kd compare``.

        Args:
            names: What a person reads of each sample: the data set's ``names``.
            batches: All of them, in this order.
            predictions: By the network's name what ``predict_batch`` returned of each batch.
            teacher: Which of them is the only teacher; empty, if there is none or more.
        """
        return None

    def knowledge(self, model: nn.Module) -> Mapping[str, str]:
        """Returns names that terms may use for paths of the model, such as ``{"logits": "output"}``."""
        return {}


def check_given(number: int, name: str = "num_classes") -> None:
    """Raises ``TypeError`` where a number of classes, or of joints, is no whole number."""
    if not is_whole(number):
        raise TypeError(f"{name} is a whole number, got {number!r}.")


def checked_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Returns a name for each class: its number, where none are given.

    Raises:
        ValueError: If there are more or fewer names than classes.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names: expected {num_classes} names, one per class; got {len(class_names)}.")
    return list(class_names) if class_names is not None else [str(k) for k in range(num_classes)]
