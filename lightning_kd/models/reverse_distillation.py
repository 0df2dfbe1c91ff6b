"""Networks of reverse distillation: a frozen encoder, and what restores its features out of a bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.extras import late_import
from lightning_kd.wiring import describe

LEVELS = 4
"""How many the residual network restores."""


class ReverseDistillation(nn.Module):
    """Anomalib's reverse distillation: a frozen encoder, a bottleneck, and a decoder that restores what it saw.

    The encoder teaches, the rest is the student, and both are one network: ``teachers.Itself``, with terms from
    ``decoder[:]`` to ``encoder[:]``. What is made is anomalib's own class; its encoder learns nothing.

    Args:
        backbone: A ResNet that anomalib has a decoder for: ``resnet18``, ``resnet34``, ``resnet50``,
            ``wide_resnet50_2``.
        image_size: Height and width of the images.
        layers: Of the encoder, from the first on.
        pretrained: Whether timm downloads ImageNet's weights for the encoder. Without any it knows nothing.

    Raises:
        ModuleNotFoundError: Without anomalib.

    Example:
        >>> network = ReverseDistillation("resnet18", image_size=(64, 64), pretrained=False).eval()
        >>> network(torch.zeros(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])

    Source: Deng and Li, Anomaly Detection via Reverse Distillation from One-Class Embedding, arXiv 2201.10703.
    """

    def __new__(  # type: ignore[misc]  # noqa: D102 - what is made is anomalib's
        cls,
        backbone: str = "wide_resnet50_2",
        image_size: tuple[int, int] = (256, 256),
        layers: tuple[str, ...] = ("layer1", "layer2", "layer3"),
        pretrained: bool = True,
    ) -> nn.Module:
        where = "anomalib.models.image.reverse_distillation"
        model = late_import(f"{where}.torch_model", "anomalib", "anomaly").ReverseDistillationModel
        mode = late_import(f"{where}.anomaly_map", "anomalib", "anomaly").AnomalyMapGenerationMode.ADD
        made: nn.Module = model(backbone, image_size, list(layers), mode, pre_trained=pretrained)
        made.encoder.requires_grad_(False)
        return made


class ResidualReverseDistillation(nn.Module):
    """Reverse distillation for fabrics: its decoder also sees the encoder's levels, through attention.

    As in :class:`ReverseDistillation` the encoder teaches and stands still: ``teachers.Itself``, with terms from
    ``decoder[:]`` to ``encoder[:]``. Its four levels ``e0 ... e3`` are brought to the size of the last and added, and
    pass a bottleneck of half that size, in which each position is predicted from four diagonal neighbours. The decoder
    restores them from the last on; to what it makes of the last three is added what attention leaves of ``e2``,
    ``e1`` and ``e0``, each one level before. Attention is a softmax over the width of the map, as in the authors' code.

    Args:
        encoder: Name of a network of timm, whose first four levels are taken, the first max-pooled; or a network that
            returns a list of four maps, the first two of one size and each other half as large as the one before.
        pretrained: Whether timm downloads ImageNet's weights for the encoder. Without any it knows nothing.
        residual: Whether the decoder sees the encoder's levels; without, what it restores has passed the bottleneck.

    Returns:
        ``forward(images)`` returns the restored levels, in the encoder's order.

    Raises:
        ModuleNotFoundError: Without timm, if the encoder is named.
        ValueError: If the encoder does not return four maps.

    Example:
        >>> network = ResidualReverseDistillation("resnet10t", pretrained=False)
        >>> [tuple(level.shape) for level in network(torch.zeros(2, 3, 64, 64))]
        [(2, 64, 16, 16), (2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)]

    Source: Thomine and Snoussi, Distillation-based fabric anomaly detection, arXiv 2401.02287: its abstract and the
    authors' code. The bottleneck's prediction: Ristea et al., SSPCAB, arXiv 2111.09099, with kernels of 1.
    """

    def __init__(self, encoder: str | nn.Module = "resnet34", pretrained: bool = True, residual: bool = True) -> None:
        super().__init__()
        made = _Pooled(encoder, pretrained) if isinstance(encoder, str) else encoder
        self.encoder = made.requires_grad_(False)
        channels = self._channels()
        self.bottleneck = _Bottleneck(channels)
        self.decoder = _Decoder(channels, residual)
        for module in (*self.bottleneck.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the levels of images ``(B, 3, H, W)``, restored."""
        self.encoder.eval()  # here, as Lightning warns of what is in eval mode when a training begins
        with torch.no_grad():
            levels = self.encoder(images)
        levels = list(levels.values()) if isinstance(levels, dict) else list(levels)
        restored: list[Tensor] = self.decoder(self.bottleneck(levels), levels)
        return restored

    def _channels(self) -> list[int]:
        modes = {module: module.training for module in self.encoder.modules()}
        with torch.no_grad():
            found = self.encoder.eval()(torch.zeros(1, 3, 64, 64))
        for module, mode in modes.items():
            module.training = mode
        levels = list(found.values()) if isinstance(found, dict) else found
        fit = isinstance(levels, (list, tuple)) and len(levels) == LEVELS
        if not fit or not all(isinstance(each, Tensor) and each.ndim == 4 for each in levels):
            raise ValueError(
                f"the encoder returns a list of {LEVELS} maps (B, C, H, W); got {describe(found)}. Of a network of "
                "timm: timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3)), or its name alone."
            )
        return [each.shape[1] for each in levels]


class _Pooled(nn.Module):
    """The first four levels of a network of timm, the first of the second's size."""

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        create = late_import("timm", "timm", "anomaly").create_model
        self.network = create(name, pretrained=pretrained, features_only=True, out_indices=(0, 1, 2, 3))

    def forward(self, images: Tensor) -> list[Tensor]:
        first, *others = self.network(images)
        return [F.max_pool2d(first, 3, stride=2, padding=1), *others]


class _Bottleneck(nn.Module):
    """Adds levels at the size of the last one, and predicts each position of half that size."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        c0, c1, c2, c3 = channels
        self.entries = nn.ModuleList(
            [
                nn.Sequential(_conv(c0, c2, 1, stride=2), _conv(c2, c3, 1, stride=2)),
                nn.Sequential(_conv(c1, c2, 1, stride=2), _conv(c2, c3, 1, stride=2)),
                _conv(c2, c3, 1, stride=2),
                _conv(c3, c3, 1),
            ]
        )
        self.body = nn.Sequential(
            _conv(c3, c3, 1), _conv(c3, c3, 1), _conv(c3, 2 * c3, 1, stride=2), _Predicted(2 * c3)
        )
        self.attention = _Attention(2 * c3, 2 * c3, kernel=3, hidden=0)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        size = levels[-1].shape[-2:]
        added = [_fitted(enter(level), size) for enter, level in zip(self.entries, levels, strict=True)]
        bottled: Tensor = self.attention(self.body(torch.stack(added).sum(0)))
        return bottled


class _Decoder(nn.Module):
    """Restores levels from the last to the first."""

    def __init__(self, channels: Sequence[int], residual: bool) -> None:
        super().__init__()
        c0, c1, c2, c3 = channels
        self.stages = nn.ModuleList(
            nn.Sequential(_Block(given, made, rises), _Block(made, made))
            for given, made, rises in ((2 * c3, c3, True), (c3, c2, True), (c2, c1, True), (c1, c0, False))
        )
        pairs = zip((c2, c1, c0), (c3, c2, c1), strict=True) if residual else ()
        self.residuals = nn.ModuleList(_Residual(given, made) for given, made in pairs)

    def forward(self, bottled: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
        x, restored = bottled, []
        for i, stage in enumerate(self.stages):
            size = levels[LEVELS - 1 - i].shape[-2:]
            x = _fitted(stage(x), size)
            if i < len(self.residuals):
                x = x + self.residuals[i](levels[LEVELS - 2 - i], size)
            restored.append(x)
        return restored[::-1]


class _Residual(nn.Module):
    """What attention leaves of a level of the encoder, at the size of the next one."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.enter = _conv(given, made, 3)
        self.attention = _Attention(made, made, kernel=1, hidden=1)

    def forward(self, level: Tensor, size: Any) -> Tensor:
        left: Tensor = self.attention(F.adaptive_avg_pool2d(self.enter(level), size))
        return left


class _Block(nn.Module):
    """Two convolutions and what passes by them; the first may double the size."""

    def __init__(self, given: int, made: int, rises: bool = False) -> None:
        super().__init__()
        first: nn.Module = nn.Conv2d(given, made, 3, padding=1, bias=False)
        self.by: nn.Module = nn.Identity()
        if rises:
            first = nn.ConvTranspose2d(given, made, 2, stride=2, bias=False)
            self.by = nn.Sequential(nn.ConvTranspose2d(given, made, 2, stride=2, bias=False), nn.BatchNorm2d(made))
        elif given != made:
            self.by = nn.Sequential(nn.Conv2d(given, made, 1, bias=False), nn.BatchNorm2d(made))
        second = nn.Conv2d(made, made, 3, padding=1, bias=False)
        self.body = nn.Sequential(first, nn.BatchNorm2d(made), nn.ReLU(), second, nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.by(x))


class _Attention(nn.Module):
    """What a softmax over the width leaves of a convolution: ``softmax(g(f(x))) * f(x)``."""

    def __init__(self, given: int, made: int, kernel: int, hidden: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.values = nn.Sequential(nn.Conv2d(given, made, kernel, padding=pad), nn.ReLU())
        within = [part for _ in range(hidden) for part in (nn.Conv2d(made, made, kernel, padding=pad), nn.ReLU())]
        self.scores = nn.Sequential(*within, nn.Conv2d(made, made, kernel, padding=pad))

    def forward(self, x: Tensor) -> Tensor:
        values = self.values(x)
        attended: Tensor = self.scores(values).softmax(-1) * values
        return attended


class _Predicted(nn.Module):
    """Each position out of the four that are two away on its diagonals, its channels weighed (SSPCAB)."""

    def __init__(self, channels: int, reduction: int = 8, away: int = 2) -> None:
        super().__init__()
        self.away = away
        self.mix = nn.Conv2d(4 * channels, channels, 1)
        less = max(channels // reduction, 1)
        self.excite = nn.Sequential(nn.Linear(channels, less), nn.ReLU(), nn.Linear(less, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded, far = F.pad(x, (self.away,) * 4), 2 * self.away
        corners = [padded[..., top : top + height, left : left + width] for left in (0, far) for top in (0, far)]
        made = F.relu(self.mix(torch.cat(corners, 1)))
        weighed: Tensor = made * self.excite(made.mean((-2, -1)))[..., None, None]
        return weighed


def _conv(given: int, made: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(given, made, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(made))


def _fitted(x: Tensor, size: Any) -> Tensor:
    """Returns a map of the level's size, where halving and doubling have rounded it."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
