"""What a scorer's errors come from, and in which precision."""

from __future__ import annotations

import copy
import warnings

import torch

from fastalps import backends, quantization
from fastalps.engine import Engine, log_layer_by_layer, why_not
from fastalps.environment import has_fast_bfloat16
from fastalps.errors import BackendUnavailable
from fastalps.fused import FusedEngine
from fastalps.fused import why_not as why_not_fused
from fastalps.layers import LayerByLayer
from fastalps.models import ALPS, alterations
from fastalps.passes import Network

PRECISIONS = ("fp32", "bf16", "int8")


def choose_precision(model: ALPS, device: torch.device, asked: str) -> str:
    """`asked`, or what "auto" stands for: see `fastalps.quantization.choose`.

    Raises ValueError for a precision that this model and device do not have. Warns where its
    arithmetic is emulated.
    """
    if asked == "auto":
        return quantization.choose(model, device)
    if asked not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} or auto, got {asked!r}")
    reason = alterations(model) or why_not(model.config, device, asked)
    if asked == "int8" and reason:
        raise ValueError(f"precision int8 is not to be had: {reason}; use fp32, bf16 or auto")
    if asked == "int8" and model.quantization is None:
        raise ValueError(
            "precision int8 needs the ranges of the model's activations; set "
            "model.quantization = fastalps.quantize(model, normal_images) first"
        )
    lacking = None
    if not reason and asked in quantization.NARROW and not quantization.in_hardware(asked):
        lacking = f"this processor has no {asked} instructions"
        lacking += f" ({', '.join(quantization.NARROW[asked])})"
    elif reason and asked == "bf16" and not has_fast_bfloat16(device):
        lacking = f"this {device.type} has no bf16 arithmetic"
    if lacking is not None:
        warnings.warn(f"{lacking}, so {asked} is emulated and slower than fp32", stacklevel=3)
    return asked


class Networks:
    """The fastest network for a private copy of a model, and the one for other backends.

    Args:
        model: copied: later changes to it do not show.
        device: where to run.
        precision: of the networks, see `choose_precision`.
        batch_size: images a network call, layer by layer.
    """

    def __init__(self, model: ALPS, device: torch.device, precision: str, batch_size: int) -> None:
        self.device = device
        self.precision = precision
        self.batch_size = batch_size
        self._model = copy.deepcopy(model)
        self._engine = self._make_engine()
        self._layers: LayerByLayer | None = None

    def _make_engine(self) -> Engine | FusedEngine | None:
        """What scores with the whole network in one call; None, and the reason logged, without."""
        altered = alterations(self._model)
        if self.device.type == "cuda":
            reason = altered or why_not_fused(self._model.config, self.device, self.precision)
            if not reason:
                return FusedEngine(self._model, self.device)
        else:
            reason = altered or why_not(self._model.config, self.device, self.precision)
            if not reason:
                found = self._model.quantization
                ranges = None if found is None else found.ranges
                return Engine(self._model, precision=self.precision, ranges=ranges)
        log_layer_by_layer(reason)
        return None

    def current(self) -> Network:
        """The engine where it covers the model and the backend asked for, else layer by layer."""
        if self._engine is not None:
            if backends.engines_wanted():
                return self._engine
            asked = backends.requested()
            if self.precision == "int8":
                raise BackendUnavailable(
                    f"backend {asked} does not compute in int8, which these scores were to be in; "
                    "make the scorer with precision fp32 or bf16"
                )
            log_layer_by_layer(f"backend {asked} was asked for")
        if self._layers is None:
            self._layers = LayerByLayer(self._model, self.device, self.precision, self.batch_size)
        return self._layers

    @property
    def method(self) -> str:
        """Of the current one: "engine", "fused" or "layers"."""
        network = self.current()
        if isinstance(network, Engine):
            return "engine"
        return "fused" if isinstance(network, FusedEngine) else "layers"
