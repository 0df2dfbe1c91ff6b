"""Packages of an extra are imported late, by the function that needs them."""

from __future__ import annotations

import importlib
from typing import Any


def late_import(module: str, package: str, extra: str) -> Any:
    """The module; where its package is missing, an error that names the extra.

    Args:
        module: Dotted name of the module.
        package: What it is called on PyPI.
        extra: The extra of lightning-kd that installs it.

    Raises:
        ModuleNotFoundError: Without the package.

    Example:
        >>> late_import("math", "math", "segmentation").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{package} is not installed: pip install "lightning-kd[{extra}]"', name=error.name
        ) from error
