"""Several blocks on one base: block 2, gate, criterion and threshold are switched, block 1 is in memory once.

As adapters are in peft: `save_block`, `load_block`, `set_block`, `delete_block`. A block's folder holds one file, with
the block's configuration in its header; changes of low rank that branch layers learned are stored as two factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lego.hub.block_files import BLOCK, read_block, stored, write_block
from lego.hub.configuration import OF_WEIGHTS, LegoConfig

FIRST = "default"  # name of the block that a model was loaded with
OF_BLOCK = (
    *(name for name in OF_WEIGHTS if name != "exit_layer"),
    *("exit_threshold", "exit_criterion", "trained_context"),
)
"""Fields of the configuration that go with a block."""
OF_BASE = ("hidden_size", "exit_layer", "vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
PARTS = ("deep_head", "exit_criterion_module", "gate")
SAMPLED = 8  # values of each of the base's weights, by which it is known again


@dataclass
class Block:
    """What is switched: fields of the configuration, the layers above the exit, their norm, and what is fitted.

    `as_base` says whether its weights have the base's type, and follow it where that changes.
    """

    fields: dict[str, Any]
    layers: list[nn.Module]
    norm: nn.Module
    parts: dict[str, nn.Module | None]
    as_base: bool = True


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
        layers, norm = list(self.model.layers[self.config.exit_layer :]), self.model.norm
        as_base = norm.weight.dtype == self.model.embed_tokens.weight.dtype
        return Block(fields, layers, norm, {name: getattr(self, name) for name in PARTS}, as_base)

    def _put(self, block: Block) -> None:
        """Makes a block the active one: on the base's device, and with what was set for the whole model since."""
        weight, below = self.model.embed_tokens.weight, self.model.layers[: self.config.exit_layer]
        for module in (*block.layers, block.norm, block.parts["deep_head"]):
            if module is not None:
                module.to(weight.device, weight.dtype if block.as_base else None)
        for name in ("exit_criterion_module", "gate"):  # which stay in float32
            if block.parts[name] is not None:
                block.parts[name].to(weight.device)  # type: ignore[union-attr]
        for layer in block.layers:
            layer.self_attn.config = self.config  # type: ignore[union-attr]
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                if hasattr(below[0], name):
                    setattr(layer, name, getattr(below[0], name))
        self.model.layers = nn.ModuleList([*below, *block.layers])
        self.model.norm = block.norm
        for name, part in block.parts.items():
            setattr(self, name, part)
        for name, value in block.fields.items():
            setattr(self.config, name, value)
        self.model.built = {name: getattr(self.config, name) for name in OF_WEIGHTS}
        self.train(self.training)  # type: ignore[attr-defined]
        head = block.parts["deep_head"]
        if head is not None and len(head.weight) != len(weight):  # type: ignore[arg-type]
            self.deep_head = self._get_resized_lm_head(head, len(weight))  # type: ignore[attr-defined]

    def _known_by(self) -> Tensor:
        """A few values of each of the base's weights (n,), in the base's type, on the CPU."""
        base = [self.model.embed_tokens, *self.model.layers[: self.config.exit_layer]]
        base += [self.exit_norm, self.lm_head]  # type: ignore[attr-defined]
        dtype = self.model.embed_tokens.weight.dtype
        return torch.cat([_spread(tensor).to(dtype) for part in base for tensor in part.state_dict().values()])

    def _require_merged(self) -> None:
        if any("base_layer" in name for name, _ in self.named_modules()):  # type: ignore[attr-defined]
            raise ValueError("an adapter of peft lies on the model; merge_and_unload it first")

    @torch.no_grad()
    def save_block(self, folder: str | Path) -> None:
        """Writes the active block into a folder, which is made: what it adds to the base, and none of the base.

        Args:
            folder: for `load_block`, and for `LegoForCausalLM.from_block` with the base's folder.

        Raises:
            ValueError: an adapter lies on the model.
        """
        self._require_merged()
        block, tensors = self._block(), {"base_sample": self._known_by()}
        for number, layer in enumerate(block.layers):
            for name, tensor in layer.state_dict().items():
                before = self._repeated(number, name, self.config)
                tensors |= stored(f"layers.{number}.{name}", tensor.cpu(), before)
        for part, module in {"norm": block.norm, **block.parts}.items():
            if module is not None:
                tensors |= {f"{part}.{name}": tensor.cpu() for name, tensor in module.state_dict().items()}
        write_block(Path(folder), tensors, self.config)

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
            ValueError: the name is taken, an adapter lies on the model, the folder holds no block or a damaged one, or
                it is one of another base.
        """
        if name in self.blocks:
            raise ValueError(f"there is a block {name} already; delete it first, or choose another name")
        self._require_merged()
        self._take(*read_block(Path(folder)), Path(folder), name)

    def _take(self, config: LegoConfig, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
        """Keeps a block that was read from a folder, if it is one of this base."""
        require_base(config, self.config, folder)
        if not same_base(tensors.pop("base_sample"), self._known_by()):
            raise ValueError(f"{folder}: is a block of another base, whose weights differ; give that base")
        with torch.device("meta"):  # of all the model only the block gets memory
            made = type(self)(config)  # type: ignore[call-arg]
        block = made._block()
        self._fill(block, tensors, config, folder / BLOCK)
        self._others()[name] = block

    def _fill(self, block: Block, tensors: dict[str, Tensor], config: LegoConfig, file: Path) -> None:
        """Gives a block's modules their weights, from its tensors and its own configuration."""
        modules = {f"layers.{number}": layer for number, layer in enumerate(block.layers)} | {"norm": block.norm}
        modules |= {name: part for name, part in block.parts.items() if part is not None}
        left = set(tensors)
        for prefix, module in modules.items():
            state = {}
            for name, shape in ((name, tensor.shape) for name, tensor in module.state_dict().items()):
                key = f"{prefix}.{name}"
                if f"{key}.up" in tensors and f"{key}.down" in tensors:
                    before = self._repeated(int(prefix.rpartition(".")[2]), name, config)
                    if before is not None:
                        change = tensors[f"{key}.up"] @ tensors[f"{key}.down"]
                        state[name] = (before.float() + change).to(before.dtype)
                elif key in tensors:
                    state[name] = tensors[key]
                if name not in state or state[name].shape != shape:
                    raise ValueError(
                        f"{file}: lacks {key} as its configuration has it; take it from where it was saved"
                    )
                left -= {key, f"{key}.up", f"{key}.down"}
            module.load_state_dict(state, assign=True)
        if left:
            raise ValueError(f"{file}: has {sorted(left)[0]}, which its configuration does not know")

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
        config, tensors = read_block(Path(folder))
        given = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **kwargs)
        require_base(config, given.config, folder)
        alone = {"num_hidden_layers": config.exit_layer, "branch_layer": None, "own_head": False, "gated": False}
        fields = config.to_dict() | alone | {"exit_criterion": "max_prob", "exit_threshold": 0.0}
        shown = LegoConfig.from_dict(fields)
        shown._attn_implementation = given.config._attn_implementation
        with torch.device("meta"):
            model = cls(shown)  # type: ignore[call-arg]
        weights = given.state_dict()
        weights["exit_norm.weight"] = weights["model.norm.weight"]
        model.load_state_dict(weights, assign=True)  # type: ignore[attr-defined]
        model.model.rotary_emb = given.model.rotary_emb
        model.tie_weights()  # type: ignore[attr-defined]
        model.generation_config = given.generation_config  # type: ignore[attr-defined]
        model._take(config, tensors, Path(folder), "block")
        model.set_block("block")
        model.delete_block(FIRST)
        return model.eval()  # type: ignore[attr-defined]


def require_base(config: LegoConfig, base: Any, folder: str | Path) -> None:
    """Refuses a block whose base has other sizes.

    Args:
        config: of the block.
        base: configuration of a routed model on that base, or of a Llama, all of whose layers are the base.
        folder: of the block, for the sentence.

    Raises:
        ValueError: they differ, or it is no Llama.
    """
    if base.model_type not in ("llama", "mistral", "lego"):
        raise ValueError(f"{folder}: is a block of a Llama, and the base is of model_type {base.model_type}")
    sizes = {name: getattr(base, name, None) for name in OF_BASE}
    if base.model_type != "lego":
        sizes["exit_layer"] = base.num_hidden_layers
    for name, have in sizes.items():
        if (had := getattr(config, name)) != have:
            raise ValueError(f"{folder}: is a block of a base with {name} {had}, this one has {have}; give that base")


def same_base(sample: Tensor, mine: Tensor) -> bool:
    """Whether two bases have the same weights, by values (n,) of them: the coarser type decides what can differ."""
    if sample.shape != mine.shape:
        return False
    coarse = max(sample.dtype, mine.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    apart = (sample.float() - mine.float()).abs()
    least = torch.finfo(torch.float16).tiny if sample.dtype != mine.dtype else 0.0
    within = 0.0 if sample.dtype == mine.dtype else torch.finfo(coarse).eps
    return bool((apart <= within * sample.float().abs() + least).all())


def _spread(tensor: Tensor) -> Tensor:
    """SAMPLED values (n,) of a weight, from all over it, on the CPU."""
    flat = tensor.detach().flatten()
    count = min(SAMPLED, flat.numel())
    places = torch.arange(count) * (flat.numel() - 1) // max(1, count - 1)
    return flat[places.to(flat.device)].cpu()
