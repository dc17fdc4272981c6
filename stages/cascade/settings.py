"""The blocks of stages/cascade/params.yaml, and the model that a block stands on.

python -m stages.cascade.settings           checks the file and says what is wrong with it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lego.base.artifacts import read_checked, read_number
from lego.base.harness import StageError
from lego.base.parameter_files import check, read_params
from lego.base.sections import Count, CountOrZero, Positive, Section, Share, at_least
from lego.model.checkpoint import load_model
from lego.model.transformer import BaseTransformer

FILE = Path("stages/cascade/params.yaml")
ROOT, OWN = "phase2", "cascade/"
FACTS = "data/facts/compute_threshold.json"


class BlockParams(Section):
    """One block above block 2."""

    below: str = Field(alias="from")
    repeats: CountOrZero
    layers: CountOrZero
    branch: Literal["full", "lora"]
    branch_rank: Annotated[int, at_least(1, 2**12)]
    init_new_layers: Literal["copy", "zero", "random"]
    hard_example_ratio: Share
    lr: Positive
    epochs: Count
    patience: Count

    @property
    def rank(self) -> int:
        return self.branch_rank if self.branch == "lora" else 0

    @model_validator(mode="after")
    def _trains(self) -> BlockParams:
        if not self.repeats and (not self.layers or self.branch == "lora"):
            lacks = "branch lora needs one" if self.layers else "layers adds none"
            raise ValueError(f"repeats 0 repeats no layer, and {lacks}; raise it")
        return self


class CascadeParams(Section):
    """The whole of stages/cascade/params.yaml."""

    blocks: dict[str, BlockParams]

    @model_validator(mode="after")
    def _chained(self) -> CascadeParams:
        if not self.blocks:
            raise ValueError("blocks must name at least one, got none")
        for name, block in self.blocks.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
                raise ValueError(f"blocks must have names of letters a-z, digits and _, at most 64, got {name!r}")
            self._chain(name, block)
        return self

    def _chain(self, name: str, block: BlockParams) -> None:
        """Raises ValueError where a block does not stand on block 2 in the end."""
        passed = [name]
        while block.below != ROOT:
            below = block.below.removeprefix(OWN)
            if not block.below.startswith(OWN) or below not in self.blocks:
                known = ", ".join([ROOT, *(f"{OWN}{one}" for one in self.blocks if one != passed[-1])])
                raise ValueError(f"blocks.{passed[-1]}.from must be one of {known}, got {block.below!r}")
            if below in passed:
                raise ValueError(f"blocks.{name}.from goes in a circle: {' on '.join([*passed, below])}")
            passed.append(below)
            block = self.blocks[below]


def load_blocks() -> CascadeParams:
    """The parameters of this pipeline; see `read_params`."""
    return read_params(FILE, CascadeParams)


def block_of(name: str) -> BlockParams:
    """The parameters of a block.

    Raises:
        StageError: there is none of this name.
    """
    blocks = load_blocks().blocks
    if name not in blocks:
        raise StageError(f"{FILE}: blocks must have {name!r}, it has {', '.join(blocks)}")
    return blocks[name]


@dataclass(frozen=True)
class Mined:
    """What mining decided at each exit but the last: the share that goes on, and the threshold that makes it so."""

    ratios: list[float]
    thresholds: list[float]


class _Mined(BaseModel):
    model_config = ConfigDict(strict=True)
    ratios: list[Annotated[float, Field(gt=0, lt=1)]]
    thresholds: list[Annotated[float, Field(ge=0, le=1)]]


def stands_on(below: str) -> tuple[BaseTransformer, Mined]:
    """The model that a block stands on, and what mining decided at its exits.

    Raises:
        ArtifactError: a file is missing or damaged.
        StageError: a further block cannot stand on block 2 as it is.
    """
    model = load_model(f"data/{below}")
    if not model.blocks or model.block2_context != "sequence":
        raise StageError("params.yaml: ashem.phase2_context must be sequence for blocks above block 2")
    if below == ROOT:
        found = (read_number(FACTS, key, high=1.0) for key in ("hard_example_ratio", "threshold"))
        return model, Mined(*([number] for number in found))
    return model, Mined(**read_checked(f"data/{below}/mined.json", _Mined))


def main() -> int:
    return check(load_blocks)


if __name__ == "__main__":
    raise SystemExit(main())
