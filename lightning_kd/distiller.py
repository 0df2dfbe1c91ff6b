"""The engine: turns what a student and its teacher computed for the same call into losses."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.counts import COUNTS
from lightning_kd.overwriting import one_memory, overwritten
from lightning_kd.schedules import Moment
from lightning_kd.sequences import Layout
from lightning_kd.taps import Record
from lightning_kd.teachers import Frozen, Teacher
from lightning_kd.teachers.base import labels_asked, refuse_labels, values_at
from lightning_kd.teachers.stillness import refuse_taught
from lightning_kd.term import Term
from lightning_kd.watching import ANSWER, Call, LabelsOf, Watcher, merged
from lightning_kd.wiring import OUTPUT, Path, describe, find_module

Knowledge = Callable[[nn.Module], Mapping[str, str]]
"""Names that a task offers for paths of a model, such as ``{"logits": "output"}``."""

_USUAL = frozenset({"target", "index"})
"""Labels that any loop may give."""


class Distiller(nn.Module):
    """Holds terms and a teacher, watches a student at work, and computes the terms' losses.

    It knows nothing of Lightning: both doors, and any training loop of your own, use it like this::

        distiller = Distiller(terms, teacher)
        distiller.attach(student)
        with distiller.watch() as calls:
            logits = student(images)
        losses = distiller(calls, target=labels)
        loss = task_loss + distiller.total(losses)

    The teacher is called with the arguments that the student is called with, so it sees the same augmented
    images, unless one of them is given a view of its own. It is not a submodule, nor is what makes its arguments: they
    stay out of ``parameters()``, ``state_dict()`` and DDP.

    Args:
        terms: The terms by name.
        teacher: A trained model, which becomes a ``teachers.Frozen``, or any ``teachers.Teacher``.
        teacher_input: Makes the teacher's arguments out of the student's: called with those, it returns a
            tensor, a tuple of positional arguments or a dict of keyword arguments. Unless given, they are equal. A
            keyword-only parameter of it is a label of the batch: ``def noisy(images, *, target)``.
        student_input: Likewise for the student, where it is to see another (stronger) view than it was called with. A
            keyword-only parameter ``teacher`` is what the teacher's forward returned for this call.
        knowledge: Names that a task offers for paths, as a function of the model.

    Raises:
        ValueError: If there is no term, or a name cannot be logged.
        TypeError: If a term is not a ``Term``, the teacher is not a module, or an input cannot be called.

    Example:
        >>> from lightning_kd import losses
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> distiller = Distiller({"kd": Term(losses.KD(temperature=4.0))}, teacher)
        >>> distiller.attach(student)
        >>> with distiller.watch() as calls:
        ...     _ = student(torch.randn(8, 4))
        >>> list(distiller(calls))
        ['kd']
        >>> distiller.detach()
    """

    teacher: Teacher
    teacher_input: Callable[..., Any] | None

    def __init__(
        self,
        terms: Mapping[str, Term],
        teacher: nn.Module,
        teacher_input: Callable[..., Any] | None = None,
        knowledge: Knowledge | None = None,
        student_input: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        given: object = terms  # what a caller without a type checker may pass
        if not isinstance(given, Mapping):
            raise TypeError(f"terms are given by name, {{'kd': Term(losses.KD())}}; got {describe(given)}.")
        if not terms:
            raise ValueError('terms is empty: nothing would be distilled. Example: {"kd": Term(losses.KD())}.')
        taken = nn.ModuleDict()
        for name, term in terms.items():
            fit = isinstance(name, str) and name.replace("-", "_").isidentifier()
            if not fit or name in ("loss", "task") or hasattr(taken, name):
                raise ValueError(
                    f"{name!r} cannot be a term's name: names are identifiers other than 'loss' and 'task', which are "
                    "logged beside them, and the methods of a dict."
                )
            if not isinstance(term, Term):
                raise TypeError(f"The term {name!r} is a {type(term).__name__}; wrap the loss: Term(loss, weight=...).")
        parts = [id(part) for term in terms.values() for part in (term, term.loss)]
        if len(set(parts)) < len(parts):
            raise ValueError(
                "Two terms are one object, or have one loss object: what is learned or scheduled for one would be for "
                "both. Make each of its own: Term(losses.KD()), Term(losses.KD())."
            )
        if not isinstance(teacher, nn.Module):
            hint = " Weights in a file: teachers.Frozen(network, checkpoint=...)."
            hint = f" Did you mean {teacher.__name__}(...)?" if isinstance(teacher, type) else hint
            raise TypeError(f"teacher is a module or a teachers.Teacher, got {describe(teacher)}.{hint}")
        for side, makes in (("teacher_input", teacher_input), ("student_input", student_input)):
            if not (makes is None or callable(makes)):
                raise TypeError(
                    f"{side} is a function of the arguments that the student is called with, or a module; got "
                    f"{makes!r}."
                )
        self.terms = nn.ModuleDict(terms)
        self.set_teacher(teacher if isinstance(teacher, Teacher) else Frozen(teacher))
        # What learns with the student is one, so that it reaches the optimizer and the checkpoint.
        self.teacher_learner = self.teacher.learner
        object.__setattr__(self, "teacher_input", teacher_input)  # a network, maybe, which does not learn
        self.student_input = student_input
        self.knowledge = knowledge
        self._watcher: Watcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watcher": None}

    def set_teacher(self, teacher: Teacher) -> None:
        """Gives it a teacher, before it is attached: past nn.Module's registration, so that it is no submodule."""
        for name, method in vars(Teacher).items():
            if inspect.isfunction(method) and not callable(getattr(teacher, name)):
                hidden = type(getattr(teacher, name)).__name__
                raise TypeError(
                    f"{type(teacher).__name__}.{name} is a {hidden}, and hides the method of that name that every "
                    "teacher has. Call the attribute something else."
                )
        refuse_labels(teacher)
        object.__setattr__(self, "teacher", teacher)

    def mirrored(self, teacher: Teacher) -> "Distiller":
        """Returns one for the other direction: terms of the same kind, whose paths have changed sides."""
        terms = {name: term.mirrored() for name, term in self.named_terms()}
        return Distiller(terms, teacher, knowledge=self.knowledge)

    def as_teacher(self, record: Record, of: "Distiller") -> Record:
        """Returns what was captured in another distiller's student, under the paths by which this one asks for it."""
        return {
            self._teacher_paths[name].module: record[of._student_paths[name].module] for name, _ in self.named_terms()
        }

    def named_terms(self) -> Iterator[tuple[str, Term]]:
        """Iterates over the terms by name."""
        for name, term in self.terms.items():
            assert isinstance(term, Term)
            yield name, term

    def teaching(self) -> list[nn.Module]:
        """Returns the modules of the teacher's side, which are no submodules: it, and what makes its arguments."""
        return [part for part in (self.teacher, self.teacher_input) if isinstance(part, nn.Module)]

    def parts(self) -> list[nn.Module]:
        """Returns the modules that a step calls: of every term, and what learns with the teacher."""
        terms = [part for _, term in self.named_terms() for part in term.parts()]
        return [*terms, self.teacher_learner] if self.teacher_learner is not None else terms

    @property
    def needs_sample(self) -> bool:
        """Whether a term has to see a sample before its parameters can exist."""
        return any(term.needs_sample for _, term in self.named_terms())

    @property
    def needs_end(self) -> bool:
        """Whether something changes over the run, so that it must be known how long that is."""
        return self.teacher.needs_end or any(term.needs_end for _, term in self.named_terms())

    @property
    def labels(self) -> dict[str, bool]:
        """What is read of a batch, by name, and whether somebody cannot do without."""
        return merged(self.labels_of_losses, labels_asked(self.student_input), labels_asked(self.teacher_input))

    @property
    def labels_of_losses(self) -> dict[str, bool]:
        """The same without what only inputs ask for."""
        # What says what counts is read wherever there is one: a term that would overlook it is refused.
        counts = dict.fromkeys(COUNTS, False)
        return merged(counts, self.teacher.labels, *(term.labels for _, term in self.named_terms()))

    @property
    def attached(self) -> bool:
        """Whether a student is watched."""
        return self.student is not None

    @property
    def student(self) -> nn.Module | None:
        """The model whose calls are watched."""
        return self._watcher.student if self._watcher is not None else None

    def attach(self, student: nn.Module) -> None:
        """Resolves every path and puts the hooks in place.

        Args:
            student: The model whose calls are watched.

        Raises:
            ValueError: If a path is unknown, of which the message names the term and lists the closest names; or if
                the student is TorchScript.
            TypeError: If the student is not a module.
        """
        given: object = student  # what a caller without a type checker may pass
        if not isinstance(given, nn.Module):
            raise TypeError(f"the student that is attached is the module itself, got {given!r}.")
        self.detach()
        if isinstance(student, torch.jit.RecursiveScriptModule):  # type: ignore[attr-defined]  # torch's own gap
            raise ValueError(
                "the student is TorchScript, whose calls cannot be watched. Train the module that it was made of, and "
                "script it after the fit."
            )
        self._student_paths = self._resolve("student", student)
        # Some teachers know themselves, in bind, which paths they can answer: a cache on disk has no modules.
        root = self.teacher.root(student)
        self._teacher_paths = self._resolve("teacher", root)
        for name, term in self.named_terms():
            of_teacher = Layout() if root is None else Layout.of(_at(root, self._teacher_paths[name]), root)
            term.layouts = Layout.of(_at(student, self._student_paths[name]), student), of_teacher
        for name, term in self.named_terms() if self.teacher.same_call else ():
            here, there = (
                (_at(student, start), [*start.selectors, *inside.selectors])
                for start, inside in (
                    (self._student_paths[name], term.student),
                    (self._teacher_paths[name], term.teacher),
                )
            )
            if here == there and not term.projects:
                with _naming(name):
                    self._refuse_itself(name)
        for name, term in self.named_terms():
            with _naming(name):
                refuse_taught(self.teacher, term)
        paths = {path.module for path in self._teacher_paths.values()}
        try:
            asked = paths | {OUTPUT} if ANSWER in labels_asked(self.student_input) else paths
            self.teacher.bind(student, asked)
            self.teacher.bound_to = frozenset(asked)
            for name, term in self.named_terms():
                with _naming(name):
                    term.meet(self.teacher.still)
        except BaseException:
            self.teacher.unbind()
            raise
        self._read = [
            Path(self._student_paths[name].text + term.student.text.removeprefix(term.student.module))
            for name, term in self.named_terms()
        ]
        modules = (path.module for path in self._student_paths.values())
        self._watcher = Watcher(student, modules, self.teacher, self.student_input, self.teacher_input)
        self._watcher.attach()

    def _refuse_itself(self, name: str) -> None:
        here, there = self._student_paths[name].text, self._teacher_paths[name].text
        both = f"{here!r} of the student with {'itself' if here == there else f'{there!r}, which is the same'}"
        raise ValueError(
            f"it compares {both}, so it is always 0. Name another of its layers as teacher=, or give a projector=."
        )

    def refresh(self) -> None:
        """Watches what has taken the place of a student's layer since it was attached."""
        if self._watcher is not None:
            self._watcher.refresh()
            self.teacher.refresh()

    def _resolve(self, side: str, model: nn.Module | None) -> dict[str, Path]:
        """Returns where each term's path starts on one side; the names that the task offers are looked up."""
        offered = dict(self.knowledge(model)) if self.knowledge and model is not None else {}
        paths = {}
        for name, term in self.named_terms():
            module = getattr(term, side).module
            paths[name] = Path(offered.get(module, module))
            if paths[name].module != OUTPUT and model is not None:
                try:
                    find_module(model, paths[name].module, f"the {side}")
                except ValueError as error:
                    hint = f" The task offers {', '.join(map(repr, offered))}." if offered else ""
                    raise ValueError(f"Term {name!r}: {error}{hint}") from None
        return paths

    def detach(self) -> None:
        """Takes every hook out of student and teacher."""
        if self._watcher is not None:
            self._watcher.detach()
            self._watcher = None
            self.teacher.unbind()

    def watch(self, labels: LabelsOf = lambda _: {}) -> AbstractContextManager[list[Call]]:
        """Watches the student's calls until the context ends.

        Calls under ``no_grad`` do not count: nothing could be learned from them.

        Args:
            labels: Gives what there is of the batch, by name, for inputs and teachers that ask for it.

        Returns:
            A context of the calls, a list that is filled as they happen.

        Raises:
            RuntimeError: If the distiller is not attached, or a tapped output was modified in place.
        """
        if self._watcher is None:
            raise RuntimeError("The distiller is not attached: call attach(student) first.")
        return self._watcher.watch(labels, self._read)

    def build(self, call: Call) -> None:
        """Makes the parameters of projectors and losses for the shapes of a sample call.

        Args:
            call: A call that was watched.

        Raises:
            ValueError: If the shapes of a term cannot be bridged.
        """
        assert self.student is not None
        # What stands still, in half the memory, may have the precision of a sample from under autocast by chance.
        dtypes = {p.dtype for p in self.student.parameters() if p.requires_grad}
        for name, term in self.named_terms():
            with _naming(name):
                if term.needs_sample:
                    term.build(*term.pairs(*self._captured(name, call))[0], dtypes)

    def is_frozen(self, name: str) -> bool:
        """Whether something does not learn now in the layer of the student that a term reads, or it has nothing."""
        assert self.student is not None
        path = self._student_paths[name].module
        layer = self.student if path == OUTPUT else find_module(self.student, path, "the student")
        weights = list(layer.parameters()) or list(self.student.parameters())
        return any(not p.requires_grad for p in weights)

    def imitated_shapes(self, calls: Sequence[Call]) -> dict[str, set[tuple[int, ...]]]:
        """Returns the shapes of what each term's student side is to imitate in those calls."""
        return {
            name: {tuple(t.shape) for call in calls for t in term.sides(*self._captured(name, call))[1]}
            for name, term in self.named_terms()
        }

    def _captured(self, name: str, call: Call) -> tuple[list[Any], list[Any]]:
        student, teacher = self._student_paths[name], self._teacher_paths[name]
        return (
            [student.select(value) for value in call.student[student.module]],
            [teacher.select(value) for value in values_at(self.teacher, call.teacher, teacher.module)],
        )

    def forward(self, calls: Sequence[Call], **labels: Any) -> dict[str, Tensor]:
        """Computes every term's loss, without its weight.

        Args:
            calls: The calls that were watched.
            labels: What losses need of the batch, by the name of their argument: ``target=labels``.

        Returns:
            The losses by the terms' names; of several calls, the mean. Beside them those by which the teacher's
            own ``learner`` learns.

        Raises:
            RuntimeError: If the student was never called.
            ValueError: If a term's two sides do not fit; the message names the term.
            TypeError: If a label's name is misspelt; those that no loss asks for are left out.
        """
        if labels.keys() - _USUAL:  # few losses ask for others, and this is every step
            self._refuse_misspelt(labels)
        if not calls:
            raise RuntimeError("The student was not called, or only under no_grad: there is nothing to distil.")
        losses = {}
        for name, term in self.named_terms():
            with _naming(name):
                self._check_answers(name, term, calls)
                values = [term(*self._captured(name, call), labels) for call in calls]
                losses[name] = values[0] if len(values) == 1 else torch.stack(values).mean()
        return {**losses, **self.teacher.losses([call.teacher for call in calls], labels)}

    def _refuse_misspelt(self, labels: Mapping[str, Any]) -> None:
        asked = {*_USUAL, *self.labels}
        for label in labels.keys() - asked:
            if close := get_close_matches(label, asked - labels.keys(), n=1, cutoff=0.85):
                raise TypeError(f"no loss of these terms asks for {label}. Did you mean {close[0]}=...?")

    def _check_answers(self, name: str, term: Term, calls: Sequence[Call]) -> None:
        """Refuses what was overwritten between the teacher's answer and now, if it is read; and what is one tensor."""
        for call in calls:
            for value in self._captured(name, call)[1]:
                if overwritten(term.teacher.select(value), call.versions):
                    raise ValueError(
                        f"the teacher's {term.teacher.text!r} was overwritten in place after it had answered, so its "
                        "values are gone: by training_step, by a student that works in place on what both are called "
                        "with, or by the teacher's next answer in the same memory. Compute something new there: "
                        "z = z * 2 and not z.mul_(2)."
                    )
        if self.teacher.same_call and not term.projects:
            sides = [zip(*term.sides(*self._captured(name, call)), strict=True) for call in calls]
            if all(one_memory(s, t) for each in sides for s, t in each):
                self._refuse_itself(name)

    def at(self, moment: Moment) -> None:
        """Sets everything that is scheduled to its value at a moment of the run."""
        for name, term in self.named_terms():
            with _naming(name):
                term.at(moment)

    def weights(self) -> dict[str, float]:
        """Returns every term's weight as of now: at the run's begin, or where ``at`` set it."""
        weights = {}
        for name, term in self.named_terms():
            with _naming(name):
                weights[name] = term.current_weight
        return weights

    def values(self) -> dict[str, Tensor | float]:
        """Returns what changes over the run, as of now: ``{"kd/temperature": 4.0}``."""
        return {f"{name}/{what}": v for name, term in self.named_terms() for what, v in term.values().items()}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Returns the weighted sum of the losses that a call of the distiller returned."""
        weights = self.weights()
        weighted = [weights.get(name, 1.0) * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum()

    def ranges(self, calls: Sequence[Call], name: str) -> Tensor:
        """Returns the lowest and highest value of the student's side of a term, then of the teacher's."""
        if name not in self.terms:  # the teacher's own loss has no sides
            return torch.full((4,), torch.nan)
        term = dict(self.named_terms())[name]
        sides = zip(*(term.sides(*self._captured(name, call)) for call in calls), strict=True)
        bounds = [[t.detach().aminmax() for of_call in side for t in of_call] for side in sides]
        return torch.stack(
            [
                f([getattr(b, key).float() for b in side])
                for side in bounds
                for key, f in (("min", _least), ("max", _most))
            ]
        )


def _at(model: nn.Module, path: Path) -> nn.Module:
    return model if path.module == OUTPUT else find_module(model, path.module, "the student")


def _least(values: list[Tensor]) -> Tensor:
    return torch.stack(values).min()


def _most(values: list[Tensor]) -> Tensor:
    return torch.stack(values).max()


@contextmanager
def _naming(term: str) -> Iterator[None]:
    """Names the term in errors that come out of it."""
    try:
        yield
    except (ValueError, KeyError) as error:
        raise ValueError(f"Term {term!r}: {error.args[0] if error.args else error}") from error
    except Exception as error:
        error.add_note(f"This happened in the distillation term {term!r}.")
        raise
