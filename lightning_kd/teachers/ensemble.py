"""Ensemble: several trained models teach as one."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import upcast
from lightning_kd.losses.standardize import standardize
from lightning_kd.taps import Record
from lightning_kd.teachers.averages import log_mean, mean, mean_of_calls, shapes
from lightning_kd.teachers.base import Teacher
from lightning_kd.teachers.frozen import Frozen
from lightning_kd.teachers.router import Router
from lightning_kd.wiring import OUTPUT, Path, describe

Combine = Literal["probabilities", "logits", "z-scores", "min-max"]
ROUTED = "teacher/router"  # of no term: a term's name is an identifier


class Ensemble(Teacher):
    r"""Several trained models teach as one: what they say is averaged, path by path.

    With the weights w_k of the K teachers, which sum to 1, and their logits z_k::

        "probabilities":  z = T * log sum_k w_k softmax(z_k / T)
        "logits":         z =         sum_k w_k z_k
        "z-scores":       z =         sum_k w_k (z_k - mean z_k) / std z_k
        "min-max":        z =         sum_k w_k (z_k - min z_k) / (max z_k - min z_k)

    The last two are for scores of candidates whose scale differs from teacher to teacher: each is brought to one scale
    over the candidates of a query first, and by the last to [0, 1]. Otherwise the one with the largest numbers would
    decide. z is again logits, for any loss. A loss with the same temperature T sees the mean of the teachers' softened
    probabilities exactly, ``softmax(z / T) = sum_k w_k softmax(z_k / T)``. The mean of logits is, up to
    normalisation, the geometric mean of the probabilities. Features, the outputs at all other paths, are averaged
    with the same weights. The weights are one of::

        None:          w_k = 1 / K
        [1.0, 3.0]:    in these proportions
        "confidence":  w_k = max_c p_k(c) / sum_j max_c p_j(c)      per sample, with p_k = softmax(z_k)
        "entropy":     w_k = exp(-H(p_k)) / sum_j exp(-H(p_j))      per sample: by the inverse perplexity
        Router(...):   learned beside the student                   per sample

    In the last three a sample's value is the mean over its positions, where it has several.

    Where the teachers know different classes, each class is averaged over the teachers that know it, with p_k over
    the teacher's own classes::

        p(c) ~ sum_{k knows c} w_k p_k(c) / sum_{k knows c} w_k                  ("probabilities")
        z(c) = sum_{k knows c} w_k log p_k(c) / sum_{k knows c} w_k              ("logits")

    Args:
        teachers: The trained models, plain modules or LightningModules, or ``Frozen`` ones: with a checkpoint, or an
            ``input=Renormalize(...)`` of their own. Terms' paths are those of each.
        combine: Which mean. Independent labels (sigmoid) and regression take ``"logits"``; scores of candidates by
            different models ``"z-scores"`` or ``"min-max"``, of teachers that all score the same candidates.
        weights: How much each teacher counts.
        classes: For each teacher the classes that it knows, in the order of its logits; all unless given.
        num_classes: C, the number of classes; needed with ``classes``, checked where it is given.
        temperature: T of ``"probabilities"``; that of the loss, or 1 for the mean of what the teachers really say.
        logits: Where the logits are in what a teacher returns: ``"output.logits"``, ``"output[0]"``. Nothing else of
            it is kept.
        dim: The dimension of the classes; -1 for tokens (B, N, C).

    Raises:
        ValueError: If the arguments do not fit each other, or in a call the teachers' outputs do not.
        TypeError: If a teacher is no trained model.

    Source:
        To average the predictions of many models and distil them into one: Hinton et al., arXiv 1503.02531, abstract.
        Lower entropy, larger weight: Kwon et al., Adaptive Knowledge Distillation based on Entropy, ICASSP 2020. The
        formulas are ours; those in the code of CA-MKD (arXiv 2201.00007), ``(1 - softmax_k(cross-entropy)) / (K - 1)``
        with the labels and ``1 - H_k / sum_j H_j`` without, tell teachers apart the less the more there are.

    Example:
        >>> teacher = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], weights="entropy")
        >>> teacher.bind(nn.Linear(4, 3), ["output"])
        >>> round(float(teacher(torch.zeros(2, 4))["output"][0].exp().sum()), 4)
        2.0
    """

    log_weights: Tensor
    log_known: Tensor

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        combine: Combine = "probabilities",
        weights: Sequence[float] | Literal["confidence", "entropy"] | Router | None = None,
        classes: Sequence[Sequence[int]] | None = None,
        num_classes: int | None = None,
        temperature: float = 1.0,
        logits: str = OUTPUT,
        dim: int = 1,
    ) -> None:
        super().__init__()
        given: object = teachers  # what a caller without a type checker may pass
        if not isinstance(given, (Sequence, nn.ModuleList)) or not len(given):
            raise ValueError(f"An ensemble takes a list of at least one teacher; got {describe(given)}.")
        if combine not in get_args(Combine):
            raise ValueError(f"combine is one of {', '.join(map(repr, get_args(Combine)))}; got {combine!r}.")
        if combine != "probabilities" and temperature != 1.0:
            raise ValueError(f"temperature={temperature} is of combine='probabilities'; {combine} have no temperature.")
        if combine in ("z-scores", "min-max") and classes is not None:
            raise ValueError(
                f"combine={combine!r} brings scores of the same candidates to one scale, and classes= says that the "
                "teachers know different ones. Classes are combined as 'probabilities' or 'logits'."
            )
        self.members = nn.ModuleList(map(_member, teachers))
        self.combine = combine
        self.temperature = _check.positive("temperature", temperature)
        self.num_classes = num_classes
        self.path = Path(logits)
        if self.path.module != OUTPUT:
            raise ValueError(f"logits is a path in what a teacher returns, 'output.logits' for one; got {logits!r}.")
        self.dim = dim
        self._set_weights(weights)
        self._set_classes(classes)

    def _set_weights(self, weights: Sequence[float] | str | Router | None) -> None:
        count = len(self.members)
        self.judged_by: str | None = weights if isinstance(weights, str) else None
        fixed = [1.0] * count
        if isinstance(weights, Router):
            self.learner, self.labels = weights, {"target": True}
            if weights.members != count:
                raise ValueError(f"The router is for {weights.members} teachers, and there are {count}.")
        elif isinstance(weights, str):
            if weights not in ("confidence", "entropy"):
                raise ValueError(f"weights are 'confidence', 'entropy', a Router or numbers; got {weights!r}.")
        elif weights is not None:
            fixed = list(weights)
            if len(fixed) != count or not all(0.0 < weight < math.inf for weight in fixed):
                raise ValueError(
                    f"weights are {count} finite numbers above 0, one for each teacher; got {fixed}. A teacher that "
                    "does not count is left out."
                )
        given = torch.tensor(fixed)[:, None]
        self.register_buffer("log_weights", (given / given.sum()).log())

    def _set_classes(self, classes: Sequence[Sequence[int]] | None) -> None:
        """Notes where each class is in the logits of each teacher (K, C), and who knows it, as 0 or -inf."""
        self.classes = classes
        self.register_buffer("log_known", torch.zeros(len(self.members), 1))
        if classes is None:
            return
        if self.num_classes is None or len(classes) != len(self.members):
            raise ValueError(
                f"classes are given for each of the {len(self.members)} teachers, together with num_classes; got "
                f"{len(classes)} and num_classes={self.num_classes}."
            )
        every = range(self.num_classes)
        for own in classes:
            if len(set(own)) != len(own) or not set(own) <= set(every):
                raise ValueError(f"A teacher's classes are different numbers in [0, {len(every)}); got {list(own)}.")
        unknown = set(every).difference(*classes)
        if unknown:
            raise ValueError(
                f"No teacher knows the classes {sorted(unknown)}. Add one that does, or leave them out of the student."
            )
        where = [{c: i for i, c in enumerate(own)} for own in classes]
        self.register_buffer("columns", torch.tensor([[own.get(c, 0) for c in every] for own in where]))
        self.log_known = torch.tensor([[0.0 if c in own else -math.inf for c in every] for own in where])

    @property
    def router(self) -> Router | None:
        """What learns the weights, if they are learned."""
        assert self.learner is None or isinstance(self.learner, Router)
        return self.learner

    @property
    def frozen(self) -> list[Frozen]:
        """The teachers."""
        return [member for member in self.members if isinstance(member, Frozen)]

    def root(self, student: nn.Module) -> nn.Module:
        """Returns the first model: the others have the paths that terms name, too."""
        return self.frozen[0].model

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Prepares every teacher to answer for the given module paths; see ``Frozen.bind``."""
        judged = self.judged_by is not None or self.router is not None
        try:
            for member in self.frozen:
                member.bind(student, {*paths, OUTPUT} if judged else paths)
        except ValueError:
            self.unbind()
            raise

    def unbind(self) -> None:
        """Removes the hooks from every model."""
        for member in self.frozen:
            member.unbind()

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Runs every teacher without gradient, and averages what they return."""
        answers: list[Record] = [member(*args, **kwargs) for member in self.frozen]
        record: Record = {}
        log_weights = self.log_weights
        if OUTPUT in answers[0]:
            logits = [self._logits(k, answer[OUTPUT][0]) for k, answer in enumerate(answers)]
            log_weights = self._weigh(logits)
            mixture = self._mix(logits, log_weights)
            if self.router is not None:
                record[ROUTED] = [mixture, log_weights.T]
            output: Any = mixture.detach().movedim(1, self.dim)
            for selector in reversed(self.path.selectors):
                output = {selector: output}
            record[OUTPUT] = [output]
        weights = log_weights.detach().exp()
        features = (path for path in answers[0] if path != OUTPUT)
        return record | {path: mean_of_calls(path, [answer[path] for answer in answers], weights) for path in features}

    def losses(self, answers: Sequence[Record], labels: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the router's loss, if there is one: the mean over the answers."""
        if self.router is None:
            return {}
        target = labels.get("target")
        if target is None:
            raise ValueError("The router learns from the labels, and the batch gave none. Pass target=....")
        routed = [answer[ROUTED] for answer in answers]
        found = [self.router.loss(mixture / self.temperature, log_gates, target) for mixture, log_gates in routed]
        return {ROUTED: torch.stack(found).mean()}

    def _logits(self, k: int, output: Any) -> Tensor:
        """Returns the logits of teacher k, (B, C_k, ...)."""
        logits = self.path.select(output)
        size = len(self.classes[k]) if self.classes is not None else self.num_classes
        if not isinstance(logits, Tensor) or logits.ndim < 2 or (size or 0) not in (0, logits.shape[self.dim]):
            raise ValueError(
                f"Teacher {k} of the ensemble has at {self.path.text!r} {describe(logits)}, and logits with "
                f"{size or 'the'} classes in dimension {self.dim} are expected. Say where they are, "
                "logits='output.logits'; and if not all know all classes, which each does: classes=[[...], ...]."
            )
        return upcast(logits).movedim(self.dim, 1)

    def _weigh(self, logits: list[Tensor]) -> Tensor:
        """Returns the logarithms of the weights, (K, B) or (K, 1)."""
        if self.router is None and self.judged_by is None:
            return self.log_weights
        log_p = [z.log_softmax(1)[..., None].flatten(2) for z in logits]  # (B, C_k, positions)
        if self.judged_by == "confidence":
            scores = torch.stack([p.exp().amax(1).mean(-1).log() for p in log_p])
        elif self.judged_by == "entropy":
            scores = torch.stack([(p.exp() * p).sum(1).mean(-1) for p in log_p])
        else:
            assert self.router is not None
            p = self._over_all(log_p).add(self.log_known[:, None, :, None]).exp().mean(-1)
            if p.shape[2] != self.router.num_classes:
                raise ValueError(f"The router is for {self.router.num_classes} classes, and there are {p.shape[2]}.")
            scores = self.router(p.transpose(0, 1)).T
        return scores.log_softmax(0)

    def _mix(self, logits: list[Tensor], log_weights: Tensor) -> Tensor:
        """Returns the ensemble's logits, (B, C, ...)."""
        if self.combine == "probabilities":
            log_p = self._over_all([(z / self.temperature).log_softmax(1) for z in logits])
            return self.temperature * log_mean(log_p, log_weights, self.log_known)
        if self.combine == "z-scores":
            logits = [standardize(z) for z in logits]
        elif self.combine == "min-max":
            logits = [_to_unit_interval(z) for z in logits]
        known = logits if self.classes is None else [z.log_softmax(1) for z in logits]
        return mean(self._over_all(known), log_weights, self.log_known)

    def _over_all(self, values: list[Tensor]) -> Tensor:
        """Returns (K, B, C, ...) of values (B, C_k, ...); what a teacher does not know is anything finite."""
        if self.classes is not None:
            columns = self.get_buffer("columns")
            values = [value.index_select(1, columns[k]) for k, value in enumerate(values)]
        if len({value.shape for value in values}) > 1:
            raise ValueError(
                f"The teachers of the ensemble return logits of different shapes, {shapes(values)}. If they know "
                "different classes, say which: classes=[[...], ...]."
            )
        return torch.stack(values)


def _to_unit_interval(scores: Tensor) -> Tensor:
    """Returns scores (B, N, ...) with the best of a query's candidates at 1 and the worst at 0; equal ones are at 0."""
    low, high = scores.aminmax(dim=1, keepdim=True)
    return (scores - low) / (high - low).where(high > low, 1.0)


def _member(teacher: nn.Module) -> Frozen:
    given: object = teacher  # what a caller without a type checker may pass
    if (isinstance(given, Teacher) and not isinstance(given, Frozen)) or not isinstance(given, nn.Module):
        raise TypeError(f"The teachers of an ensemble are trained models or teachers.Frozen, got {describe(given)}.")
    return teacher if isinstance(teacher, Frozen) else Frozen(teacher)
