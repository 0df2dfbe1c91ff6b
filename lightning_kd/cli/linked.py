"""What the data say once, the number of classes for one, and where in the model it is filled in."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_kd.cli.errors import UsageError, guess
from lightning_kd.cli.lasting import lasting

CLASSES = ("num_classes", "classes", "num_labels")
"""What networks call the number of classes: torchvision and timm, segmentation_models_pytorch, Hugging Face."""

TERMS = "model.terms"
"""What is distilled, by name."""

TEACHERS_NETWORK = "teacher.init_args.model.init_args."

LINKED = {
    "num_classes": (
        "task.init_args.num_classes",
        "teacher.init_args.num_classes",
        *(f"{network}{name}" for network in ("student.init_args.", TEACHERS_NETWORK) for name in CLASSES),
    ),
    "num_keypoints": (
        "task.init_args.num_keypoints",
        "student.init_args.num_keypoints",
        f"{TEACHERS_NETWORK}num_keypoints",
    ),
    "image_size": ("student.init_args.image_size", f"{TEACHERS_NETWORK}image_size"),
    "ignore_index": ("task.init_args.ignore_index",),
    "class_names": ("task.init_args.class_names",),
}
"""What the data say, once: it is filled in wherever the model has an argument of that name, and the data have it."""

ASKED_BEFORE = ("num_classes", "num_keypoints", "image_size")
"""Of these, what nothing can be made without: data that have the attribute have to know it."""


class LinkedParser(LightningArgumentParser):
    """Lightning's parser, which writes down also what is linked: data without the attribute leave what was given.

    Of several files a later one leaves the terms that it does not name.
    """

    _written: Namespace

    def add_links(self) -> None:
        """Fill in what the data say."""
        for said, targets in LINKED.items():
            for target in targets:
                self.link_arguments("data", f"model.{target}", self._filled_in(said, target), apply_on="instantiate")

    def instantiate_classes(self, cfg: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Make the classes of a configuration; what was written in it stays where the data say nothing.

        Args:
            cfg: The configuration.
            args: As jsonargparse's.
            kwargs: As jsonargparse's.
        """
        self._written = cfg
        return super().instantiate_classes(cfg, *args, **kwargs)

    def _filled_in(self, said: str, target: str) -> Callable[[Any], Any]:
        """Return what finds the value of an argument, once the data are there."""

        def fill(data: Any) -> Any:
            missing = object()
            value = getattr(data, said, missing)
            if value is missing:
                return _given(self._written, f"model.{target}", said, type(data).__name__)
            if value is None and said in ASKED_BEFORE:
                raise UsageError(
                    f"data.{said} is None: the networks are made with it, before setup() of the data runs. Set it in "
                    "__init__, or on the class"
                )
            return value

        fill.__name__ = said  # which --help_all shows
        return fill

    def merge_config(self, cfg_from: Namespace, cfg_to: Namespace) -> Namespace:
        """Merge a configuration, that of a file for one, into what was given before it.

        Terms that are not named stay: jsonargparse has put each that is named together with the one before it, but
        would replace the dictionary of them as a whole. Where none are, in ``{}`` or null, all go.

        Args:
            cfg_from: The configuration from which to merge.
            cfg_to: The configuration into which to merge.
        """
        before, named = cfg_to.get(TERMS), cfg_from.get(TERMS)
        if isinstance(before, dict) and isinstance(named, dict) and named:
            cfg_from = cfg_from.clone()
            cfg_from[TERMS] = before | named
        return super().merge_config(cfg_from, cfg_to)

    def validate(self, cfg: Namespace, *args: Any, **kwargs: Any) -> None:
        """Check a configuration; of a term without a loss the name is told, which jsonargparse leaves out.

        Args:
            cfg: The configuration.
            args: As jsonargparse's.
            kwargs: As jsonargparse's.
        """
        try:
            super().validate(cfg, *args, **kwargs)
        except (TypeError, KeyError):
            refuse_terms_without_loss(cfg.get(str(cfg.get("subcommand")), cfg).get(TERMS))
            raise

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """Serialize a configuration, without the defaults that a file would give back as something else.

        With ``skip_link_targets``, the default, what is linked is left out where nobody gave it; jsonargparse would
        leave out what was given, too, and of a class inside of a class always. What nobody gave to the teacher's
        network is never there: the records of its training stay as they are.

        Args:
            cfg: The configuration.
            args: As jsonargparse's.
            kwargs: As jsonargparse's.
        """
        every = kwargs.pop("skip_link_targets", True)
        cfg = cfg.clone()
        for target in (each for targets in LINKED.values() for each in targets):
            if every or target.startswith(TEACHERS_NETWORK):
                _drop_default(cfg, f"model.{target}")
        text: str = super().dump(lasting(cfg), *args, **kwargs | {"skip_link_targets": False})
        return text


def refuse_terms_without_loss(terms: dict[str, Namespace] | None) -> None:
    """Refuse a term that was given no loss by any of the files and options: the name is mistyped.

    Args:
        terms: What was parsed, by name. A class of one's own may need no loss.

    Raises:
        UsageError: If there is such a term.
    """
    terms = terms or {}
    without = [
        name
        for name, term in terms.items()
        if term.get("class_path") == "lightning_kd.Term" and term.get("init_args.loss") is None
    ]
    there = sorted(terms.keys() - without)
    for name in without:
        raise UsageError(
            f"term {name!r} has no loss; the terms with one are: {', '.join(there) or 'none'}.{guess(name, there, 0.5)}"
        )


def _drop_default(cfg: Namespace, key: str) -> None:
    """Take an argument of a class out that is as the class has it, or None, if it has to be given."""
    owner, _, name = key.rpartition(".init_args.")
    if key not in cfg:
        return
    try:
        signature = inspect.signature(pydoc.locate(cfg[owner]["class_path"]))  # type: ignore[arg-type]
        default = signature.parameters[name].default
    except (TypeError, ValueError, KeyError):  # what cannot be looked into, or takes any keyword
        return
    if cfg[key] == (None if default is inspect.Parameter.empty else default):
        cfg.pop(key)


def _given(cfg: Namespace, key: str, said: str, data: str) -> Any:
    """Return what was given to an argument that the data say nothing of.

    Raises:
        UsageError: If nothing was, and its class has no default: jsonargparse, for which what is linked is given, would
            make the class with None.
    """
    value = cfg.get(key)
    owner, _, name = key.rpartition(".init_args.")
    if key in cfg and value is None and _required(cfg[owner]["class_path"], name):
        raise UsageError(
            f"{owner}: {cfg[owner]['class_path']} needs {name}, which is not written, and the data, {data}, have no "
            f"attribute {said} to take it from. Give them one, in __init__ or on the class, since setup() runs later; "
            f"or write {name} among the init_args of {owner}"
        )
    return value


def _required(class_path: str, name: str) -> bool:
    """Whether a class has no default for an argument, its own or one that it gives on to its parent's."""
    for each in inspect.getmro(pydoc.locate(class_path)):  # type: ignore[arg-type]
        own = vars(each).get("__init__")
        if own and (found := inspect.signature(own).parameters.get(name)):
            takes_none = any(word in str(found.annotation) for word in ("None", "Optional"))
            return found.default is inspect.Parameter.empty and not takes_none
    return False
