"""Noise of a known severity (specification, 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lego.satipatthana.settings import AugmenterParams


class Augmenter(nn.Module):
    """(x, level) -> (x', severity).

    Gaussian, per sample: u_i ~ U(0, level), noise of u_i * max_noise_std * std(x_train), severity u_i. Per batch, as
    the original: one std of level * max_noise_std, which is the severity as well, however large.

    Args:
        settings: section `augmenter`.
    """

    scale: Tensor

    def __init__(self, settings: AugmenterParams) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("scale", torch.ones(()))  # std of the train inputs

    def forward(self, x: Tensor, level: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Noisy inputs (B, *shape) and their severity (B,); at level 0 the input itself and 0 (R-3.2)."""
        if self.settings.kind == "identity" or not level:
            return x, x.new_zeros(len(x))
        noise = _normal(x, generator)
        if not self.settings.per_sample:
            one = level * self.settings.max_noise_std
            return x + one * noise, x.new_full((len(x),), one)
        severity = level * _uniform(x, generator)  # (B,)
        std = severity * self.settings.max_noise_std * self.scale
        return x + std.view(-1, *[1] * (x.dim() - 1)) * noise, severity


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(len(like), generator=generator, device=device).to(like.device)
