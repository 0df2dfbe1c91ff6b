"""What mmdet needs of mmcv's compiled operations, over torchvision's: with it, ``mmcv-lite`` is enough.

Only the module ``mmcv._ext`` is missing from ``mmcv-lite``; everything around it is Python, and there. Each function
here has the name and the arguments under which ``mmcv.ops`` calls the compiled one, and writes into the tensors that it
is given. ``tests/test_mmcv_ext.py`` compares them with torchvision and with mmcv's own Python versions.
"""

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "mmcv._ext"


def install() -> None:
    """Lets ``import mmcv._ext`` succeed where no compiled one is installed.

    A compiled one is found first, always: the finder is asked after all others. Call it before anything imports
    ``mmcv.ops`` or ``mmdet.models``, in each process; a second call does nothing.

    Example:
        >>> install()
        >>> sum(isinstance(finder, _Finder) for finder in sys.meta_path)
        1
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, _Loader(), origin=__file__) if fullname == NAME else None


class _Loader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_OPERATIONS, __getattr__=_missing)


def _missing(name: str) -> Callable[..., Any]:
    """Makes what stands for every other operation: mmcv asks for all of them as it is imported, and calls few."""
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's operation {name!r} is not among those that lightning-kd brings for mmcv-lite, "
            f"{', '.join(_OPERATIONS)}. Install a compiled mmcv (>=2.0.0, <2.2.0) in place of mmcv-lite, "
            "https://mmcv.readthedocs.io/en/latest/get_started/installation.html; it is used as soon as it is there."
        )

    return unavailable


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Returns the indices of what is kept, best first; with ``offset=1`` a box includes its last pixel."""
    from torchvision import ops  # noqa: PLC0415

    kept: Tensor = ops.nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)
    return kept


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lowers scores by overlap (0 to nothing, 1 linearly, 2 by a Gaussian); writes boxes and scores into ``dets``."""
    boxes, scores = boxes.clone(), scores.clone()
    whole = boxes + boxes.new_tensor([0, 0, offset, offset])
    left = torch.arange(len(boxes))
    kept: list[int] = []
    while len(left):
        best = int(left[scores[left].argmax()])
        dets[len(kept)] = torch.cat((boxes[best], scores[best, None]))
        kept.append(best)
        left = left[left != best]
        overlap = _overlap(whole[best], whole[left])
        if method == 2:
            factor = (-(overlap**2) / sigma).exp()
        else:
            factor = torch.where(overlap >= iou_threshold, 1 - overlap if method else 0.0, 1.0)
        scores[left] *= factor
        left = left[scores[left] >= min_score]
    return torch.tensor(kept, dtype=torch.int64)


def _overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Returns the intersection over union of one box with each of several."""
    from torchvision import ops  # noqa: PLC0415

    ious: Tensor = ops.box_iou(box[None], boxes)[0]
    return ious


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Returns groups of indices, of boxes with scores (n, 5): each what is kept, then what it suppressed."""
    left = dets[:, 4].argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    while len(left):
        best, left = left[0], left[1:]
        suppressed = _overlap(dets[best, :4], dets[left, :4]) >= iou_threshold
        groups.append([int(best), *left[suppressed].tolist()])
        left = left[~suppressed]
    return groups


def roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Averages the features in each region; ``pool_mode`` 0, the maximum, is nothing that torchvision has."""
    from torchvision import ops  # noqa: PLC0415

    if pool_mode == 0:
        _missing("roi_align with pool_mode='max'")()
    size = (aligned_height, aligned_width)
    output.copy_(ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    gradient: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    of_features: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the gradient of the features, whose values it does not depend on."""
    size = (aligned_height, aligned_width)
    backward = torch.ops.torchvision._roi_align_backward
    of_features.copy_(backward(gradient, rois, spatial_scale, *size, *of_features.shape, sampling_ratio, aligned))


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the focal loss of every logit (N, C); a target that is no class, C, is the background."""
    output.copy_(_focal(logits, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, of_logits: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the gradient of the logits."""
    (gradient,) = _gradients(lambda x: _focal(x, target, weight, gamma, alpha), [logits])
    of_logits.copy_(gradient)


def _focal(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    positive = target[:, None] == torch.arange(logits.shape[1], device=target.device)
    # In log space: -log(p) of the right answer, and how far from it the answer is.
    signed = torch.where(positive, logits, -logits)
    balance = torch.where(positive, alpha, 1 - alpha)
    loss: Tensor = -balance * F.sigmoid(-signed) ** gamma * F.logsigmoid(signed)
    return loss * weight[target][:, None] if weight.numel() else loss


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """Returns multi-scale deformable attention, as mmcv computes it in Python."""
    from mmcv.ops import multi_scale_deform_attn as of_mmcv  # noqa: PLC0415

    attended: Tensor = of_mmcv.multi_scale_deformable_attn_pytorch(value, shapes.tolist(), locations, weights)
    return attended


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    gradient: Tensor,
    of_value: Tensor,
    of_locations: Tensor,
    of_weights: Tensor,
    im2col_step: int,
) -> None:
    """Writes the gradients; the forward is computed once more for them."""

    def attended(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)

    found = _gradients(attended, [value, locations, weights], gradient)
    for out, computed in zip((of_value, of_locations, of_weights), found, strict=True):
        out.copy_(computed)


def deform_conv_forward(
    x: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: int
) -> None:
    """Writes a deformable convolution (v1); torchvision orders offsets alike."""
    output.copy_(_deform_conv(x, offset, weight, geometry))


def deform_conv_backward_input(
    x: Tensor,
    offset: Tensor,
    gradient: Tensor,
    of_x: Tensor,
    of_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Writes the gradients of input and offsets."""
    found = _gradients(lambda x, offset: _deform_conv(x, offset, weight, geometry), [x, offset], gradient)
    of_x.copy_(found[0])
    of_offset.copy_(found[1])


def deform_conv_backward_parameters(
    x: Tensor, offset: Tensor, gradient: Tensor, of_weight: Tensor, columns: Tensor, ones: Tensor, **geometry: int
) -> None:
    """Writes the gradient of the weight."""
    (found,) = _gradients(lambda weight: _deform_conv(x, offset, weight, geometry), [of_weight], gradient)
    of_weight.copy_(found)


def _deform_conv(x: Tensor, offset: Tensor, weight: Tensor, geometry: dict[str, int]) -> Tensor:
    from torchvision import ops  # noqa: PLC0415

    stride, padding, dilation = ((geometry[f"{name}H"], geometry[f"{name}W"]) for name in ("d", "pad", "dilation"))
    found: Tensor = ops.deform_conv2d(x, offset, weight, None, stride, padding, dilation)
    return found


def modulated_deform_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Writes a deformable convolution with a mask (v2)."""
    output.copy_(_modulated(x, weight, bias, offset, mask, geometry))


def modulated_deform_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    of_x: Tensor,
    of_weight: Tensor,
    of_bias: Tensor,
    of_offset: Tensor,
    of_mask: Tensor,
    gradient: Tensor,
    **geometry: int,
) -> None:
    """Writes the gradients."""
    inputs, outputs = [x, weight, offset, mask], [of_x, of_weight, of_offset, of_mask]
    if bias.numel():
        inputs, outputs = [*inputs, bias], [*outputs, of_bias]

    def convolved(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor = bias) -> Tensor:
        return _modulated(x, weight, bias, offset, mask, geometry)

    for out, computed in zip(outputs, _gradients(convolved, inputs, gradient), strict=True):
        out.copy_(computed)


def _modulated(
    x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor, geometry: dict[str, int]
) -> Tensor:
    from torchvision import ops  # noqa: PLC0415

    stride, padding, dilation = (
        (geometry[f"{name}_h"], geometry[f"{name}_w"]) for name in ("stride", "pad", "dilation")
    )
    found: Tensor = ops.deform_conv2d(
        x, offset, weight, bias if bias.numel() else None, stride, padding, dilation, mask
    )
    return found


def _gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor | None = None
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, torch.ones_like(output) if gradient is None else gradient)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (
        nms,
        softnms,
        nms_match,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
    )
}
