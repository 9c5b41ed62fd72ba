"""One-class anomaly detection with adversarially learned perturbations of latent space, fast."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalps.errors import BackendUnavailable, UserError

if TYPE_CHECKING:
    from fastalps import backends, data, metrics, ops, protocols, reference  # noqa: F401
    from fastalps import nn as nn
    from fastalps.backends import use_backend
    from fastalps.calibration import Calibration
    from fastalps.checkpoint import load, save
    from fastalps.drift import DriftMonitor
    from fastalps.gate import MotionGate
    from fastalps.models import ALPS
    from fastalps.pretrained import load_pretrained
    from fastalps.quantization import Quantization, quantize
    from fastalps.scoring import Scorer
    from fastalps.training import TrainConfig, Trainer

__version__ = "0.1.0"

__all__ = [
    "ALPS",
    "BackendUnavailable",
    "Calibration",
    "DriftMonitor",
    "MotionGate",
    "Quantization",
    "Scorer",
    "TrainConfig",
    "Trainer",
    "UserError",
    "load",
    "load_pretrained",
    "quantize",
    "save",
    "use_backend",
]

# In a checkout, kernels/ and csrc/ lie beside the package; an installed wheel has them inside.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))

# Names are imported at first use: `import fastalps` must not cost what a caller does not touch.
_HOMES = {
    "ALPS": "models",
    "Calibration": "calibration",
    "DriftMonitor": "drift",
    "MotionGate": "gate",
    "Quantization": "quantization",
    "Scorer": "scoring",
    "TrainConfig": "training",
    "Trainer": "training",
    "load": "checkpoint",
    "load_pretrained": "pretrained",
    "quantize": "quantization",
    "save": "checkpoint",
    "use_backend": "backends",
}
_MODULES = (
    "backends",
    "calibration",
    "data",
    "drift",
    "environment",
    "export",
    "gate",
    "metrics",
    "models",
    "nn",
    "ops",
    "pretrained",
    "protocols",
    "quantization",
    "reference",
    "relative",
    "scoring",
    "sklearn",
    "testing",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastalps.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"fastalps.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastalps' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
