"""The training of a teacher of segmentation that is told the labels."""

from typing import Any

from lightning_kd.tasks.segmentation import Segmentation
from torch import Tensor, nn

from lightning_kd.losses import CWD
from lightning_kd.teachers import LabelNoise


class LabelAssisted(Segmentation):
    """Semantic segmentation by a network that sees the labels, noised, beside the image: it becomes a teacher (LAD).

    In training the network sees each batch twice, with two noises ``n1`` and ``n2`` of ``teachers.LabelNoise``, and
    is to say the same::

        loss = task(f(x, n1)) + task(f(x, n2)) + consistency * (CWD(f(x, n1), f(x, n2)) + CWD(f(x, n2), f(x, n1)))

    The network takes one channel more than the images have. Trained, it teaches a student that sees the images alone:
    ``Distillation(teacher, terms, teacher_input=LabelNoise(num_classes, values="spread", noise=0.02))`` with
    ``CWD(temperature=4.0)`` on the logits, weight 3. In evaluation it sees the labels, too: its metrics say how well it
    uses them, and are not to be compared with the student's.

    Args:
        num_classes: Number of classes C.
        *args: Of ``Segmentation``.
        consistency: Weight of the consistency.
        temperature: Of its CWD.
        noise: Of ``teachers.LabelNoise``, as is ``scale``.
        scale: Factor of the labels' channel: as large as the images' own deviation.
        **kwargs: Of ``Segmentation``.

    Raises:
        ValueError: If an argument is out of range, or the labels are not one class for each pixel.

    Source:
        Qiu et al., Make a Strong Teacher with Label Assistance, arXiv 2407.13254; weights and temperature are those of
        the authors' code.

    Example:
        >>> import torch
        >>> task = LabelAssisted(num_classes=3)
        >>> batch = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> outputs = task(nn.Conv2d(4, 3, 1), batch)
        >>> len(outputs), task.loss(outputs, batch).shape
        (2, torch.Size([]))
    """

    def __init__(
        self,
        num_classes: int,
        *args: Any,
        consistency: float = 5.0,
        temperature: float = 4.0,
        noise: float = 0.03,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, *args, **kwargs)
        if not consistency >= 0:
            raise ValueError(f"consistency is the weight of a loss, not negative; got {consistency}.")
        self.consistency = consistency
        self.agree = CWD(temperature=temperature)
        self.noise = LabelNoise(num_classes, noise=noise, scale=scale)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model: in training twice, with two noises."""
        images, target = self.inputs(batch), self.target(batch)
        if not model.training:
            return model(self.noise(images, target=target))
        return model(self.noise(images, target=target)), model(self.noise(images, target=target))

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Returns the supervised loss of both outputs, and how much they differ."""
        if not isinstance(output, tuple):
            return super().loss(output, batch)
        one, other = output
        mask = self.mask(batch)
        first, second = self.logits(one), self.logits(other)
        differ: Tensor = self.agree(first, second, mask) + self.agree(second, first, mask)
        return super().loss(one, batch) + super().loss(other, batch) + self.consistency * differ
