"""Detectors that remember what is normal, as networks that a training of one epoch fills."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.extras import late_import


class PatchCore(nn.Module):
    """Anomalib's PatchCore, with any network of features as its backbone.

    What is made is anomalib's own class, ``PatchcoreModel``, which takes networks as well as names, and says so of
    names alone: in a configuration this class can be given a network. :class:`MemoryBank` fills it.

    Args:
        backbone: Name of a network of timm, or a network: ``SqueezeNetFeatures``.
        layers: Of the backbone: ``["layer2", "layer3"]``, or ``["features.4", "features.7"]``.
        pretrained: Whether timm downloads ImageNet's weights of a network that is named.
        neighbors: By how many of the nearest vectors the score of an image is weighed.

    Raises:
        ModuleNotFoundError: Without anomalib.

    Example:
        >>> from lightning_kd.models import SqueezeNetFeatures
        >>> network = PatchCore(SqueezeNetFeatures(), layers=["features.4"])
        >>> network.train()(torch.zeros(2, 3, 32, 32)).shape  # 7 x 7 patches of each image
        torch.Size([98, 128])

    Source: Roth et al., Towards Total Recall in Industrial Anomaly Detection, arXiv 2106.08265.
    """

    def __new__(  # type: ignore[misc]  # noqa: D102 - what is made is anomalib's
        cls,
        backbone: str | nn.Module = "wide_resnet50_2",
        layers: tuple[str, ...] = ("layer2", "layer3"),
        pretrained: bool = True,
        neighbors: int = 9,
    ) -> nn.Module:
        where = "anomalib.models.image.patchcore.torch_model"
        model = late_import(where, "anomalib", "anomaly").PatchcoreModel
        made: nn.Module = model(list(layers), backbone, pre_trained=pretrained, num_neighbors=neighbors)
        return made


class MemoryBank(nn.Module):
    """A detector of anomalib that remembers what is normal: PatchCore, PaDiM.

    Such a detector is not trained: it keeps features of normal images, or their mean and covariance. In training mode
    what it is called with is collected; when it is first asked afterwards, or saved, it remembers that. So one epoch
    fills it (``teacher_fit`` in a configuration, with the task ``AnomalyDetection(normal_only=True)``), in one process,
    and its weights are a checkpoint like any other, of fixed shapes.

    Args:
        network: ``PatchcoreModel`` or ``PadimModel`` of ``anomalib.models.image.<name>.torch_model``, which takes the
            names of timm's networks or any network with layers as ``backbone``; :class:`PatchCore` makes the former.
        image_size: Height and width of the images.
        vectors: Of PatchCore: how many vectors it keeps.

    Raises:
        TypeError: If the network is another one.
        ValueError: If there are fewer normal images than it takes for so many vectors, or none.

    Example:
        >>> from anomalib.models.image.patchcore.torch_model import PatchcoreModel
        >>> network = PatchcoreModel(layers=["layer2"], backbone="resnet18", pre_trained=False)
        >>> bank = MemoryBank(network, image_size=(32, 32), vectors=8)
        >>> bank.train()(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 1, 32, 32])
        >>> bank.eval()(torch.randn(2, 3, 32, 32)).anomaly_map.shape
        torch.Size([2, 1, 32, 32])

    Source:
        Roth et al., Towards Total Recall in Industrial Anomaly Detection, arXiv 2106.08265; Defard et al., PaDiM,
        arXiv 2011.08785.
    """

    def __init__(self, network: nn.Module, image_size: tuple[int, int], vectors: int = 1000) -> None:
        super().__init__()
        self._picks = hasattr(network, "subsample_embedding")
        if not self._picks and not (hasattr(network, "gaussian") and hasattr(network, "fit")):
            raise TypeError(f"MemoryBank fills anomalib's PatchcoreModel and PadimModel; got {type(network).__name__}.")
        self.network = network.requires_grad_(False)
        self.vectors = vectors
        self.idle = nn.Parameter(torch.zeros(()))
        """Without a parameter there is nothing to train; it stays 0."""
        self._collected = False
        noise = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = self.network.train()(noise)
        if self._picks:
            self._store().clear()
            network.memory_bank = found.new_zeros(vectors, found.shape[1])
        else:
            network.fit()  # type: ignore[operator]  # for the shapes
        self.network.train()
        self.register_state_dict_pre_hook(_remember)  # type: ignore[no-untyped-call]  # torch's own gap

    def _store(self) -> list[Tensor]:
        held: Any = self.network.embedding_store if self._picks else self.network.memory_bank
        return held  # type: ignore[no-any-return]  # a list in both

    def forward(self, images: Tensor) -> Any:
        """Returns anomalib's ``anomaly_map`` and ``pred_score``; in training zeros, of which nothing learns."""
        if self.training:
            with torch.no_grad():
                self.network(images)
            self._collected = True
            return self.idle.expand(len(images), 1, *images.shape[-2:])
        _remember(self)
        return self.network.eval()(images)


def _remember(bank: MemoryBank, *_: Any) -> None:
    """Makes of what was collected what is kept."""
    if not bank._collected:
        return
    bank._collected = False
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "MemoryBank remembers in one process, and this run has several, each of which saw a part of the images. "
            "Set --trainer.devices 1 for its training; the student may learn from its checkpoint in several."
        )
    network: Any = bank.network
    if not bank._picks:
        network.fit()
        return
    seen = sum(map(len, network.embedding_store))
    if seen < bank.vectors:
        raise ValueError(
            f"MemoryBank keeps {bank.vectors} vectors, and the normal images gave {seen}: lower vectors, or give more "
            "images."
        )
    network.subsample_embedding(sampling_ratio=(bank.vectors + 0.5) / seen)
