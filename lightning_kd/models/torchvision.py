"""Models of torchvision by name, for configurations."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from lightning_kd.extras import late_import


class Torchvision(nn.Module):
    """Makes a model of torchvision by its name, for configurations, where a class is named and not a function.

    What is made is torchvision's own model, not this class: its weights have torchvision's names.

    Args:
        name: One of ``torchvision.models.list_models()``, such as ``"lraspp_mobilenet_v3_large"``.
        num_classes: Number of classes.
        weights: Name of pretrained weights, such as ``"DEFAULT"``; they are downloaded, and fix ``num_classes``.
        weights_backbone: Likewise for the backbone of a segmentation or detection model.
        options: What else the model takes, such as ``{"aux_loss": True}``.

    Raises:
        ModuleNotFoundError: Without torchvision.
        ValueError: If there is no such model.

    Example:
        >>> type(Torchvision("lraspp_mobilenet_v3_large", num_classes=11)).__name__
        'LRASPP'
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        weights: str | None = None,
        weights_backbone: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        assert not isinstance(self, Torchvision), "__new__ makes another class, so that this is for its signature"

    def __new__(
        cls,
        name: str,
        num_classes: int,
        weights: str | None = None,
        weights_backbone: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        """Makes the model."""
        library = late_import("torchvision.models", "torchvision", "segmentation")
        try:
            builder = library.get_model_builder(name)
        except ValueError as error:
            close = difflib.get_close_matches(name, library.list_models(), n=4, cutoff=0.4)
            raise ValueError(f"torchvision has no model {name!r}. Closest: {', '.join(close)}.") from error
        given = dict(options or {}) | {"weights": weights, "num_classes": num_classes}
        if "weights_backbone" in inspect.signature(builder).parameters:
            given["weights_backbone"] = weights_backbone
        model: nn.Module = builder(**given)
        return model
