"""Several blocks on one base: block 2, gate, criterion and threshold are switched, block 1 is in memory once.

As adapters are in peft: `save_block`, `load_block`, `set_block`, `delete_block`. A block's folder holds config.json and
block.safetensors; in the latter, changes of low rank that branch layers learned are stored as their two factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lego.hub.configuration import OF_WEIGHTS, LegoConfig

BLOCK = "block.safetensors"
FIRST = "default"  # name of the block that a model was loaded with
OF_BLOCK = (
    *(name for name in OF_WEIGHTS if name != "exit_layer"),
    *("exit_threshold", "exit_criterion", "trained_context"),
)
"""Fields of the configuration that go with a block."""
OF_BASE = ("hidden_size", "exit_layer", "vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
PARTS = ("deep_head", "exit_criterion_module", "gate")
SAMPLED = 8  # values of each of the base's weights, by which it is known again in any precision
ALIKE = 1e-2
LOW = 4  # a change is stored as factors if its rank is at most a fourth of what it could be,
MOST = 256  # and this


@dataclass
class Block:
    """What is switched: fields of the configuration, the layers above the exit, their norm, and what is fitted."""

    fields: dict[str, Any]
    layers: list[nn.Module]
    norm: nn.Module
    parts: dict[str, nn.Module | None]


class ManyBlocks:
    """The part of LegoForCausalLM that keeps blocks by name; those that are not active lie outside the module tree.

    A cache of keys and values belongs to the block that it was made with.
    """

    config: Any
    model: Any

    @property
    def blocks(self) -> list[str]:
        """Names of all blocks; the one that the model was loaded with is called `default`."""
        return sorted({self.active_block, *self._others()})

    @property
    def active_block(self) -> str:
        return getattr(self, "_active", FIRST)

    def _others(self) -> dict[str, Block]:
        if not hasattr(self, "_kept"):
            self._kept: dict[str, Block] = {}
        return self._kept

    def set_block(self, name: str) -> None:
        """Answers with another block from now on; the one before keeps its threshold and can be set again.

        Raises:
            ValueError: there is no such block.
        """
        if name == self.active_block:
            return
        self._require(name)
        self._others()[self.active_block] = self._block()
        self._put(self._kept.pop(name))
        self._active = name

    def delete_block(self, name: str) -> None:
        """Forgets a block.

        Raises:
            ValueError: there is no such block, or it is active.
        """
        if name == self.active_block:
            raise ValueError(f"block {name} is active; set another one first")
        self._require(name)
        del self._kept[name]

    def _require(self, name: str) -> None:
        if name not in self._others():
            raise ValueError(f"there is no block {name}; there are {', '.join(self.blocks)}")

    def _block(self) -> Block:
        """The active block."""
        fields = {name: getattr(self.config, name) for name in OF_BLOCK}
        layers = list(self.model.layers[self.config.exit_layer :])
        return Block(fields, layers, self.model.norm, {name: getattr(self, name) for name in PARTS})

    def _put(self, block: Block) -> None:
        """Makes a block the active one, on the base's device and in its type."""
        weight = self.model.embed_tokens.weight
        for module in (*block.layers, block.norm, block.parts["deep_head"]):
            if module is not None:
                module.to(weight.device, weight.dtype)
        for name in ("exit_criterion_module", "gate"):  # which stay in float32
            if block.parts[name] is not None:
                block.parts[name].to(weight.device)  # type: ignore[union-attr]
        self.model.layers = nn.ModuleList([*self.model.layers[: self.config.exit_layer], *block.layers])
        self.model.norm = block.norm
        for name, part in block.parts.items():
            setattr(self, name, part)
        for name, value in block.fields.items():
            setattr(self.config, name, value)
        self.model.built = {name: getattr(self.config, name) for name in OF_WEIGHTS}
        self.train(self.training)  # type: ignore[attr-defined]

    def _base(self) -> Iterator[tuple[str, Tensor]]:
        """The base's weights, under the names that a Llama has for them."""
        for name, tensor in self.model.embed_tokens.state_dict().items():
            yield f"model.embed_tokens.{name}", tensor
        for number, layer in enumerate(self.model.layers[: self.config.exit_layer]):
            for name, tensor in layer.state_dict().items():
                yield f"model.layers.{number}.{name}", tensor
        yield "model.norm.weight", self.exit_norm.weight.detach()  # type: ignore[attr-defined]
        yield "lm_head.weight", self.lm_head.weight.detach()  # type: ignore[attr-defined]

    def _known_by(self) -> Tensor:
        """A few values of each of the base's weights (n,)."""
        return torch.cat([_spread(tensor) for _, tensor in self._base()])

    @torch.no_grad()
    def save_block(self, folder: str | Path) -> None:
        """Writes the active block into a folder, which is made: what it adds to the base, and none of the base.

        Args:
            folder: for `load_block`, and for `LegoForCausalLM.from_block` with the base's folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        block, tensors = self._block(), {"base_sample": self._known_by()}
        for number, layer in enumerate(block.layers):
            for name, tensor in layer.state_dict().items():
                before = self._repeated(number, name, self.config)
                tensors |= _stored(f"layers.{number}.{name}", tensor.cpu(), before)
        for part, module in {"norm": block.norm, **block.parts}.items():
            if module is not None:
                tensors |= {f"{part}.{name}": tensor.cpu() for name, tensor in module.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / BLOCK, {"format": "pt"})
        self.config.save_pretrained(folder)

    def _repeated(self, number: int, name: str, config: LegoConfig) -> Tensor | None:
        """The base's weight that a branch layer began with; None of other layers."""
        place = config.begins_at + number
        if place >= config.exit_layer:
            return None
        found = self.model.layers[place].state_dict().get(name)
        return None if found is None else found.cpu()

    def load_block(self, folder: str | Path, name: str) -> None:
        """Reads a block that `save_block` wrote; `set_block` lets the model answer with it.

        Args:
            folder: where it lies.
            name: what it is called here.

        Raises:
            ValueError: the name is taken, the folder holds no block, or it is one of another base.
        """
        if name in self.blocks:
            raise ValueError(f"there is a block {name} already; delete it first, or choose another name")
        config, tensors = _read(Path(folder))
        wrong = [key for key in OF_BASE if getattr(config, key) != getattr(self.config, key)]
        if wrong:
            had, have = getattr(config, wrong[0]), getattr(self.config, wrong[0])
            raise ValueError(f"{folder}: is a block of a base with {wrong[0]} {had}, this one has {have}")
        sample, mine = tensors.pop("base_sample"), self._known_by()
        if sample.shape != mine.shape or not torch.allclose(sample, mine, rtol=ALIKE, atol=ALIKE * float(mine.std())):
            raise ValueError(f"{folder}: is a block of another base, whose weights differ; give that base")
        with torch.device("meta"):  # of all the model only the block gets memory
            made = type(self)(config)  # type: ignore[call-arg]
        block = made._block()
        self._fill(block, tensors, config, Path(folder) / BLOCK)
        self._others()[name] = block

    def _fill(self, block: Block, tensors: dict[str, Tensor], config: LegoConfig, file: Path) -> None:
        """Gives a block's modules their weights, from its tensors and its own configuration."""
        modules = {f"layers.{number}": layer for number, layer in enumerate(block.layers)} | {"norm": block.norm}
        modules |= {name: part for name, part in block.parts.items() if part is not None}
        left = set(tensors)
        for prefix, module in modules.items():
            state = {}
            for name in module.state_dict():
                key = f"{prefix}.{name}"
                if f"{key}.up" in tensors:
                    before = self._repeated(int(prefix.rpartition(".")[2]), name, config)
                    if before is not None:
                        state[name] = torch.addmm(before.float(), tensors[f"{key}.up"], tensors[f"{key}.down"])
                elif key in tensors:
                    state[name] = tensors[key]
                else:
                    raise ValueError(f"{file}: lacks {key}; take it from where it was saved")
                left -= {key, f"{key}.up", f"{key}.down"}
            module.load_state_dict(state, assign=True)
        if left:
            raise ValueError(f"{file}: has {sorted(left)[0]}, which its config.json does not know")

    @classmethod
    def from_block(cls, folder: str | Path, base: str | Path, **kwargs: Any) -> Any:
        """A routed model from a block's folder and the Llama that it was trained on, which is read as it is.

        Args:
            folder: that `save_block` wrote.
            base: of the given model, as `from_pretrained` takes it.
            **kwargs: of that `from_pretrained`, such as dtype.

        Raises:
            ValueError: see `load_block`.
        """
        config, _ = _read(Path(folder))
        given = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        alone = {"num_hidden_layers": config.exit_layer, "branch_layer": None, "own_head": False, "gated": False}
        fields = config.to_dict() | alone | {"exit_criterion": "max_prob", "exit_threshold": 0.0}
        with torch.device("meta"):
            model = cls(LegoConfig.from_dict(fields))  # type: ignore[call-arg]
        weights = given.state_dict()
        weights["exit_norm.weight"] = weights["model.norm.weight"]
        model.load_state_dict(weights, assign=True)  # type: ignore[attr-defined]
        model.model.rotary_emb = given.model.rotary_emb
        model.tie_weights()  # type: ignore[attr-defined]
        model.generation_config = given.generation_config  # type: ignore[attr-defined]
        model.load_block(folder, "block")
        model.set_block("block")
        model.delete_block(FIRST)
        return model.eval()  # type: ignore[attr-defined]


def _spread(tensor: Tensor) -> Tensor:
    """SAMPLED values (n,) of a weight, from all over it, in float32 on the CPU."""
    flat = tensor.detach().flatten()
    count = min(SAMPLED, flat.numel())
    places = torch.arange(count) * (flat.numel() - 1) // max(1, count - 1)
    return flat[places.to(flat.device)].float().cpu()


def _stored(key: str, tensor: Tensor, before: Tensor | None) -> dict[str, Tensor]:
    """A weight as it is stored: the two factors of what it differs by from the one it began with, or itself.

    The factors are found by a random projection (Halko et al. 2011, arXiv 0909.4061); what is below the rounding of the
    sum is no part of the change.
    """
    if before is None or tensor.dim() != 2:
        return {key: tensor}
    change = tensor.double() - before.double()  # (out, in)
    noise = torch.finfo(tensor.dtype).eps * float(before.double().square().mean().sqrt())  # of one number
    columns = min(min(change.shape) // LOW, MOST)
    if not columns:
        return {key: tensor}
    random = torch.randn(change.shape[1], columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(change @ random).Q  # (out, columns)
    inside = basis.t() @ change  # (columns, in)
    if float((change - basis @ inside).square().mean().sqrt()) > noise:
        return {key: tensor}
    left, sizes, right = torch.linalg.svd(inside, full_matrices=False)
    rank = int((sizes > noise * sum(math.sqrt(side) for side in change.shape)).sum())
    return {f"{key}.up": (basis @ left[:, :rank] * sizes[:rank]).float(), f"{key}.down": right[:rank].float()}


def _read(folder: Path) -> tuple[LegoConfig, dict[str, Tensor]]:
    if not (folder / BLOCK).is_file():
        raise ValueError(f"{folder}: holds no {BLOCK}; save_block writes one")
    return LegoConfig.from_pretrained(folder), load_file(folder / BLOCK)
