"""Models of timm by name, for configurations."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from lightning_kd.extras import late_import


class Timm(nn.Module):
    """Makes a model of timm by its name, for configurations, where a class is named and not a function.

    What is made is timm's own model, not this class: its weights have timm's names, and a task finds its stages.

    Args:
        name: One of ``timm.list_models()``, such as ``"resnet10t"``.
        num_classes: Number of classes.
        pretrained: Whether to download weights.
        options: What else the model takes, such as ``{"in_chans": 1}``.

    Raises:
        ModuleNotFoundError: Without timm.
        ValueError: If there is no such model.

    Example:
        >>> type(Timm("resnet10t", num_classes=10, options={"in_chans": 1})).__name__
        'ResNet'
    """

    def __init__(
        self, name: str, num_classes: int, pretrained: bool = False, options: dict[str, Any] | None = None
    ) -> None:
        assert not isinstance(self, Timm), "__new__ makes another class, so that this is for its signature"

    def __new__(
        cls, name: str, num_classes: int, pretrained: bool = False, options: dict[str, Any] | None = None
    ) -> Any:
        """Makes the model."""
        library = late_import("timm", "timm", "classification")
        if ":" not in name and not library.is_model(name):  # timm looks "hf-hub:..." up by itself
            close = difflib.get_close_matches(name, library.list_models(), n=4, cutoff=0.4)
            raise ValueError(f"timm has no model {name!r}. Closest: {', '.join(close)}.")
        model: nn.Module = library.create_model(name, pretrained=pretrained, num_classes=num_classes, **(options or {}))
        return model
