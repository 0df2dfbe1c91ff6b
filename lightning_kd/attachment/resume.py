"""Resuming: what a checkpoint holds of a distillation, and whether it fits the one that goes on with it."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lightning_kd.distiller import Distiller
from lightning_kd.sharding import sharded_as, whole

START_ANEW = "start a new fit from the checkpoint's weights: module.load_state_dict(checkpoint['state_dict'])"


def learning(distiller: Distiller) -> list[str]:
    """Returns the names of what has parameters to learn."""
    named = [*distiller.named_terms(), ("the teacher", distiller.teacher_learner)]
    return [name for name, part in named if part is not None and any(p.requires_grad for p in part.parameters())]


def saved(distiller: Distiller) -> dict[str, Any]:
    """Returns what a checkpoint must hold: what the terms learned and where, and what the teacher remembers."""
    learned, memory = whole(distiller.state_dict()), distiller.teacher.memory()
    wiring = {
        name: f"{term.student.text!r} and the teacher's {term.teacher.text!r}"
        for name, term in distiller.named_terms()
        if term.state_dict()
    }
    state = {"learned": learned, "wiring": wiring, "teacher": memory}
    return {key: value for key, value in state.items() if value}


def restore(distiller: Distiller, state: Mapping[str, Any]) -> None:
    """Takes back what ``saved`` returned.

    Raises:
        ValueError: If it is not what these terms and this teacher can take.
    """
    was, now = state.get("learned", {}), saved(distiller)
    learned, wiring, memory = (now.get(key, {}) for key in ("learned", "wiring", "teacher"))
    differ = _differences(was, learned) or [
        f"{name} compared the student's {ends} and compares the student's {wiring[name]}"
        for name, ends in state.get("wiring", {}).items()
        if name in wiring and wiring[name] != ends
    ]
    if not differ and list(was) != list(learned):
        differ = [f"their order was {', '.join(dict.fromkeys(key.split('.')[1] for key in was))}"]
    if differ:
        raise ValueError(
            f"What the terms learned in the run that is resumed does not fit the terms of this one: "
            f"{'; '.join(differ[:6])}{f'; and {len(differ) - 6} more' if len(differ) > 6 else ''}. Resume with the "
            f"same terms, in the same order, or {START_ANEW}."
        )
    remembered = state.get("teacher", {})
    if remembered.keys() != memory.keys():
        raise ValueError(
            f"The teacher of the run that is resumed remembered {sorted(remembered) or 'nothing'}, and this one, a "
            f"{type(distiller.teacher).__name__}, remembers {sorted(memory) or 'nothing'}. Resume with the same "
            f"teacher, or {START_ANEW}."
        )
    distiller.load_state_dict(sharded_as(was, distiller.state_dict()))
    distiller.teacher.recall(remembered)


def state_of(states: Mapping[str, Any], key: str, attached: Collection[str]) -> Mapping[str, Any]:
    """Returns the state under a key, or, where the terms are others now, that of a callback of the kind that is gone.

    Args:
        states: The states of callbacks in a checkpoint, by their keys.
        key: Of the callback that is asked for: its class, and its terms in braces.
        attached: The keys of all callbacks that distil.
    """
    kind = key.partition("{")[0]
    gone = [other for other in states if other.partition("{")[0] == kind and other not in attached]
    found: Mapping[str, Any] = states.get(key) or (states[gone[0]] if len(gone) == 1 else {})
    return found


def refuse_other_order(states: Collection[str], attached: Collection[str]) -> None:
    """Refuses callbacks in another order: an optimizer knows parameters by their place alone."""
    then, now = [key for key in states if key in attached], [key for key in attached if key in states]
    if then != now:
        raise ValueError(
            f"The run that is resumed had its callbacks in the order {', '.join(then)}, and this one has "
            f"{', '.join(now)}. Give them in the same order, or {START_ANEW}."
        )


def refuse_other_run(distiller: Distiller, state: Mapping[str, Any], name: str) -> None:
    """Refuses to resume a run that trained without these terms: its optimizer does not know their parameters."""
    here = learning(distiller)
    if here and not state:
        raise ValueError(
            f"The run that is resumed has nothing for this {name}, whose terms have parameters to learn: "
            f"{', '.join(here)}. It was trained without it, with terms that learn nothing, or with the terms grouped "
            f"otherwise in callbacks. Resume it as it was, or {START_ANEW}."
        )


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    differ = [f"{_name(key)} {_shape(was[key])} is gone" for key in was if key not in now]
    differ += [f"{_name(key)} is new" for key in now if key not in was]
    return differ + [
        f"{_name(key)} was {_shape(was[key])} and is {_shape(value)}"
        for key, value in now.items()
        if key in was and _shape(was[key]) != _shape(value)
    ]


def _name(key: str) -> str:
    return key.removeprefix("terms.")


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
