"""KD: soft labels, as forward, reverse or Jensen-Shannon divergence."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _dense, _mask
from lightning_kd.losses._numerics import per_position, upcast
from lightning_kd.numbers import is_number

Divergence = Literal["forward", "reverse", "jsd"]
Activation = Literal["softmax", "sigmoid"]


def kd(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor = 4.0,
    divergence: Divergence = "forward",
    activation: Activation = "softmax",
    beta: float = 0.5,
    dim: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``T^2 * D(p_t, p_s)``, averaged over samples and positions; see :class:`KD`."""
    _check_kind(divergence, activation, beta)
    _check.temperature(temperature)
    _check.logits(student, teacher, dim, classes=2 if activation == "softmax" else 1)
    temperature = per_position(temperature, student, dim)
    share = {"forward": 0.0, "reverse": 1.0, "jsd": beta}[divergence]
    if activation == "softmax" and _dense.serves(student, temperature):
        here = _mask.counted(mask, student, dim)
        distributions = student.numel() // student.shape[dim] if here is None else _mask.total(here)
        total = _dense.divergence(student, teacher, temperature, share, dim, here)
        return temperature**2 * total / distributions
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask, dim)  # two equal rows diverge by 0
    distributions = student.numel() // student.shape[dim] if here is None else _mask.total(here)
    # one temperature scales the sum, one for each sample its parts
    reduction = "none" if isinstance(temperature, Tensor) and temperature.ndim else "sum"
    if activation == "softmax":
        value = _dense.chain(student, teacher, temperature, share, dim, reduction)
    else:  # each label is a distribution over (present, absent)
        logs = (upcast(x) / temperature for x in (student, teacher))
        log_s, log_t = (torch.stack((F.logsigmoid(x), F.logsigmoid(-x))) for x in logs)
        value = _dense.of_logs(log_s, log_t, share, reduction)
    return (temperature**2 * value).sum() / distributions


def _check_kind(divergence: str, activation: str, beta: float) -> None:
    if divergence not in ("forward", "reverse", "jsd"):
        raise ValueError(f"divergence must be 'forward', 'reverse' or 'jsd', got {divergence!r}.")
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"activation must be 'softmax' or 'sigmoid', got {activation!r}.")
    if not (is_number(beta) and 0 <= beta <= 1):
        raise ValueError(f"beta is the teacher's share in the mixture, in [0, 1], got {beta!r}.")


class KD(nn.Module):
    r"""Soft labels: match the teacher's tempered class distribution (Hinton et al.).

    With ``p = softmax(logits / T)`` over the C classes of each sample and position::

        forward:  T^2 * KL(p_t || p_s)
        reverse:  T^2 * KL(p_s || p_t)
        jsd:      T^2 * (beta * KL(p_t || m) + (1 - beta) * KL(p_s || m)),  m = beta * p_t + (1 - beta) * p_s

    The divergence is summed over classes and averaged over samples and positions. With
    ``activation="sigmoid"`` every label is its own Bernoulli distribution, ``p = sigmoid(logit / T)``, and
    the divergences of the labels are summed: binary and multi-label models. Logits of independent labels look like
    those of exclusive classes, so for these say ``activation="sigmoid"``; nothing can tell it from their shape.

    Args:
        temperature: T > 0; the factor T^2 keeps the gradient's scale. May be changed between steps; the function takes
            a tensor, too: one for each sample (B), or for each sample and position.
        divergence: Which of the three.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for independent labels.
        beta: The teacher's share in the mixture, in [0, 1]; only ``"jsd"`` reads it. At the ends, where the
            formula is zero for any student, it is the KL that it tends to after division by beta or
            (1 - beta): 0 is the forward KL, 1 the reverse, as in trl's generalised JSD.
        dim: The class dimension; -1 for tokens (B, N, C).

    Returns:
        ``forward(student, teacher, mask=None)``, both logits (B, C) or (B, C, ...), returns a scalar, zero at
        equality. With a mask (B, H, W), for logits (B, C, h, w), the mean is over the pixels where it is True.

    Raises:
        ValueError: If the shapes differ, or if a softmax runs over a single class.

    Source:
        Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531. Generalised JSD:
        Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649, equation 1.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> kd = losses.KD(temperature=4.0)
        >>> student = torch.zeros(2, 10, requires_grad=True)
        >>> teacher = 3 * torch.eye(10)[:2]
        >>> kd(student, teacher) > kd(teacher, teacher)
        tensor(True)
    """

    per_sample = True
    """The temperature may be a tensor, one for each sample."""
    rowwise = True
    """The pixels of a map are samples: under a mask it is the loss of the rows that count."""

    def __init__(
        self,
        temperature: float = 4.0,
        divergence: Divergence = "forward",
        activation: Activation = "softmax",
        beta: float = 0.5,
        dim: int = 1,
    ) -> None:
        super().__init__()
        _check_kind(divergence, activation, beta)
        self.temperature: float | Tensor = _check.positive("temperature", temperature)
        self.divergence: Divergence = divergence
        self.activation: Activation = activation
        self.beta = beta
        self.dim = _check.dimension(dim)
        self.align: Literal["none", "map"] = "map" if dim == 1 else "none"

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence of two logits of one shape."""
        return kd(student, teacher, self.temperature, self.divergence, self.activation, self.beta, self.dim, mask)
