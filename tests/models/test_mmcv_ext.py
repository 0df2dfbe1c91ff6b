"""Each operation through the Python of mmcv that calls it, against torchvision or another way to compute it."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from lightning_kd.models import mmcv_ext

mmcv_ext.install()

from mmcv import ops  # noqa: E402


def boxes_and_scores(count: int = 60) -> tuple[Tensor, Tensor]:
    corner = 50 * torch.rand(count, 2)
    return torch.cat((corner, corner + 5 + 20 * torch.rand(count, 2)), 1), torch.rand(count)


def same_with_gradients(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-5
) -> None:
    """Compare values, and gradients in a random direction, of all inputs that are floats."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        direction = torch.linspace(-1, 1, output.numel()).view(output.shape)
        results.append((output, *torch.autograd.grad((output * direction).sum(), leaves)))
    for own, other in zip(*results, strict=True):
        assert own.abs().sum() > 0
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


# Where it stands in, and where not


def test_it_is_installed_once() -> None:
    mmcv_ext.install()
    mmcv_ext.install()
    assert sum(type(finder).__module__ == mmcv_ext.__name__ for finder in sys.meta_path) == 1
    assert sys.modules["mmcv._ext"].__spec__ is not None


@pytest.mark.slow
def test_it_stands_in_where_there_is_none_and_leaves_a_compiled_one_alone(tmp_path: Path) -> None:
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").touch()
    compiled = package / "_ext.py"
    compiled.write_text("nms = 'compiled'")
    script = f"""
    import importlib.util, runpy, sys
    ours = runpy.run_path({mmcv_ext.__file__!r})  # without the package, whose import takes a while
    print({{"mmcv", "mmdet", "mmengine", "torchvision"}} & {{*sys.modules}})
    sys.path.insert(0, {str(tmp_path)!r})
    for _ in range(2):
        import mmcv._ext
        print(mmcv._ext.nms, mmcv._ext.__file__)
        del sys.modules["mmcv._ext"], sys.modules["mmcv"]
        ours["install"]()
    sys.path.pop(0)
    print(importlib.util.find_spec("mmcv._ext").origin == ours["__file__"])
    sys.meta_path.pop()
    print(importlib.util.find_spec("mmcv._ext"))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["set()", *[f"compiled {compiled}"] * 2, "True", "None"]


def test_an_operation_that_is_missing_says_so_when_it_is_called() -> None:
    with pytest.raises(NotImplementedError, match=r"'roi_pool_forward' is not among .*nms.*Install a compiled mmcv"):
        ops.roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0)


# The operations


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_nms(threshold: float) -> None:
    boxes, scores = boxes_and_scores()
    kept = ops.nms(boxes, scores, threshold)[1]
    assert 1 < len(kept) < len(boxes)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))


def test_the_offset_of_nms_counts_the_last_pixel() -> None:
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 5.0, 9.0, 14.0]])  # of 10 pixels each; 5 rows are shared: 1/3
    for threshold, kept in ((0.32, 1), (0.34, 2)):
        assert len(ops.nms(boxes, torch.tensor([0.9, 0.8]), threshold, offset=1)[1]) == kept
    assert len(ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.32, offset=0)[1]) == 2  # 4/14


def test_soft_nms_that_is_not_soft_is_nms() -> None:
    boxes, scores = boxes_and_scores()
    dets, kept = ops.soft_nms(boxes, scores, 0.3, method="naive", min_score=1e-6)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.3))
    assert torch.equal(dets, torch.cat((boxes, scores[:, None]), 1)[kept])


def test_soft_nms_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 5.0, 10.0, 15.0], [50.0, 50.0, 60.0, 60.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    third = torch.tensor(1 / 3)
    linear, order = ops.soft_nms(boxes, scores, 0.3, method="linear")
    assert order.tolist() == [0, 2, 1]
    torch.testing.assert_close(linear[:, 4], torch.tensor([0.9, 0.7, 0.8 * 2 / 3]))
    gaussian, _ = ops.soft_nms(boxes, scores, 0.3, sigma=0.5, method="gaussian")
    torch.testing.assert_close(gaussian[2, 4], 0.8 * (-(third**2) / 0.5).exp())
    assert len(ops.soft_nms(boxes, scores, 0.3, method="linear", min_score=0.6)[0]) == 2


def test_nms_match_groups_what_nms_keeps() -> None:
    boxes, scores = boxes_and_scores()
    groups = ops.nms_match(torch.cat((boxes, scores[:, None]), 1), 0.3)
    assert [int(group[0]) for group in groups] == torchvision.ops.nms(boxes, scores, 0.3).tolist()
    assert sorted(i for group in groups for i in group.tolist()) == list(range(len(boxes)))
    for group in groups:
        assert (torchvision.ops.box_iou(boxes[group[:1]], boxes[group]) >= 0.3).all()
        assert (scores[group].diff() <= 0).all()


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(sampling: int, aligned: bool) -> None:
    boxes, _ = boxes_and_scores(6)
    rois = torch.cat((torch.tensor([0, 1, 0, 1, 1, 0.0])[:, None], boxes), 1)
    same_with_gradients(
        lambda x: ops.roi_align(x, rois, (3, 4), 0.25, sampling, "avg", aligned),
        lambda x: torchvision.ops.roi_align(x, rois, (3, 4), 0.25, sampling, aligned),
        torch.randn(2, 5, 20, 24),
    )


def test_roi_align_of_maxima_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 0, "max")


def test_sigmoid_focal_loss() -> None:
    target = torch.tensor([0, 3, 2, 4, 4, 1])  # 4 is the background
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4].double()
    logits = 5 * torch.randn(6, 4, dtype=torch.float64)
    same_with_gradients(
        lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "none"),
        lambda x: torchvision.ops.sigmoid_focal_loss(x, one_hot, alpha=0.25, gamma=2.0),
        logits,
    )
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    inside = target.clamp(max=3)
    weighted = ops.sigmoid_focal_loss(logits, inside, 2.0, 0.25, weight, "none")
    plain = ops.sigmoid_focal_loss(logits, inside, 2.0, 0.25, None, "none")
    torch.testing.assert_close(weighted, plain * weight[inside][:, None])


def test_sigmoid_focal_loss_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 200 + 0.25 * 200)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_deformable_attention() -> None:
    from mmcv.ops.multi_scale_deform_attn import (  # noqa: PLC0415
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    shapes, starts = torch.tensor([[6, 5], [3, 2]]), torch.tensor([0, 30])
    inputs = torch.randn(2, 36, 2, 4), torch.rand(2, 7, 2, 2, 3, 2), torch.rand(2, 7, 2, 2, 3)
    same_with_gradients(
        lambda value, at, weights: MultiScaleDeformableAttnFunction.apply(value, shapes, starts, at, weights, 64),
        lambda value, at, weights: multi_scale_deformable_attn_pytorch(value, shapes, at, weights),
        *inputs,
    )


def convolution(groups: int = 1) -> dict[str, Tensor]:
    return {
        "x": torch.randn(2, 4, 7, 8),
        "offset": torch.randn(2, 2 * 2 * 9, 4, 4),  # of two groups
        "mask": torch.rand(2, 2 * 9, 4, 4),
        "weight": torch.randn(6, 4 // groups, 3, 3),
        "bias": torch.randn(6),
    }


@pytest.mark.parametrize("groups", [1, 2])
def test_deformable_convolution(groups: int) -> None:
    given = convolution(groups)
    same_with_gradients(
        lambda x, offset, weight: ops.deform_conv2d(x, offset, weight, 2, 1, 1, groups, 2),
        lambda x, offset, weight: torchvision.ops.deform_conv2d(x, offset, weight, None, 2, 1, 1),
        *(given[name] for name in ("x", "offset", "weight")),
    )


@pytest.mark.parametrize("bias", [True, False])
def test_modulated_deformable_convolution(bias: bool) -> None:
    given: dict[str, Any] = convolution()
    if not bias:
        del given["bias"]

    def ours(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found: Tensor = ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 2, 1, 1, 1, 2)
        return found

    def theirs(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found: Tensor = torchvision.ops.deform_conv2d(x, offset, weight, bias, 2, 1, 1, mask)
        return found

    same_with_gradients(ours, theirs, *given.values())
