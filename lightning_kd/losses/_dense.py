"""Divergences of maps without copies of the maps: block by block, the gradient in the same pass."""

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.losses._numerics import upcast

BLOCK = {"cpu": 1 << 16, "cuda": 1 << 25}
"""How many elements are worked on at once: on a CPU what its caches hold, on a GPU what keeps it busy."""


def serves(logits: Tensor, temperature: float | Tensor) -> bool:
    """Tell whether these are maps large enough, at one temperature that does not learn, and no transform is at work.

    A compiler fuses the chain itself, and ``torch.func`` follows torch's own functions only. For kernels no map is
    too small.
    """
    one = not isinstance(temperature, Tensor) or not (temperature.ndim or temperature.requires_grad)
    large = logits.ndim > 2 and logits.numel() > (0 if _by_kernels(logits) else _block(logits))
    return large and one and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def chain(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, beta: float, dim: int, reduction: str = "sum"
) -> Tensor:
    """Return what :func:`divergence` is by torch's own functions, summed over everything or over nothing."""
    log_s, log_t = (upcast(x).div(temperature).log_softmax(dim) for x in (student, teacher))
    return of_logs(log_s, log_t, beta, reduction)


def of_logs(log_s: Tensor, log_t: Tensor, beta: float, reduction: str) -> Tensor:
    """Return the divergence of two distributions given by their logarithms."""
    # kl_div(log q, log p) is KL(p || q)
    if beta == 0:
        return F.kl_div(log_s, log_t, reduction=reduction, log_target=True)
    if beta == 1:
        return F.kl_div(log_t, log_s, reduction=reduction, log_target=True)
    mixture = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    from_teacher = F.kl_div(mixture, log_t, reduction=reduction, log_target=True)
    from_student = F.kl_div(mixture, log_s, reduction=reduction, log_target=True)
    return beta * from_teacher + (1 - beta) * from_student


def divergence(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, beta: float, dim: int, here: Tensor | None = None
) -> Tensor:
    """Return the divergence of two tempered softmaxes over ``dim``, summed over all else.

    With ``p = softmax(logits / T)`` and ``m = beta * p_t + (1 - beta) * p_s``: ``beta * KL(p_t || m) + (1 - beta) *
    KL(p_s || m)``; at the ends what that tends to after division, ``KL(p_t || p_s)`` for 0 and ``KL(p_s || p_t)``
    for 1. The chain of ``log_softmax``, ``exp`` and ``kl_div`` keeps several maps in float32 for the backward pass;
    this keeps the student's gradient, in the student's type, and nothing else. It computes in float32.

    Args:
        student: Logits, which may require a gradient.
        teacher: Logits of the same shape, which get none.
        temperature: One number, without a gradient.
        beta: The teacher's share of the mixture.
        dim: Where the softmax is; it is one block, however long.
        here: The shape of the logits without ``dim``: what does not count is False, and may be no number.
    """
    # what a model computed under inference_mode cannot be saved for a backward; a copy of it can
    teacher = teacher.clone() if teacher.is_inference() else teacher.detach()
    total: Tensor = _Divergence.apply(student, teacher, temperature, beta, dim, here)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float | Tensor,
        beta: float,
        dim: int,
        here: Tensor | None,
    ) -> Tensor:
        ctx.settings = temperature, beta, dim
        ctx.kind = student.dtype
        ctx.fused = _by_kernels(student, teacher)
        if ctx.fused:
            total: Tensor
            total, statistics = _kernels().Divergence(student, teacher, temperature, beta, dim, here).value()
            ctx.save_for_backward(student, teacher, here, statistics)
            return total
        ctx.save_for_backward(student, teacher, here, None)
        learns = ctx.needs_input_grad[0]
        total, ctx.gradient = _with_gradient(student, teacher, temperature, beta, dim, here, learns)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if torch.is_grad_enabled():  # create_graph=True: of the gradient, which is a constant here, another is asked
            student, teacher, here, _ = ctx.saved_tensors
            temperature, beta, dim = ctx.settings
            blanked = (student, teacher)
            if here is not None:
                blanked = tuple(torch.where(here.unsqueeze(dim), x, 0.0) for x in blanked)  # type: ignore[assignment]
            total = chain(*blanked, temperature, beta, dim)
            (made,) = torch.autograd.grad(total, student, upstream, create_graph=True)
            return made, *nothing
        if ctx.fused:
            student, teacher, here, statistics = ctx.saved_tensors
            work = _kernels().Divergence(student, teacher, *ctx.settings, here)
            return work.gradient(upstream, statistics), *nothing
        # It is given away, so that no second map is needed; who retains the graph and asks again has it made again.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            student, teacher, here, _ = ctx.saved_tensors
            temperature, beta, dim = ctx.settings
            _, gradient = _with_gradient(student, teacher, temperature, beta, dim, here, learns=True)
        return gradient.mul_(upstream).to(ctx.kind), *nothing


def _with_gradient(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    beta: float,
    dim: int,
    here: Tensor | None,
    learns: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the summed divergence, and its gradient in the student's logits if the student learns."""
    # float16 holds no small numbers before a gradient scaler has made them large
    kind = torch.float32 if student.dtype == torch.float16 else student.dtype
    gradient = torch.empty_like(student, dtype=kind) if learns else None
    total = torch.zeros((), dtype=upcast(student[:0]).dtype, device=student.device)
    counted = None if here is None else here.unsqueeze(dim)
    for block in _blocks(student.shape, dim % student.ndim, _block(student)):
        s, t = upcast(student[block]), upcast(teacher[block])
        if counted is not None:
            only = counted[block]
            s, t = torch.where(only, s, 0.0), torch.where(only, t, 0.0)  # two equal rows diverge by 0
        value, slope = _of_block((s / temperature).log_softmax(dim), (t / temperature).log_softmax(dim), beta, dim)
        total += value
        if gradient is not None:
            if counted is not None:
                slope.masked_fill_(~counted[block], 0.0)  # and not what rounding leaves of 0
            gradient[block] = slope.div_(temperature)
    return total, gradient


def _of_block(log_s: Tensor, log_t: Tensor, beta: float, dim: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the divergences, and its gradient in ``s`` where ``log_s = s.log_softmax(dim)``."""
    p_s, p_t = log_s.exp(), log_t.exp()
    if beta == 0:
        return (p_t * (log_t - log_s)).sum(), p_s.sub_(p_t)
    if beta == 1:
        ratio = log_s - log_t
        value = (p_s * ratio).sum()
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
        ratio = (log_s - log_m).mul_(1 - beta)
        value = beta * (p_t * (log_t - log_m)).sum() + (p_s * ratio).sum()
    # the softmax's own derivative: what raises every class alike changes nothing
    return value, p_s.mul_(ratio.sub_((p_s * ratio).sum(dim, keepdim=True)))


def _by_kernels(*maps: Tensor) -> bool:
    """Tell whether kernels were asked for, and are for such maps; a subclass of tensors may have no memory."""
    asked = os.environ.get("LIGHTNING_KD_TRITON", "0") not in ("", "0")
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return asked and all(type(x) is Tensor and x.is_cuda and x.dtype in kinds for x in maps)


def _kernels() -> Any:
    try:
        from lightning_kd.losses import _triton  # noqa: PLC0415  # torch brings it on Linux, for GPUs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "LIGHTNING_KD_TRITON asks for kernels of Triton, which is not installed: pip install triton, or unset it.",
            name=error.name,
        ) from error
    return _triton


def _block(x: Tensor) -> int:
    return BLOCK.get(x.device.type, BLOCK["cuda"])


def _blocks(shape: torch.Size, dim: int, limit: int) -> Iterator[tuple[slice, ...]]:
    """Yield parts of a tensor that are whole along ``dim`` and have about so many elements at most."""
    if dim < len(shape) - 1:  # a few positions of many classes would be far apart in memory
        limit = max(limit, 64 * shape[dim])
    others = [d for d in range(len(shape)) if d != dim]
    step = list(shape)
    for d in others:  # the outermost first, whose parts lie together
        rest = math.prod(step) // step[d]
        step[d] = max(1, min(shape[d], limit // rest))
        if rest <= limit:
            break
    parts = ([slice(i, i + s) for i in range(0, size, s)] for size, s in zip(shape, step, strict=True))
    yield from itertools.product(*parts)
