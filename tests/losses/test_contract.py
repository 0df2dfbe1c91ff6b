"""One contract for everything in ``losses.__all__``; a new loss needs one line in ``CASES``."""

import copy
import dataclasses
import inspect
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_kd import functional, losses, schedules
from lightning_kd.losses._wrapped import Wrapped


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    function: Callable[..., Tensor]
    student: tuple[int, ...] = (8, 10)
    teacher: tuple[int, ...] = (8, 10)
    # why a property does not hold, by its name; where absent, it is tested
    not_true: dict[str, str] = field(default_factory=dict)
    dense: bool = False
    """Whether there is a label for each pixel of the student."""


MAP = (8, 6, 4, 4)
BINS = (8, 8, 4, 4)
PIXELS = (8, 10, 4, 4)
CROSS_ENTROPY = "a cross entropy: its value at equality is an entropy"
LABEL = "its target part is smallest where the student is certain of the label"
RELATIONS = "defined over the pairs of a batch with a factor 1/B"
HEATED = "the teacher has a temperature of its own"
COPIES = "a copy of a sample is a negative that cannot be told apart"
LEARNS = "has parameters of its own"


def _vid(module: nn.Module, s: Tensor, t: Tensor) -> Tensor:
    return functional.vid(module.regressor(s.movedim(1, -1)).movedim(-1, 1), t, module.rho)


def _crd(module: nn.Module, s: Tensor, t: Tensor, target: Tensor) -> Tensor:
    s, t = (nn.functional.normalize(head(x)) for head, x in ((module.student_head, s), (module.teacher_head, t)))
    return functional.crd(s, t, target=target)


def _fgd(module: nn.Module, s: Tensor, t: Tensor, boxes: list[Tensor]) -> Tensor:
    # as it is built: both relations are the identity
    return functional.fgd(s, t, boxes) + module.relation * (s - t).square().sum() / len(s)


def _standardized(m: nn.Module, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return functional.dkd(functional.standardize(s), functional.standardize(t), y)


def _ctkd(m: nn.Module, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return functional.dkd(s, t, y, temperature=1.0 + 20.0 / (1.0 + math.exp(-1.0)))


def _dts(m: nn.Module, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    gap = (nn.functional.cross_entropy(s, y) - nn.functional.cross_entropy(t, y)).item()
    return functional.dkd(s, t, y, temperature=1.0 + 7.0 * (1.0 - 1.0 / (1.0 + max(gap, 0.0))))


def _sample_temperature(m: nn.Module, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    certain = (t.softmax(1).amax(1) - 0.1) / 0.9
    each = [
        functional.dkd(s[i : i + 1], t[i : i + 1], y[i : i + 1], temperature=4.0 * 2.0 ** (2.0 * c - 1.0))
        for i, c in enumerate(certain.tolist())
    ]
    return torch.stack(each).mean()


def _bpkd(module: nn.Module, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return functional.bpkd(s, t, y, width=1)


def _ifvd(module: nn.Module, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return functional.ifvd(s, t, y, 10)


def _jointwise(module: nn.Module, s: Tensor, t: Tensor, joints: Tensor) -> Tensor:
    return functional.kd(s[joints], t[joints])


def _in_batch(module: nn.Module, s: Tensor, t: Tensor) -> Tensor:
    others = ~torch.eye(len(s), dtype=torch.bool)
    like = [20.0 * torch.cosine_similarity(x[:, None], x[None], dim=-1)[others].view(len(x), -1) for x in (s, t)]
    return functional.kd(*like)


def _mgd(module: nn.Module, s: Tensor, t: Tensor) -> Tensor:
    return functional.mgd(module.generation(s), t)


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda module, *args: function(*args)


CASES = {
    "ALoss": Case(
        losses.ALoss,
        _plain(functional.aloss),
        (8, 10, 2),
        (8, 10, 2),
        {"minimum": "at equality it has an edge, and a student that is better is below 0"},
    ),
    "AT": Case(losses.AT, _plain(functional.at), (8, 3, 4, 4), MAP),
    "BDKD": Case(losses.BDKD, _plain(functional.bdkd)),
    "BPKD": Case(lambda: losses.BPKD(width=1), _bpkd, PIXELS, PIXELS, dense=True),
    "BSD": Case(losses.BSD, _plain(functional.bsd), PIXELS, PIXELS, dense=True),
    "CIRKD": Case(losses.CIRKD, _plain(functional.cirkd), (8, 3, 4, 4), MAP),
    "CRD": Case(
        lambda: losses.CRD(dim=16),
        _crd,
        (8, 12),
        (8, 20),
        {"zero": LEARNS, "duplicates": COPIES},
    ),
    "CTKD": Case(lambda: losses.CTKD(losses.DKD(), reversal=schedules.Constant(1.0)), _ctkd),
    "CWD": Case(losses.CWD, _plain(functional.cwd), MAP, MAP),
    "DIST": Case(losses.DIST, _plain(functional.dist)),
    "DKD": Case(losses.DKD, _plain(functional.dkd)),
    "DTS": Case(lambda: losses.DTS(losses.DKD()), _dts),
    "EfficientAD": Case(losses.EfficientAD, _plain(functional.efficient_ad), MAP, MAP),
    "FGD": Case(losses.FGD, _fgd, MAP, MAP, {"learns at once": "the last layers of its GcBlocks start at zero"}),
    "FitNet": Case(losses.FitNet, _plain(functional.fitnet), MAP, MAP),
    "GIoU": Case(lambda: losses.GIoU(bins=2), lambda m, s, t, boxes: functional.giou(s, t, boxes, bins=2), BINS, BINS),
    "IFVD": Case(lambda: losses.IFVD(10), _ifvd, (8, 3, 4, 4), MAP, dense=True),
    "InBatch": Case(lambda: losses.InBatch(losses.KD()), _in_batch, (8, 12), (8, 20), {"duplicates": RELATIONS}),
    "InfoNCE": Case(
        losses.InfoNCE,
        lambda m, s, t, y: functional.info_nce(s, t, target=y),
        not_true={"zero": CROSS_ENTROPY, "minimum": "the other candidates push", "duplicates": COPIES},
    ),
    "Jointwise": Case(lambda: losses.Jointwise(losses.KD()), _jointwise, (8, 10, 12), (8, 10, 12)),
    "KD": Case(losses.KD, _plain(functional.kd)),
    # without holes: what it draws is in its own test
    "LD": Case(lambda: losses.LD(bins=2), lambda m, s, t, boxes: functional.ld(s, t, boxes, bins=2), BINS, BINS),
    "LEAF": Case(losses.LEAF, _plain(functional.leaf)),
    "MarginMSE": Case(losses.MarginMSE, _plain(functional.margin_mse)),
    "Matryoshka": Case(lambda: losses.Matryoshka(losses.DKD(), [10]), _plain(functional.dkd)),
    "MGD": Case(lambda: losses.MGD(ratio=0.0), _mgd, MAP, MAP, {"zero": LEARNS}),
    "NKD": Case(losses.NKD, _plain(functional.nkd), not_true={"zero": CROSS_ENTROPY, "minimum": LABEL}),
    "OFA": Case(losses.OFA, _plain(functional.ofa), not_true={"zero": CROSS_ENTROPY}),
    "Pixelwise": Case(lambda: losses.Pixelwise(losses.DKD()), _plain(functional.dkd), PIXELS, PIXELS, dense=True),
    "PKD": Case(losses.PKD, _plain(functional.pkd), MAP, MAP, {"duplicates": "deviations over n - 1"}),
    "PKT": Case(losses.PKT, _plain(functional.pkt), (8, 12), (8, 20), {"duplicates": RELATIONS}),
    "PLD": Case(losses.PLD, _plain(functional.pld), not_true={"zero": CROSS_ENTROPY, "minimum": LABEL}),
    "QFL": Case(losses.QFL, _plain(functional.qfl)),
    "RD4AD": Case(losses.RD4AD, _plain(functional.rd4ad), MAP, MAP),
    "RegionBSD": Case(
        lambda: losses.RegionBSD(10), lambda m, s, t, y: functional.region_bsd(s, t, y, 10), PIXELS, PIXELS, dense=True
    ),
    "RKD": Case(losses.RKD, _plain(functional.rkd), (8, 12), (8, 20)),
    "SampleTemperature": Case(lambda: losses.SampleTemperature(losses.DKD()), _sample_temperature),
    "SEED": Case(
        lambda: losses.SEED(queue=32).eval(),  # in training what it remembers changes with each call
        lambda module, s, t: functional.seed(s, t, module.bank),
        not_true={"zero": HEATED, "minimum": HEATED},
    ),
    "SKD": Case(losses.SKD, _plain(functional.skd), (8, 3, 4, 4), MAP),
    "SP": Case(losses.SP, _plain(functional.sp), (8, 12), (8, 20), {"duplicates": RELATIONS}),
    "Standardized": Case(lambda: losses.Standardized(losses.DKD()), _standardized),
    "STFPM": Case(losses.STFPM, _plain(functional.stfpm), MAP, MAP),
    "VID": Case(losses.VID, _vid, (8, 3, 4, 4), MAP, {"zero": LEARNS}),
}


def those(holds: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Parametrises over the losses of which a property is to be tested."""
    names = [name for name, case in CASES.items() if holds(case)]
    assert names
    return pytest.mark.parametrize("name", names)


@pytest.fixture(params=losses.__all__)
def name(request: pytest.FixtureRequest) -> str:
    assert request.param in CASES, f"losses.{request.param} needs a Case in {__file__}: how to make and call it."
    return request.param


def _inputs(case: Case, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    if case.dense:  # two areas side by side
        batch, _, height, width = case.student
        target = torch.randint(10, (batch, 1, 2)).repeat(1, height, 1).repeat_interleave(width // 2, 2)
    else:
        target = torch.randint(case.student[1], case.student[:1])
    return (
        (scale * torch.randn(case.student)).to(dtype),
        (scale * torch.randn(case.teacher)).to(dtype),
        target,
    )


def _built(case: Case, student: Tensor, teacher: Tensor) -> nn.Module:
    torch.manual_seed(1)
    loss = case.make()
    if hasattr(loss, "build"):
        loss.build(student.float(), teacher.float())
    return loss


def _labels(loss: nn.Module, target: Tensor) -> dict[str, object]:
    """Return what a loss asks for by name."""
    known = {
        "target": target,
        "boxes": [torch.tensor([[0.1, 0.2, 0.6, 0.9]], device=target.device)] * len(target),
        "points": target.view(-1, 1, 1).expand(-1, 10, 2) / 10 if target.ndim == 1 else None,
        "joints": target.unsqueeze(-1).flatten(1)[:, :1] != torch.arange(10, device=target.device),
    }
    return {name: value for name, value in known.items() if name in inspect.signature(loss.forward).parameters}


def _call(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return loss(student, teacher, **_labels(loss, target))


def test_there_are_losses():
    assert losses.__all__
    assert functional.__all__
    assert not set(CASES) - set(losses.__all__)


def test_scalar_in_float32(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _call(_built(CASES[name], s, t), s, t, y)
    assert loss.shape == ()
    assert loss.dtype == torch.float32


@those(lambda case: "zero" not in case.not_true)
def test_zero_at_equality(name: str):
    case = CASES[name]
    _, t, y = _inputs(case)
    torch.testing.assert_close(_call(_built(case, t, t), t.clone(), t, y), torch.tensor(0.0), atol=1e-5, rtol=0)


@those(lambda case: "minimum" not in case.not_true and case.not_true.get("zero") != LEARNS)
def test_stationary_at_equality(name: str):
    case = CASES[name]
    _, t, y = _inputs(case)
    s = t.clone().requires_grad_()
    _call(_built(case, t, t), s, t, y).backward()
    assert s.grad is not None
    assert s.grad.abs().max() < 1e-5


def test_gradient_reaches_the_student_only(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    if "learns at once" in CASES[name].not_true:
        for parameter in loss.parameters():
            nn.init.normal_(parameter)
    s.requires_grad_()
    t.requires_grad_()
    _call(loss, s, t, y).backward()
    assert s.grad is not None
    assert s.grad.abs().max() > 0
    assert t.grad is None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loss.parameters())


def test_following_the_gradient_lowers_the_loss(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    s.requires_grad_()
    before = _call(loss, s, t, y)
    (gradient,) = torch.autograd.grad(before, s)
    after = _call(loss, s.detach() - 1e-2 * gradient / gradient.norm(), t, y)
    assert after < before


@pytest.mark.parametrize(
    ("scale", "dtype", "autocast"),
    [
        (200.0, torch.float32, False),
        (60000.0, torch.float16, False),
        (200.0, torch.float32, True),
        (200.0, torch.bfloat16, True),
    ],
)
def test_finite_at_the_extremes(name: str, scale: float, dtype: torch.dtype, autocast: bool):
    case = CASES[name]
    s, t, y = _inputs(case)
    s, t = (scale * s.sign()).to(dtype), (scale * t.sign()).to(dtype)
    loss = _built(case, s, t)
    s.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = _call(loss, s, t, y)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


def test_autocast_changes_nothing(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = _call(loss, s, t, y)
    torch.testing.assert_close(value, _call(loss, s, t, y))


@those(lambda case: "duplicates" not in case.not_true)
def test_scale_does_not_depend_on_the_batch_size(name: str):
    case = CASES[name]
    s, t, y = _inputs(case)
    loss = _built(case, s, t)
    twice = _call(loss, *(x.repeat(2, *[1] * (x.ndim - 1)) for x in (s, t, y)))
    torch.testing.assert_close(twice, _call(loss, s, t, y))


def test_the_order_of_the_batch_does_not_matter(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    order = torch.randperm(len(s))
    torch.testing.assert_close(_call(loss, s[order], t[order], y[order]), _call(loss, s, t, y))


def test_one_sample_is_defined_or_refused(name: str):
    case = CASES[name]
    s, t, y = (x[:1] for x in _inputs(case))
    loss = _built(case, s, t)
    if name in ("CRD", "DIST", "InBatch", "InfoNCE", "PKT", "RKD", "SP"):
        with pytest.raises(ValueError, match=r"at least \d samples are needed, got 1.*drop_last=True"):
            _call(loss, s, t, y)
    else:
        assert torch.isfinite(_call(loss, s, t, y))


def test_an_empty_batch_is_refused(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    with pytest.raises(ValueError, match=r"student \(0, .* and teacher \(0, .* must not be empty"):
        _call(loss, s[:0], t[:0], y[:0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_holds_no_real_numbers_is_refused(name: str, dtype: torch.dtype):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    for wrong in ((s.to(dtype), t), (s, t.to(dtype))):
        with pytest.raises(ValueError, match=f"expected floating-point tensors, got .*{dtype}.*logits, not classes"):
            _call(loss, *wrong, y)


def test_vectors_without_a_batch_are_refused(name: str):
    if name == "FitNet":  # takes any one shape
        return
    x, y = torch.randn(8), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        _call(_built(CASES[name], x, x), x, x, y)


@pytest.mark.parametrize("of", ["AT", "BPKD", "CIRKD", "CWD", "IFVD", "RegionBSD", "SKD"])
def test_one_position_is_refused(of: str):
    """Where it would teach nothing: a value that is always 0, or a softmax that is always 1."""
    s, t, y = _inputs(CASES[of])
    s, t, y = s[..., :1, :1], t[..., :1, :1], y[..., :1, :1] if y.ndim == 3 else y
    with pytest.raises(ValueError, match=r"fewer than 2 positions|one node has no relations"):
        _call(_built(CASES[of], s, t), s, t, y)


@pytest.mark.parametrize(
    "of", ["CIRKD", "IFVD", "InBatch", "InfoNCE", "PKT", "RD4AD", "RegionBSD", "SEED", "SKD", "STFPM"]
)
def test_the_direction_of_one_channel_is_refused(of: str):
    s, t, y = _inputs(CASES[of])
    s, t = s[:, :1], t[:, :1]
    with pytest.raises(ValueError, match=r"\(8, 1.*that of one channel is its sign"):
        _call(_built(CASES[of], s, t), s, t, y)


def test_float64_stays_float64(name: str):
    s, t, y = _inputs(CASES[name], dtype=torch.float64)
    assert _call(_built(CASES[name], s, t).double(), s, t, y).dtype == torch.float64


def test_identical_samples_have_finite_gradients(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    s = s[:1].repeat(8, *[1] * (s.ndim - 1)).requires_grad_()
    zeros = torch.zeros_like(s, requires_grad=True)
    for student in (s, zeros):
        _call(loss, student, t, y).backward()
        assert student.grad is not None
        assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_a_number_stays_so(name: str, side: int):
    case = CASES[name]
    student, teacher, target = _inputs(case)
    loss = _built(case, student, teacher)
    broken = [student.detach(), teacher.detach()]
    broken[side] = torch.full_like(broken[side], torch.nan)
    assert not _call(loss, *broken, target).isfinite()


@those(lambda case: "target" in inspect.signature(case.make().forward).parameters)
@pytest.mark.parametrize("value", [-100, 10])
def test_labels_out_of_range_are_refused(name: str, value: int):
    if name in ("BPKD", "CRD", "InfoNCE", "Standardized"):
        return
    case = CASES[name]
    student, teacher, target = _inputs(case)
    with pytest.raises(ValueError, match=r"must be in \[0, 10\), got values from.*(target= says|num_classes counts)"):
        _call(_built(case, student, teacher), student, teacher, torch.full_like(target, value))


def test_inputs_are_left_alone(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    before = [x.clone() for x in (s, t, y)]
    _call(loss, s, t, y)
    assert all(torch.equal(a, b) for a, b in zip(before, (s, t, y), strict=True))


def test_module_and_function_agree(name: str):
    case = CASES[name]
    s, t, y = _inputs(case)
    loss = _built(case, s, t)
    value = case.function(loss, s, t, *_labels(loss, y).values())
    torch.testing.assert_close(_call(loss, s, t, y), value)


@those(lambda case: hasattr(functional, type(case.make()).__name__.lower()))
def test_defaults_live_in_one_place(name: str):
    """The function and the module have the same parameters with the same defaults, where both have them."""
    function = getattr(functional, name.lower(), None)
    ours = inspect.signature(getattr(losses, name)).parameters
    theirs = inspect.signature(function).parameters
    assert all(ours[key].default == theirs[key].default for key in ours.keys() & theirs.keys())


def test_state_dict_round_trip(name: str):
    case = CASES[name]
    s, t, y = _inputs(case)
    loss, other = _built(case, s, t), case.make()
    if hasattr(other, "build"):
        other.build(s, t)
    other.load_state_dict(loss.state_dict(), strict=True)
    torch.testing.assert_close(_call(other, s, t, y), _call(loss, s, t, y), rtol=0, atol=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(name: str, clone: Callable[[nn.Module], nn.Module]):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    torch.testing.assert_close(_call(clone(loss), s, t, y), _call(loss, s, t, y), rtol=0, atol=0)


def test_compiles_in_one_graph(name: str):
    """A branch on a tensor's value or an ``.item()``, which would wait for the device, breaks the graph."""
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    torch.compiler.reset()
    args, labels = (s.requires_grad_(), t), _labels(loss, y)
    torch.testing.assert_close(
        torch.compile(loss, backend="eager", fullgraph=True)(*args, **labels), loss(*args, **labels)
    )


@pytest.mark.gpu
def test_no_synchronisation_and_finite_under_float16_autocast(name: str):
    s, t, y = (x.cuda() for x in _inputs(CASES[name], scale=200.0))
    loss = _built(CASES[name], s, t)
    s.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.float16):
            value = _call(loss, s, t, y)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(value)
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


@those(lambda case: hasattr(case.make(), "build"))
def test_unbuilt_losses_say_so(name: str):
    loss = CASES[name].make()
    with pytest.raises(RuntimeError, match="build"):
        _call(loss, *_inputs(CASES[name]))


@those(lambda case: hasattr(case.make(), "temperature"))
def test_temperature_is_a_plain_number_that_is_checked_and_read(name: str):
    loss = CASES[name].make()
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    before = _call(loss, s, t, y)
    assert isinstance(loss.temperature, float)
    loss.temperature = 2 * loss.temperature
    assert _call(loss, s, t, y) != before
    if "temperature" in inspect.signature(type(loss)).parameters:
        for wrong in (0.0, -1.0, float("inf"), float("nan"), "4", True, None, torch.tensor(4.0)):
            with pytest.raises(ValueError, match="temperature"):
                type(loss)(temperature=wrong)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (losses.BPKD, "width"),
        (losses.CIRKD, "patch"),
        (losses.IFVD, "num_classes"),
        (losses.LD, "bins"),
        (losses.SEED, "queue"),
        (losses.SKD, "patch"),
    ],
)
def test_counts_are_whole(make: Callable[..., nn.Module], name: str):
    for wrong in (0.5, 2.5, 0, -1, "2", True):
        with pytest.raises(ValueError, match=f"{name} must be a positive whole number"):
            make(**{name: wrong})


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (losses.BPKD, ("edge", "body")),
        (losses.DIST, ("beta", "gamma")),
        (losses.DKD, ("alpha", "beta")),
        (losses.RKD, ("distance", "angle")),
    ],
)
def test_weights_of_parts_are_checked(make: Callable[..., nn.Module], names: tuple[str, str]):
    for name in names:
        for wrong in (-1.0, float("nan"), float("inf"), "1", True):
            with pytest.raises(ValueError, match=f"finite numbers that are not negative, got .*{name}="):
                make(**{name: wrong})
        make(**{name: 0})
    with pytest.raises(ValueError, match=f"{names[0]} and {names[1]} are both 0"):
        make(**dict.fromkeys(names, 0.0))


@those(lambda case: "target" in inspect.signature(case.make().forward).parameters and not case.dense)
def test_labels_must_be_class_indices(name: str):
    s, t, y = _inputs(CASES[name])
    loss = _built(CASES[name], s, t)
    remedy = r"target=lambda batch: None" if name in ("CRD", "InfoNCE") else r"KD\(activation='sigmoid'\)"
    several = nn.functional.one_hot(y, s.shape[1]) + nn.functional.one_hot(y.flip(0), s.shape[1])
    with pytest.raises(ValueError, match=f"integer class indices.*{remedy}"):
        loss(s, t, several.float())
    for wrong in ({"labels": y}, ["a"] * len(s)):
        with pytest.raises(ValueError, match=r"target must be a tensor of class indices, got a (dict|list)"):
            loss(s, t, wrong)
    for wrong in (several, several > 0, y[:, None]):
        with pytest.raises(ValueError, match=rf"must have shape \(8,\).*{remedy}"):
            loss(s, t, wrong)


# --- masks


AROUND_KD = {
    "CTKD": lambda: losses.CTKD(losses.KD()),
    "DTS": lambda: losses.DTS(losses.KD()),
    "SampleTemperature": lambda: losses.SampleTemperature(losses.KD()),
    "Standardized": lambda: losses.Standardized(losses.KD()),
}
"""Wrappers know the mask if what they wrap does; around another loss they refuse it."""

MASKED = [name for name, case in CASES.items() if "mask" in inspect.signature(case.make().forward).parameters]


def _masked(
    name: str, device: str = "cpu"
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Tensor, Tensor, Tensor]:
    """Return the loss of two maps under a mask, the two maps, and a mask of twice their resolution."""
    case = CASES[name]
    if len(case.student) == 2:  # logits, here of pixels
        case = dataclasses.replace(case, student=PIXELS, teacher=PIXELS, dense=True)
        case = dataclasses.replace(case, make=AROUND_KD.get(name, case.make))
    s, t, y = (x.to(device) for x in _inputs(case))
    loss = _built(case, s, t).to(device)
    labels = _labels(loss, y)

    def call(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if not torch.compiler.is_compiling():
            torch.manual_seed(3)  # of what the loss draws
        return loss(student, teacher, mask=mask, **labels)

    mask = torch.rand(len(s), *s.shape[2:]) < 0.6
    mask[0] = False
    mask[1] = True
    return call, s, t, mask.repeat_interleave(2, 1).repeat_interleave(2, 2).to(device)


@pytest.mark.parametrize("name", MASKED)
def test_masked_pixels_have_no_influence(name: str):
    loss, s, t, mask = _masked(name)
    outside = ~mask[:, None, ::2, ::2]
    s.requires_grad_()
    value = loss(s, t, mask)
    (gradient,) = torch.autograd.grad(value, s)
    assert value > 0
    assert not gradient[outside.expand_as(s)].any()
    assert gradient[1:].flatten(1).any(1).all()
    for junk in (7.0, torch.nan):
        student, teacher = (torch.where(outside, junk, x.detach()) for x in (s, t))
        student.requires_grad_()
        again = loss(student, teacher, mask)
        torch.testing.assert_close(again, value, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(again, student)[0], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_everything_is_no_mask(name: str):
    loss, s, t, mask = _masked(name)
    torch.testing.assert_close(loss(s, t, torch.ones_like(mask)), loss(s, t, None))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("scale", [1.0, 60000.0])
def test_a_mask_of_nothing_is_zero(name: str, scale: float):
    loss, s, t, mask = _masked(name)
    s = (scale * s).requires_grad_()
    value = loss(s, t, torch.zeros_like(mask))
    value.backward()
    assert value.dtype == torch.float32
    assert value == 0
    assert not s.grad.any()


# all pixels that count, however many: their number has to be known
SYNCHRONISES = {"Pixelwise"}


@pytest.mark.parametrize("name", [name for name in MASKED if name not in SYNCHRONISES])
def test_a_mask_compiles_in_one_graph(name: str):
    """What depends on the number of pixels that count would wait for the device."""
    loss, s, t, mask = _masked(name)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(s, t, mask), loss(s, t, mask))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in MASKED if name not in SYNCHRONISES])
def test_no_synchronisation_under_a_mask(name: str):
    loss, s, t, mask = _masked(name, "cuda")
    s.requires_grad_()
    loss(s, t, mask).backward()  # what is made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(s, t, mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("name", AROUND_KD)
def test_wrappers_refuse_masks_that_what_they_wrap_would_ignore(name: str):
    s, t, y = _inputs(dataclasses.replace(CASES[name], student=PIXELS, teacher=PIXELS, dense=True))
    inside = f"{name}(Pixelwise(DKD()))" if name == "CTKD" else f"Pixelwise({name}(DKD()))"
    with pytest.raises(ValueError, match=f"DKD takes no mask.*use {re.escape(inside)}"):
        CASES[name].make()(s, t, y, y > 0)


@those(lambda case: isinstance(case.make(), Wrapped))
@pytest.mark.parametrize("loss", [losses.KD, "KD"])
def test_wrappers_want_a_loss(name: str, loss: Any):
    arguments = {"dims": [2]} if name == "Matryoshka" else {}
    with pytest.raises(
        TypeError, match=r"Did you mean KD\(\)\?" if loss is losses.KD else "loss is a module.*got 'KD'"
    ):
        getattr(losses, name)(loss, **arguments)


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_checked(name: str):
    loss, s, t, mask = _masked(name)
    for wrong in (mask.float(), mask[0], mask[:4], mask[:, None]):
        with pytest.raises(ValueError, match=r"a mask is a bool tensor \(B, H, W\).*target != 255"):
            loss(s, t, wrong)


def test_alignment_is_declared(name: str):
    assert getattr(CASES[name].make(), "align", "none") in ("none", "map", "size", "shape")


def test_documentation(name: str):
    text = inspect.getdoc(getattr(losses, name))
    assert text
    first = text.splitlines()[0]
    assert first.endswith(".")
    assert len(first) < 110
    assert "Example:" in text
    assert "Source:" in text
    assert re.search(r"arXiv\s+\d{4}\.\d{4,5}", text)
