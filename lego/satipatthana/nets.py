"""Adapters that turn inputs into latent vectors, and the heads on latents and states (specification, 3.1 and 3.8)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lego.satipatthana.settings import AdapterParams

CHANNELS = (32, 64, 128, 256)  # of the convolutional adapter, a stride of 2 each
LEAK = 0.2  # slope of its LeakyReLU below 0


def perceptron(sizes: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear-LayerNorm-ReLU for each hidden size, and a last linear layer."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class SeriesAdapter(nn.Module):
    """Windows (B, steps, features) to latents, by an LSTM's last state or a transformer's mean.

    Args:
        features, steps: of a window.
        dim: of the latent.
        settings: section `adapter`.
    """

    def __init__(self, features: int, steps: int, dim: int, settings: AdapterParams) -> None:
        super().__init__()
        width, dropout = settings.hidden, settings.dropout
        self.is_lstm = settings.kind == "lstm"
        self.positions: Tensor
        self.drop = nn.Dropout(dropout)
        if self.is_lstm:
            self.body: nn.Module = nn.LSTM(features, width, settings.layers, batch_first=True)
        else:
            layer = nn.TransformerEncoderLayer(width, settings.heads, 2 * width, dropout, batch_first=True)
            self.inward = nn.Linear(features, width)
            self.body = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
            self.register_buffer("positions", sinusoids(steps, width), persistent=False)
        self.outward = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_lstm:
            _, (hidden, _) = self.body(x)
            summary = hidden[-1]  # (B, w)
        else:
            summary = self.body(self.inward(x) + self.positions[: x.shape[1]]).mean(dim=1)  # (B, w)
        return self.outward(self.drop(summary))


def sinusoids(steps: int, width: int) -> Tensor:
    """Positions (steps, width) of Vaswani et al. (2017)."""
    place = torch.arange(steps)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    return torch.stack([place.sin(), place.cos()], dim=-1).flatten(1)[:, :width]  # (steps, width)


class Adapter(nn.Module):
    """z = adapter(x), in (-1, 1) but for `identity`.

    Args:
        shape: of one input: (features,), (steps, features) or (channels, size, size).
        dim: of the latent.
        settings: section `adapter`.

    Raises:
        ValueError: the kind does not fit the shape.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, settings: AdapterParams) -> None:
        super().__init__()
        self.shape, self.kind = shape, settings.kind
        wanted = {"cnn": 3, "lstm": 2, "transformer": 2}.get(settings.kind)
        if wanted and len(shape) != wanted:
            raise ValueError(f"adapter.kind {settings.kind} needs inputs of {wanted} dimensions, these are {shape}")
        size = math.prod(shape)
        match settings.kind:
            case "identity":
                if size != dim:
                    raise ValueError(
                        f"system.dim must be {size}, the input's size, for adapter.kind identity, got {dim}"
                    )
                self.body: nn.Module = nn.Identity()
            case "mlp":
                hidden = [settings.hidden] * 2
                self.body = nn.Sequential(nn.Flatten(), perceptron([size, *hidden, dim], settings.dropout))
            case "cnn":
                self.body = _convolutions(shape, dim, settings)
            case _:
                self.body = SeriesAdapter(shape[1], shape[0], dim, settings)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, d) of inputs (B, *shape).

        Raises:
            ValueError: inputs of another shape.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"inputs must be (rows, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return x.flatten(1) if self.kind == "identity" else torch.tanh(self.body(x))


def _convolutions(shape: tuple[int, ...], dim: int, settings: AdapterParams) -> nn.Sequential:
    channels, size, width = shape
    if size != width or size % 2 ** len(CHANNELS):
        raise ValueError(f"adapter.kind cnn needs square images whose side is divisible by 16, got {size} x {width}")
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(zip((channels, *CHANNELS), CHANNELS, strict=False)):
        layers.append(nn.Conv2d(before, after, 4, stride=2, padding=1))
        layers += [nn.BatchNorm2d(after)] if number else []
        layers.append(nn.LeakyReLU(LEAK))
    side = size // 2 ** len(CHANNELS)
    drop = [nn.Dropout(settings.dropout)] if settings.dropout else []
    return nn.Sequential(*layers, nn.Flatten(), *drop, nn.Linear(CHANNELS[-1] * side * side, dim))


class Reconstruction(nn.Module):
    """A latent or a state (B, d) back to an input (B, *shape).

    Images are grown by nearest upsampling and convolutions: a transposed convolution with a stride leaves a
    checkerboard (R-8.9).

    Args:
        shape: of one input.
        dim: of the latent.
        hidden: width of the two layers.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, hidden: int) -> None:
        super().__init__()
        self.shape = shape
        if len(shape) == 3 and shape[1] == shape[2] and shape[1] % 2 ** len(CHANNELS) == 0:
            side = shape[1] // 2 ** len(CHANNELS)
            self.first: nn.Module = nn.Sequential(
                nn.Linear(dim, CHANNELS[-1] * side * side), nn.Unflatten(1, (CHANNELS[-1], side, side))
            )
            self.trunk: nn.Module = upsampling((*CHANNELS[::-1], CHANNELS[0]), shape[0])
        else:
            self.first, self.trunk = nn.Identity(), perceptron([dim, hidden, hidden, math.prod(shape)])

    def forward(self, latent: Tensor) -> Tensor:
        return self.trunk(self.first(latent)).unflatten(1, self.shape) if self._flat else self.trunk(self.first(latent))

    @property
    def _flat(self) -> bool:
        return isinstance(self.first, nn.Identity)


def upsampling(channels: Sequence[int], out: int) -> nn.Sequential:
    """Twice the size for each step of `channels`, then a convolution to `out` channels in (-1, 1)."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(before, after, 3, padding=1)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], out, 3, padding=1), nn.Tanh())


class Decoder(nn.Module):
    """[s*; v] (B, d + c) to the answer (B, C); Tanh only where targets are declared to lie in [-1, 1] (R-3.8).

    Args:
        dim, context_dim: d and c.
        outputs: C.
        hidden: width of its two layers.
        activation: `none` or `tanh`.
    """

    low: Tensor
    high: Tensor

    def __init__(self, dim: int, context_dim: int, outputs: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.body = perceptron([dim + context_dim, hidden, hidden, outputs])
        self.last = nn.Tanh() if activation == "tanh" else nn.Identity()
        self.register_buffer("low", torch.full((context_dim,), -torch.inf))
        self.register_buffer("high", torch.full((context_dim,), torch.inf))

    def learn_range(self, context: Tensor) -> None:
        """Takes the range of the contexts (N, c) that it will learn from; later ones are brought into it.

        Contexts tell how strange a row is, without a bound. Rows of train are the least strange there are, and a
        decoder that learned from them alone answers at random where it has to extrapolate.
        """
        self.low.copy_(context.amin(dim=0))
        self.high.copy_(context.amax(dim=0))

    def forward(self, state: Tensor, context: Tensor) -> Tensor:
        return self.last(self.body(torch.cat([state, context.clamp(self.low, self.high)], dim=-1)))


def auxiliary(dim: int, hidden: int, outputs: int) -> nn.Sequential:
    """What guides stage 1, on s*; never used at inference."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
