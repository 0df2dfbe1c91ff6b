"""Names of modules and what of their outputs is meant."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from tapped import Fields, ModelOutput, Net
from torch import nn

from lightning_kd.wiring import OUTPUT, Levels, Path, describe, find_module

Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    ("text", "module", "selectors"),
    [
        ("output", OUTPUT, []),
        ("output.logits", OUTPUT, ["logits"]),
        ("output[0]", OUTPUT, [0]),
        ("output[-1].hidden[2]", OUTPUT, [-1, "hidden", 2]),
        ('output["a.b c"]', OUTPUT, ["a.b c"]),
        ("output['p3'][1]", OUTPUT, ["p3", 1]),
        ("layer3", "layer3", []),
        ("layer3.0.conv1", "layer3.0.conv1", []),
        ("encoder.4[0]", "encoder.4", [0]),
        ("encoder[0].hidden", "encoder", [0, "hidden"]),
        ("outputs.0", "outputs.0", []),
        ("output_layer", "output_layer", []),
    ],
)
def test_a_path_is_a_module_and_selectors(text: str, module: str, selectors: list[Any]) -> None:
    path = Path(text)
    assert (path.module, path.selectors) == (module, selectors)


@pytest.mark.parametrize(
    "text", ["", "[0]", "output.", "output[", "output[]", "output[a]", "layer[0", "layer[0]x", "output[1.5]", "a[0] "]
)
def test_what_is_not_a_path_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a path.*named_modules.*output\.logits"):
        Path(text)


@pytest.mark.parametrize("given", [0, None, torch.nn.ReLU()])
def test_what_is_no_text_is_no_path(given: Any) -> None:
    with pytest.raises(TypeError, match="name of a module as text"):
        Path(given)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("output", 7),
        ("output[0]", (7, 8)),
        ("output[-1]", [8, 7]),
        ("output.logits", {"logits": 7}),
        ('output["logits"]', {"logits": 7}),
        ("output.logits", Fields(7)),
        ("output.logits", ModelOutput(logits=7)),
        ("output[0]", ModelOutput(logits=7)),
        ('output["logits"]', ModelOutput(logits=7)),
        ("output.second", Pair(0, 7)),
        ("output[1]", Pair(0, 7)),
        ("output.hidden[1].p3", Fields(0, [0, {"p3": 7}])),
        ("output[0]", {0: 7}),
        ("output.keys", {"keys": 7}),  # a key, and not the method of a dict
    ],
)
def test_selectors_read_every_kind_of_output(text: str, value: Any) -> None:
    assert Path(text).select(value) == 7


@pytest.mark.parametrize(
    ("text", "value", "levels"),
    [
        ("neck[:]", (1, 2, 3), [1, 2, 3]),
        ("neck[1:]", {"p3": 1, "p4": 2, "p5": 3}, [2, 3]),
        ("output.features[:-1]", Fields(0, [1, 2, 3]), None),
        ("output.hidden[:-1]", Fields(0, [1, 2, 3]), [1, 2]),
        ("head[0][-2:]", ([1, 2, 3], [4, 5, 6]), [2, 3]),
    ],
)
def test_slices_select_levels(text: str, value: Any, levels: list[int] | None) -> None:
    if levels is None:
        with pytest.raises(KeyError, match="'features' is not in a Fields"):
            Path(text).select(value)
    else:
        assert Path(text).select(value) == levels
        assert isinstance(Path(text).select(value), Levels)


@pytest.mark.parametrize(
    ("text", "value", "said"),
    [
        ("output[2]", (1, 2), r"\[2\] is not in a tuple of 2 items"),
        ("output.hidden", {"logits": 1}, "'hidden' is not in a dict with the keys 'logits'"),
        ("output.hiden", Fields(1), "'hiden' is not in a Fields with the fields 'logits', 'hidden'"),
        ("output.a.b", {"a": torch.zeros(2, 3)}, r"'b' is not in a tensor of shape \(2, 3\)"),
        ("output[0]", 3, r"\[0\] is not in a int"),
        ("output[1:]", 3, r"\[1:\] is not in a int"),
        ("neck[2:]", (1, 2), r"\[2:\] selects nothing of a tuple of 2 items"),
    ],
)
def test_a_selector_that_finds_nothing_says_what_there_is(text: str, value: Any, said: str) -> None:
    with pytest.raises(KeyError, match=said):
        Path(text).select(value)


def test_a_part_of_the_batch_is_not_selected_by_mistake() -> None:
    with pytest.raises(KeyError, match="would be a part of the batch"):
        Path("layer1[0]").select(torch.zeros(2, 3))
    with pytest.raises(KeyError, match=r"\[:2\] of a tensor of shape \(2, 3\) would be a part of the batch"):
        Path("layer1[:2]").select(torch.zeros(2, 3))


def test_describe_lists_keys_and_fields() -> None:
    assert describe(ModelOutput(logits=1)) == "a ModelOutput with the keys 'logits'"
    assert describe(None) == "a NoneType"


def test_an_unknown_module_lists_the_closest_names() -> None:
    with pytest.raises(ValueError, match=r"the student \(Net\) has no module 'blocks\.2'.*'blocks\.[01]'"):
        find_module(Net(), "blocks.2", "the student")
    told = r"has no module 'output'\. Closest: .*\. A path is a name of named_modules\(\)"
    with pytest.raises(ValueError, match=rf"{told}\.$"):  # which is no layer of a whole LightningModule
        find_module(nn.Sequential(nn.Identity()), "output", "the LightningModule")
    with pytest.raises(ValueError, match=rf"{told}, or 'output' for what forward\(\) returns\.$"):
        find_module(nn.Sequential(nn.Identity()), "output", "the student")
    with pytest.raises(ValueError, match=r"no module 'zzz'. Closest: 'first', 'act', 'blocks', 'head'"):
        find_module(Net(), "zzz", "the student")
    with pytest.raises(ValueError, match="it has no submodules"):
        find_module(nn.Linear(2, 2), "weight", "the student")


def test_names_of_a_compiled_model_are_those_of_the_model() -> None:
    model = Net()
    assert find_module(torch.compile(model, backend="eager"), "blocks.1", "it") is model.blocks[1]
    model.blocks = torch.compile(model.blocks, backend="eager")
    assert find_module(model, "blocks.1", "it") is model.blocks._orig_mod[1]
    with pytest.raises(ValueError, match=r"'blocks\.1'") as error:
        find_module(model, "blocks.3", "it")
    assert "_orig_mod" not in str(error.value)
