"""ALPS: an autoencoder and the adversary that learns to perturb its latent space.

Source: Khazaie, Wong, Jewell, Mohsenzadeh, "Anomaly Detection with Adversarially Learned
Perturbations of Latent Space", section III. The paper gives the numbers of layers but no widths;
the presets state ours.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalps import ops
from fastalps.scalars import is_whole, plain
from fastalps.smoothing import check_size, reconstruction_errors

if TYPE_CHECKING:
    from fastalps.calibration import Calibration
    from fastalps.quantization import Quantization

# Widths of the hidden layers. "paper" keeps the paper's layer counts with the latent size that
# detects best; "fast" is narrower; "network-b" is "paper" with a larger latent, for benchmarks.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"latent": 16, "encoder": (32, 64, 128), "decoder": (256, 128, 64, 32, 16, 16)},
    "fast": {"latent": 16, "encoder": (16, 32, 64), "decoder": (96, 64, 32, 16, 8, 8)},
    "network-b": {"latent": 256, "encoder": (32, 64, 128), "decoder": (256, 128, 64, 32, 16, 16)},
}
PERTURBATIONS = ("adversarial", "noise", "none")
BOUNDS = ("none", "tanh", "norm")
SMALLEST_IMAGE = 8
# Of weights and noise, whatever torch's default is.
FLOAT32: dict[str, Any] = {"dtype": torch.float32}


class ALPSOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        latent: (N, D).
        perturbation: (N, D), before its strength.
        reconstruction: (N, C, H, W) in [0, 1].
        perturbed_reconstruction: (N, C, H, W) in [0, 1], from the perturbed latent.
    """

    latent: Tensor
    perturbation: Tensor
    reconstruction: Tensor
    perturbed_reconstruction: Tensor


class Scores(NamedTuple):
    """Anomaly scores, (N,) float32 each; higher = more anomalous.

    Attributes:
        normal: mean squared error of the reconstruction, pixels in [0, 1]; so between 0 and 1. Of
            smoothed residuals where the model has `ModelConfig.smoothing`.
        perturbed: the same of the perturbed reconstruction.
        average: the mean of both.
    """

    normal: Tensor
    perturbed: Tensor
    average: Tensor


SCORE_KINDS = Scores._fields


def check_kind(name: str, kind: str) -> None:
    """Raises ValueError unless `kind` is one of the scores."""
    if kind not in SCORE_KINDS:
        raise ValueError(f"{name}: expected one of {', '.join(SCORE_KINDS)}; got {kind!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of an ALPS model.

    Attributes:
        image_size: (height, width) in pixels, each at least 8.
        channels: of the images.
        preset: the name that the widths came from.
        latent: size D of the latent vector.
        encoder: widths of the first three convolutions; the fourth gives the latent.
        distorter: the same for the distorter.
        decoder: channels of the smallest map, of the four stride-2 and of the first of the two
            stride-1 transposed convolutions.
        batch_norm: batch normalisation after every hidden layer.
        negative_slope: of the leaky ReLU after every hidden layer.
        perturbation: "adversarial" (ALPS), "noise" (standard normal) or "none" (a plain
            autoencoder).
        bound: on the distorter's output p: "none", "tanh" (tanh(p)) or "norm"
            (p / sqrt(mean p**2) per sample: unit root mean square).
        strength: factor on the perturbation.
        smoothing: side, in pixels, of the neighbourhood over which a residual is averaged before
            it is squared for a score (`fastalps.smoothing`); odd, 1: none, as in the paper.
            Training is the same whatever it is.
    """

    image_size: tuple[int, int]
    channels: int
    preset: str
    latent: int
    encoder: tuple[int, ...]
    distorter: tuple[int, ...]
    decoder: tuple[int, ...]
    batch_norm: bool = True
    negative_slope: float = 0.2
    perturbation: str = "adversarial"
    bound: str = "none"
    strength: float = 1.0
    smoothing: int = 1

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            object.__setattr__(self, option.name, plain(getattr(self, option.name)))
        _check_whole("image_size", self.image_size, 2, SMALLEST_IMAGE)
        _check_whole("channels", (self.channels,), 1, 1)
        _check_whole("latent", (self.latent,), 1, 1)
        _check_whole("encoder", self.encoder, 3, 1)
        _check_whole("distorter", self.distorter, 3, 1)
        _check_whole("decoder", self.decoder, 6, 1)
        _check_choice("perturbation", self.perturbation, PERTURBATIONS)
        _check_choice("bound", self.bound, BOUNDS)
        if not 0 <= self.negative_slope < 1:
            raise ValueError(f"negative_slope: expected in [0, 1), got {self.negative_slope}")
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"strength: expected a positive number, got {self.strength}")
        check_size("smoothing", self.smoothing)

    def map_sizes(self) -> list[tuple[int, int]]:
        """Sizes from the image down to the smallest map: each halves, rounding up."""
        sizes = [self.image_size]
        for _ in range(4):
            height, width = sizes[-1]
            sizes.append(((height + 1) // 2, (width + 1) // 2))
        return sizes


def _check_whole(name: str, values: Sequence[int], count: int, smallest: int) -> None:
    fits = len(values) == count and all(is_whole(value, smallest) for value in values)
    if not fits:
        what = "an integer" if count == 1 else f"{count} integers"
        raise ValueError(f"{name}: expected {what} of at least {smallest}, got {tuple(values)}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")


def model_config(
    image_size: int | Sequence[int] = 28, channels: int = 1, preset: str = "paper", **overrides: Any
) -> ModelConfig:
    """The configuration of a preset, with `overrides` of `ModelConfig`'s fields.

    Raises:
        ValueError: unknown preset, or a field out of its range.
        TypeError: unknown field.
    """
    _check_choice("preset", preset, tuple(PRESETS))
    size: Any = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    fields: dict[str, Any] = {**PRESETS[preset], **overrides}
    fields.setdefault("distorter", fields["encoder"])
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(set(fields) - known):
        raise TypeError(
            f"{unknown[0]}: no such option of ALPS; expected one of {', '.join(sorted(known))}"
        )
    for name in ("encoder", "distorter", "decoder"):
        fields[name] = tuple(fields[name])
    return ModelConfig(image_size=size, channels=channels, preset=preset, **fields)


def alterations(model: ALPS) -> str:
    """In what a model is not what its configuration says; empty where it is.

    The engines compute an ALPS of that configuration with the model's weights. A method that a
    subclass has of its own, another layer in place of one, or a hook they would not see.
    """
    for name in ("encode", "distort", "decode"):
        if name in vars(model) or getattr(type(model), name) is not getattr(ALPS, name):
            return f"the model has a method {name} of its own"
    with torch.device("meta"):
        plain_model = ALPS.from_config(model.config)
    expected, found = dict(plain_model.named_modules()), dict(model.named_modules())
    for name in sorted(expected.keys() ^ found.keys()):
        return f"the model has {'a' if name in found else 'no'} layer {name}"
    for name, module in found.items():
        if name and _description(module) != _description(expected[name]):
            return f"layer {name} is {type(module).__name__}, other than the configuration's"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{f'layer {name}' if name else 'the model'} has a hook"
    return ""


def _description(module: nn.Module) -> tuple[Any, ...]:
    # How a batch norm learns, and where a layer writes, changes no result.
    options = re.sub(r",? ?(momentum|inplace)=[\w.]+", "", module.extra_repr())
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return type(module), options, [(name, tuple(value.shape)) for name, value in held]


def _hidden(layer: nn.Module, channels: int, config: ModelConfig) -> Iterator[nn.Module]:
    yield layer
    if config.batch_norm:
        yield nn.BatchNorm2d(channels, **FLOAT32)
    yield nn.LeakyReLU(config.negative_slope)


class Encoder(nn.Module):
    """Four 3x3 stride-2 convolutions and global average pooling: (N, C, H, W) -> (N, latent)."""

    def __init__(self, config: ModelConfig, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = config.channels
        for width in widths:
            # Batch norm has its own shift, so a bias before it would do nothing.
            convolution = nn.Conv2d(before, width, 3, 2, 1, bias=not config.batch_norm, **FLOAT32)
            layers += _hidden(convolution, width, config)
            before = width
        layers.append(nn.Conv2d(before, config.latent, 3, 2, 1, **FLOAT32))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))


class Decoder(nn.Module):
    """A dense layer and six transposed convolutions: (N, latent) -> logits (N, C, H, W).

    Four 3x3 stride-2 layers mirror the encoder's sizes (by `output_padding`), two 3x3 stride-1
    layers finish.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.map_sizes()[::-1]
        start, *widths, last = config.decoder
        self.start = (start, *sizes[0])
        self.dense = nn.Linear(config.latent, start * sizes[0][0] * sizes[0][1], **FLOAT32)
        layers: list[nn.Module] = [nn.LeakyReLU(config.negative_slope)]
        if config.batch_norm:
            layers.insert(0, nn.BatchNorm2d(start, **FLOAT32))
        before = start
        for width, small, large in zip(widths, sizes, sizes[1:], strict=False):
            # A stride-2 layer gives 2 * size - 1 + output_padding.
            padding = (large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1)
            layer = nn.ConvTranspose2d(
                *(before, width, 3, 2, 1),
                output_padding=padding,
                bias=not config.batch_norm,
                **FLOAT32,
            )
            layers += _hidden(layer, width, config)
            before = width
        layer = nn.ConvTranspose2d(before, last, 3, 1, 1, bias=not config.batch_norm, **FLOAT32)
        layers += _hidden(layer, last, config)
        layers.append(nn.ConvTranspose2d(last, config.channels, 3, 1, 1, **FLOAT32))
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(self.dense(latent).unflatten(1, self.start))


class Distorter(nn.Module):
    """The adversary: an encoder of the image whose output perturbs the latent, (N, latent)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.bound = config.bound
        self.encoder = Encoder(config, config.distorter)

    def forward(self, images: Tensor) -> Tensor:
        perturbation = self.encoder(images)
        if self.bound == "tanh":
            return perturbation.tanh()
        if self.bound == "norm":
            square = perturbation.float().square().mean(1, keepdim=True)
            return (perturbation * (square + 1e-12).rsqrt()).to(perturbation.dtype)
        return perturbation


class ALPS(nn.Module):
    """Autoencoder and distorter.

    ``latent = encoder(x)``, ``perturbation = distorter(x)``,
    ``reconstruction = sigmoid(decoder(latent))``,
    ``perturbed_reconstruction = sigmoid(decoder(latent + strength * perturbation))``.

    Args:
        image_size: pixels, an int or (height, width), each at least 8.
        channels: of the images.
        preset: "paper", "fast" or "network-b".
        **overrides: fields of `ModelConfig`, such as ``latent=32`` or ``perturbation="noise"``.

    Its weights are float32, whatever torch's default dtype is.

    Raises:
        ValueError: unknown preset or a value out of its range.
        TypeError: unknown option.
    """

    calibration: Calibration | None
    quantization: Quantization | None

    def __init__(
        self,
        image_size: int | Sequence[int] = 28,
        channels: int = 1,
        preset: str = "paper",
        **overrides: Any,
    ) -> None:
        super().__init__()
        self._build(model_config(image_size, channels, preset, **overrides))

    @classmethod
    def from_config(cls, config: ModelConfig) -> ALPS:
        """A model of this configuration, with fresh weights."""
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return cls(**fields)

    def _build(self, config: ModelConfig) -> None:
        self.config = config
        self.calibration = None
        self.quantization = None
        self.encoder = Encoder(config, config.encoder)
        self.decoder = Decoder(config)
        self.distorter = Distorter(config) if config.perturbation == "adversarial" else None

    def encode(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> latent (N, D)."""
        return self.encoder(images)

    def distort(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(N, C, H, W) -> perturbation (N, D), before its strength.

        Args:
            generator: for the noise of ``perturbation="noise"``.
        """
        if self.distorter is not None:
            return self.distorter(images)
        shape = (images.shape[0], self.config.latent)
        if self.config.perturbation == "noise":
            noise = torch.randn(shape, generator=generator, device=images.device, **FLOAT32)
            return noise.to(images.dtype)
        return images.new_zeros(shape)

    def decode(self, latent: Tensor) -> Tensor:
        """(N, D) -> logits (N, C, H, W): the reconstruction before its sigmoid."""
        return self.decoder(latent)

    def forward(self, images: Tensor) -> ALPSOutput:
        """Both reconstructions of `images`, float (N, C, H, W) in [0, 1]."""
        self._check(images)
        latent, perturbation = self.encode(images), self.distort(images)
        perturbed, _ = ops.perturb_latent(latent, perturbation, self.config.strength)
        both = self.decode(torch.cat([latent, perturbed])).sigmoid()
        n = images.shape[0]
        return ALPSOutput(latent, perturbation, both[:n], both[n:])

    @torch.no_grad()
    def score(self, images: Tensor) -> Scores:
        """The three anomaly scores of `images`, without gradients and with eval-mode statistics.

        Args:
            images: float (N, C, H, W) in [0, 1]; N may be 0.

        Returns:
            `Scores` (normal, perturbed, average), (N,) float32 each.

        Raises:
            ValueError: wrong shape.
            TypeError: wrong dtype.
        """
        self._check(images)
        training = self.training
        if training:
            self.eval()
        try:
            latent = self.encode(images)
            perturbed, _ = ops.perturb_latent(latent, self.distort(images), self.config.strength)
            logits = self.decode(torch.cat([latent, perturbed]))
            errors = reconstruction_errors(logits, images, self.config.smoothing, paired=True)
            normal, after = errors.unbind()
        finally:
            if training:
                self.train()
        return Scores(normal, after, (normal + after) / 2)

    def flops(self, passes: str = "both") -> int:
        """Floating-point operations of the scores of one image.

        Two a multiply-add of the dense and convolutional layers, taps on zero borders counted.

        Args:
            passes: "both" scores, or "normal" or "perturbed" alone.
        """
        _check_choice("passes", passes, ("both", "normal", "perturbed"))
        config = self.config
        sizes = [height * width for height, width in config.map_sizes()]
        total = 0
        distorts = self.distorter is not None and passes != "normal"
        networks = [config.encoder, *([config.distorter] if distorts else [])]
        for widths in networks:
            channels = (config.channels, *widths, config.latent)
            total += sum(
                9 * a * b * s for (a, b), s in zip(pairwise(channels), sizes[1:], strict=True)
            )
        reconstructions = 2 if passes == "both" and config.perturbation != "none" else 1
        decoder = config.latent * config.decoder[0] * sizes[-1]
        # A stride-2 transposed convolution multiplies at each pixel of its input.
        maps = [*sizes[:0:-1], sizes[0], sizes[0]]
        channels = (*config.decoder, config.channels)
        decoder += sum(9 * a * b * s for (a, b), s in zip(pairwise(channels), maps, strict=True))
        return 2 * (total + reconstructions * decoder)

    def _check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(
                f"images: expected a floating dtype in [0, 1], got {images.dtype}; "
                f"divide uint8 pixels by 255"
            )
        weights = next((weight.dtype for weight in self.parameters()), images.dtype)
        if images.dtype != weights and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"images: expected {weights}, as the model's weights are, got {images.dtype}; "
                "convert one of them"
            )
        expected = (self.config.channels, *self.config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images: expected (N, {', '.join(map(str, expected))}), "
                f"got shape {tuple(images.shape)}"
            )
