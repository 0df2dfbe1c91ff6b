import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lightning_kd import Distiller, Term, losses, projectors
from lightning_kd.projectors import bridge, grid_of, resize

SHAPES = {
    "map": (2, 6, 4, 4),
    "big map": (2, 6, 8, 8),
    "oblong map": (2, 3, 2, 6),
    "tokens": (2, 16, 5),
    "tokens with class": (2, 17, 6),
    "fewer tokens": (2, 4, 6),
    "tokens with registers": (2, 81 + 5, 7),
}


def parameters_of(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(SHAPES, SHAPES)))
@pytest.mark.parametrize("align", ["shape", "size"])
def test_every_pair_of_maps_and_tokens_meets(student: str, teacher: str, align: projectors.Align) -> None:
    s, t = torch.randn(SHAPES[student], requires_grad=True), torch.randn(SHAPES[teacher])
    projector, teacher_side = bridge(s, t, align)
    out, wanted = projector(s), teacher_side(t)
    assert parameters_of(teacher_side) == 0
    if align == "shape":
        assert out.shape == wanted.shape
    else:
        assert parameters_of(projector) == 0
        assert out.ndim == wanted.ndim
        size = slice(2, None) if out.ndim == 4 else slice(1, 2)
        assert out.shape[size] == wanted.shape[size]
    out.square().sum().backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("align", ["none", "shape", "size"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 7, 3), (2, 3, 4, 5), (2,), (2, 3, 4, 5, 6)])
def test_equal_shapes_need_nothing(shape: tuple[int, ...], align: projectors.Align) -> None:
    x = torch.randn(shape)
    projector, teacher_side = bridge(x, x.clone(), align)
    assert torch.equal(projector(x), x)
    assert torch.equal(teacher_side(x), x)


def test_a_loss_that_aligns_nothing_gets_nothing() -> None:
    s, t = torch.randn(2, 3), torch.randn(2, 5, 7, 7)
    projector, teacher_side = bridge(s, t, "none")
    assert projector(s) is s
    assert teacher_side(t) is t


def test_vectors_get_a_linear_map() -> None:
    s, t = torch.randn(2, 3), torch.randn(2, 5)
    projector, _ = bridge(s, t)
    assert projector(s).shape == t.shape
    assert parameters_of(projector) == 3 * 5 + 5


@pytest.mark.parametrize(("s", "t"), [((2, 3), (2, 5)), ((2, 7, 3), (2, 7, 5)), ((2, 3, 4, 4), (2, 5, 4, 4))])
def test_align_size_leaves_alone_what_has_the_size(s: tuple[int, ...], t: tuple[int, ...]) -> None:
    student, teacher = torch.randn(s), torch.randn(t)
    projector, teacher_side = bridge(student, teacher, "size")
    assert torch.equal(projector(student), student)
    assert torch.equal(teacher_side(teacher), teacher)


def test_sequences_of_one_length_need_no_grid() -> None:
    s, t = torch.randn(2, 7, 3), torch.randn(2, 7, 5)
    projector, teacher_side = bridge(s, t)
    assert projector(s).shape == teacher_side(t).shape == (2, 7, 5)


@pytest.mark.parametrize(
    ("s", "t"),
    [
        ((2, 3), (2, 3, 4, 4)),
        ((2, 3, 4, 4), (2, 3)),
        ((2, 3), (2, 16, 3)),
        ((2, 16, 3), (2, 3)),
        ((2, 3, 4, 4, 4), (2, 3, 4, 4)),
        ((2,), (2, 3)),
    ],
)
def test_what_cannot_be_bridged_is_refused_with_both_shapes(s: tuple[int, ...], t: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot be bridged automatically.*projector=") as error:
        bridge(torch.zeros(s), torch.zeros(t))
    assert str(s) in str(error.value)
    assert str(t) in str(error.value)


def test_another_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(4, 5\) differ in their batch size"):
        bridge(torch.zeros(2, 3), torch.zeros(4, 5))


def test_tokens_that_are_no_square_name_the_projector_to_give() -> None:
    with pytest.raises(ValueError, match=r"15 tokens.*TokensToMap\(.*grid=\(h, w\)"):
        bridge(torch.zeros(2, 3, 4, 4), torch.zeros(2, 15, 5))
    projector = projectors.TokensToMap(5, 3, size=(4, 4), grid=(3, 5))
    assert projector(torch.zeros(2, 15, 5)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(196, (0, 14)), (197, (1, 14)), (198, (2, 14)), (261, (5, 16)), (260, (4, 16)), (1, (0, 1))],
)
def test_grid_of(tokens: int, expected: tuple[int, int]) -> None:
    assert grid_of(tokens) == expected


@pytest.mark.parametrize("tokens", [0, 7, 15])
def test_grid_of_what_is_none(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens are not a square grid"):
        grid_of(tokens)


def test_few_numbers_of_tokens_can_be_read_in_two_ways() -> None:
    """What the docstring of grid_of says of them."""
    prefixes = projectors._PREFIX_TOKENS
    readings = {
        n: [(p, math.isqrt(n - p)) for p in prefixes if n > p and math.isqrt(n - p) ** 2 == n - p] for n in range(5000)
    }
    several = {n: found for n, found in readings.items() if len(found) > 1}
    assert sorted(several) == [5, 6, 9, 17]
    assert several[17] == [(1, 4), (8, 3)]
    assert all(grid_of(n) == found[0] for n, found in several.items())
    assert all(side <= 2 for n in (5, 6, 9) for _, side in several[n][1:])


@pytest.mark.parametrize(
    ("s", "t", "align"),
    [
        ((2, 7, 7, 96), (2, 512, 7, 7), "shape"),
        ((2, 64, 8, 8), (2, 4, 4, 768), "shape"),
        ((2, 7, 7, 96), (2, 7, 7, 192), "shape"),
        ((2, 7, 7, 96), (2, 49, 192), "shape"),
        ((2, 7, 7, 96), (2, 7, 7, 96), "size"),
    ],
)
def test_channels_last_maps_are_refused(s: tuple[int, ...], t: tuple[int, ...], align: projectors.Align) -> None:
    with pytest.raises(ValueError, match=r"seems to be \(B, H, W, C\).*ChannelsFirst\(\).*ChannelsLast\(\)") as error:
        bridge(torch.zeros(s), torch.zeros(t), align)
    assert f"student {s} and teacher {t}" in str(error.value)


@pytest.mark.parametrize(
    ("s", "t"),
    [((2, 32, 32, 40), (2, 64, 32, 40)), ((2, 32, 32, 40), (2, 64, 16, 20)), ((2, 64, 16, 20), (2, 16, 16, 20))],
)
def test_oblong_maps_with_as_many_channels_as_rows_are_bridged(s: tuple[int, ...], t: tuple[int, ...]) -> None:
    projector, _ = bridge(torch.zeros(s), torch.zeros(t))
    assert projector(torch.zeros(s)).shape == t


def test_equal_shapes_are_compared_element_by_element_in_either_layout() -> None:
    x = torch.randn(2, 7, 7, 96)
    assert bridge(x, x)[0](x) is x


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_swin_transformer_teaches_and_learns_with_the_projector_that_the_error_names(side: str) -> None:
    small = {"window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "num_classes": 5}
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **small)
    cnn, images = timm.create_model("resnet10t", num_classes=5), torch.randn(2, 3, 32, 32)
    here, there = ("layers.1", "layer2") if side == "student" else ("layer2", "layers.1")
    model, other = (swin, cnn) if side == "student" else (cnn, swin)
    assert swin.layers[1](torch.zeros(2, 8, 8, 8)).shape == (2, 4, 4, 16)
    project = {
        "student": nn.Sequential(projectors.ChannelsFirst(), projectors.MapToMap(16, 128, (4, 4))),
        "teacher": nn.Sequential(projectors.MapToMap(128, 16, (4, 4)), projectors.ChannelsLast()),
    }[side]
    distiller = Distiller({"hint": Term(losses.FitNet(), student=here, teacher=there, projector=project)}, other)
    distiller.attach(model)
    with distiller.watch() as calls:
        model(images)
    value = distiller(calls)["hint"]
    value.backward()
    assert value > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in project.parameters())


def test_channels_move_and_nothing_else() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(projectors.ChannelsLast()(x)[1, 2, 3], x[1, :, 2, 3])
    assert torch.equal(projectors.ChannelsFirst()(projectors.ChannelsLast()(x)), x)


def test_patches_keep_their_place() -> None:
    """A token's position in the grid is that of its pixel, and class tokens have none."""
    image = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    patches = image.flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.full((2, 1, 3), -1.0), patches], dim=1)
    assert torch.equal(projectors.TokensToMap(3, 3, (4, 4))(tokens), image)
    assert torch.equal(projectors.MapToTokens(3, 3, (4, 4))(image), patches)
    assert torch.equal(projectors.TokensToTokens(3, 3, (4, 4))(tokens), patches)
    assert torch.equal(projectors.PatchTokens(1)(tokens), patches)
    _, teacher_side = bridge(image, tokens)
    assert torch.equal(teacher_side(tokens), patches)


def test_resize_averages_down_and_interpolates_up() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(x, (4, 4)) is x
    assert torch.equal(resize(x, (2, 2)), F.avg_pool2d(x, 2))
    assert resize(x, (1, 1)).item() == x.mean().item()
    constant = torch.full((1, 2, 3, 3), 7.0)
    for size in [(9, 9), (2, 9), (9, 2), (1, 5)]:
        torch.testing.assert_close(resize(constant, size), torch.full((1, 2, *size), 7.0))


def test_a_map_is_projected_at_the_smaller_resolution() -> None:
    seen: list[tuple[int, ...]] = []
    for inner, outer in [((8, 8), (2, 2)), ((2, 2), (8, 8))]:
        projector = projectors.MapToMap(3, 5, outer)
        projector.project.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape[2:])))
        assert projector(torch.zeros(1, 3, *inner)).shape == (1, 5, *outer)
    assert seen == [(2, 2), (2, 2)]


def vit(dim: int, patch: int = 8, **kwargs: object) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=patch,
        embed_dim=dim,
        depth=2,
        num_heads=2,
        num_classes=5,
        **kwargs,
    )


MODELS = {
    "cnn": (lambda: timm.create_model("resnet18", num_classes=5), "layer2"),
    "vit": (lambda: vit(24), "blocks.1"),
    "vit with registers": (lambda: vit(16, patch=4, reg_tokens=4), "blocks.1"),
}


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(MODELS, 2)))
def test_real_models_teach_each_other(student: str, teacher: str) -> None:
    (make, student_path), (make_teacher, teacher_path) = MODELS[student], MODELS[teacher]
    model, images = make(), torch.randn(2, 3, 32, 32)
    term = Term(losses.FitNet(), student=student_path, teacher=teacher_path)
    attention = Term(losses.AT(), student=student_path, teacher=teacher_path)
    distiller = Distiller({"hint": term, "at": attention} if teacher == "cnn" else {"hint": term}, make_teacher())
    distiller.attach(model)
    with distiller.watch() as calls:
        model(images)
    distiller.build(calls[0])
    values = distiller(calls)
    distiller.total(values).backward()
    assert all(value > 0 and value.isfinite() for value in values.values())
    assert all(p.grad.abs().sum() > 0 for p in distiller.parameters())
    assert sum(p.grad.abs().sum() for p in model.get_submodule(student_path).parameters()) > 0
