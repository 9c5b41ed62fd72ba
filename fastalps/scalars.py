"""Numbers as users give them: Python's, or NumPy's, which grids of options are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def is_whole(value: object, smallest: int = 1) -> bool:
    """Whether a value is an integer, of Python or NumPy, of at least `smallest`; no bool is."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and int(value) >= smallest  # type: ignore[call-overload]


def plain(value: Any) -> Any:
    """A scalar of NumPy, or a tensor of one number, as Python's, which JSON and torch's ops take;
    so scalars of NumPy within a tuple or list. Anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        return value.item()
    if isinstance(value, (tuple, list)) and any(isinstance(part, np.generic) for part in value):
        return type(value)(map(plain, value))
    return value
