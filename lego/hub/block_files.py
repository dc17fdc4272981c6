"""The file of a block: its weights with their digest, its configuration in the header, low rank as two factors."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lego.base.digests import of_tensors
from lego.hub.configuration import LegoConfig

BLOCK = "block.safetensors"
LOW = 4  # a change is stored as factors if its rank is at most a fourth of what it could be,
MOST = 256  # and this
ROUNDING = 4  # last places of a usual weight: what one made again from its factors may differ by,
LOST = 1e-3  # and this share of the largest change


def write_block(folder: Path, tensors: dict[str, Tensor], config: LegoConfig) -> None:
    """Writes a block's file, whole or not at all; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    said = json.dumps(config.to_dict(), sort_keys=True)
    partial = folder / f".{BLOCK}.partial"
    save_file(tensors, partial, {"format": "pt", "config": said, "sha256": of_tensors(tensors, said)})
    os.replace(partial, folder / BLOCK)


def read_block(folder: Path) -> tuple[LegoConfig, dict[str, Tensor]]:
    """The configuration and weights of a block.

    Raises:
        ValueError: there is none, or it is not as it was written.
    """
    if not (file := folder / BLOCK).is_file():
        raise ValueError(f"{folder}: holds no {BLOCK}; save_block writes one")
    try:
        with safe_open(file, "pt") as opened:
            said: dict[str, Any] = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        whole = said["sha256"] == of_tensors(tensors, said["config"])
        config = LegoConfig.from_dict(json.loads(said["config"])) if whole else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        config = None
    if config is None:
        raise ValueError(f"{file}: is not as save_block wrote it; take it again from where it came from")
    return config, tensors


def stored(key: str, tensor: Tensor, before: Tensor | None) -> dict[str, Tensor]:
    """A weight as it is stored: the two factors of what it differs by from the one it began with, or itself.

    The factors are found by a random projection (Halko et al. 2011, arXiv 0909.4061). They stand for the weight only if
    they give it back, but for the rounding of one sum.
    """
    if before is None or tensor.dim() != 2:
        return {key: tensor}
    change = tensor.double() - before.double()  # (out, in)
    usual = float(before.double().square().mean().sqrt())
    noise = torch.finfo(tensor.dtype).eps * usual  # of one number
    columns = min(min(change.shape) // LOW, MOST)
    if not columns:
        return {key: tensor}
    random = torch.randn(change.shape[1], columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(change @ random).Q  # (out, columns)
    left, sizes, right = torch.linalg.svd(basis.t() @ change, full_matrices=False)
    rank = int((sizes > noise * sum(math.sqrt(side) for side in change.shape)).sum())
    up, down = (basis @ left[:, :rank] * sizes[:rank]).float(), right[:rank].float()
    again = (before.float() + up @ down).to(tensor.dtype)
    apart, within = (again.double() - tensor.double()).abs(), change.abs().max()
    close = apart <= ROUNDING * torch.finfo(tensor.dtype).eps * (tensor.double().abs() + usual)
    # a step of training may itself be as small as the rounding
    same = torch.equal(again, tensor) or (bool(close.all()) and float(apart.max()) <= LOST * float(within))
    return {f"{key}.up": up, f"{key}.down": down} if same else {key: tensor}
