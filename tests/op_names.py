"""Which ops there are, and what one returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalps.op_definitions import SCHEMAS

FORWARD = [name for name in SCHEMAS if not name.endswith("_backward")]
DIFFERENTIABLE = [name for name in FORWARD if name != "active_patches"]
LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
