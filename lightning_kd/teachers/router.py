"""Router: learns which teacher to believe on which sample."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses._numerics import upcast
from lightning_kd.numbers import is_number


class Router(nn.Module):
    r"""A small network that learns, beside the student, how much each teacher of an ensemble is believed per sample.

    It reads what the teachers say, the probabilities p_k of all K, and gives the gates::

        g = softmax(W_2 relu(W_1 [p_1, ..., p_K] + b_1) + b_2),    (B, K)

    W_2 and b_2 start at 0, with equal gates. It learns by the cross-entropy of the gated mixture with the labels, which
    is logged as ``train/teacher/router``::

        CE(mixture(g), target) + balance * KL(1/K || mean over the batch of g)

    Args:
        members: K, the number of teachers.
        num_classes: C, the number of classes.
        hidden: Width of the hidden layer.
        balance: Weight of the divergence that keeps a teacher from being forgotten. It is over the batch of each device
            and of each accumulated part, so that with it several devices do not train exactly as one does.

    Returns:
        ``forward(probabilities)`` with (B, K, C), returns scores (B, K), whose softmax the gates are.

    Source:
        After MST-Distill, Li et al., arXiv 2507.07015, and its authors' code (``GateNet``, ``load_balancing_loss``).
        There the gates read the student's logits, the k best teachers of a sample count alike, and of the losses
        only the balance has a gradient for the gates; here they read the teachers, weigh all, and learn from labels.

    Example:
        >>> import torch
        >>> Router(members=4, num_classes=10)(torch.rand(2, 4, 10)).softmax(1).tolist()[0]
        [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, members: int, num_classes: int, hidden: int = 64, balance: float = 0.0) -> None:
        super().__init__()
        if not (is_number(balance) and balance >= 0):
            raise ValueError(f"balance is a weight, 0 or more; got {balance!r}.")
        self.members = members
        self.num_classes = num_classes
        self.balance = balance
        self.read = nn.Linear(members * num_classes, hidden)
        self.score = nn.Linear(hidden, members)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Returns the teachers' scores."""
        scores: Tensor = self.score(F.relu(self.read(probabilities.flatten(1).to(self.read.weight.dtype))))
        return upcast(scores)

    def loss(self, mixture: Tensor, log_gates: Tensor, target: Tensor) -> Tensor:
        """Returns the loss by which the router learns.

        Args:
            mixture: Logits (B, C) or (B, C, ...) of the gated mixture.
            log_gates: Logarithms of the gates, (B, K).
            target: The labels, class indices or probabilities.
        """
        loss = F.cross_entropy(mixture, target)
        if not self.balance:
            return loss
        mean = log_gates.exp().mean(0)
        return loss - self.balance * (mean * len(mean)).log().mean()
