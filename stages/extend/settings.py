"""The settings of stages/extend: which model is extended, by which blocks, and what users would do instead.

python -m stages.extend.settings            checks extend.yaml and says what is wrong with it
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from lego.base.artifacts import write_text
from lego.base.parameter_files import ParamsError, check, read_params
from lego.base.params import Params
from lego.base.profiles import changed
from lego.base.sections import Count, CountOrZero, Positive, Section

FILE = Path(__file__).with_name("extend.yaml")
STAGES = (  # whose times, memory and metrics lie beside those of rivals and blocks
    *("base", "retention", "evaluate", "report", "default", "tokenize", "train_phase1", "compute_threshold"),
    *("collect_hard", "train_phase2", "route"),
)
OF_BASE = ("data", "model", "yardstick", "baselines", "ashem.phase1_", "ashem.phase2_share", "ashem.phase2_split")
"""Keys under `root` that begin so decide what is the same for all blocks."""


class BaseParams(Section):
    source: str = Field(alias="from")


class RetentionParams(Section):
    path: str
    tokens: Count


class RivalParams(Section):
    """A way to train the given model further."""

    trains: Literal["all", "lora", "last_layers", "new_layers"]
    size: Count | None
    equal: Literal["macs", "seconds"]
    lr: Positive

    @model_validator(mode="after")
    def _sized(self) -> RivalParams:
        if (self.size is None) != (self.trains == "all"):
            raise ValueError(f"size must be {'null' if self.trains == 'all' else 'given'} when trains is {self.trains}")
        return self


class Settings(Section):
    """The whole of extend.yaml."""

    base: BaseParams
    retention: RetentionParams
    rivals: dict[str, RivalParams]
    blocks: dict[str, dict[str, Any]]
    latency_repeats: CountOrZero
    root: Params

    @model_validator(mode="after")
    def _named(self) -> Settings:
        if not self.rivals:
            raise ValueError("rivals must name at least one, got none")
        for section, names in (("rivals", self.rivals), ("blocks", self.blocks)):
            for name in names:
                if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or name in STAGES:
                    raise ValueError(
                        f"{section} must have names of letters a-z, digits and _, at most 64 and none a stage's, "
                        f"got {name!r}"
                    )
        if both := sorted(set(self.rivals) & set(self.blocks)):
            raise ValueError(f"blocks and rivals must have different names, both have {both[0]!r}")
        return self

    def of_block(self, name: str) -> Params:
        """What the root's stages read for another block on the same base.

        Raises:
            ParamsError: it changes what all blocks share, or to what is not valid.
        """
        changes = by_key(self.blocks[name])
        shared = OF_BASE + (("seed",) if self.root.ashem.phase1_epochs else ())  # which divides the text of two phases
        for key in changes:
            if key.startswith(shared):
                raise ParamsError(
                    f"extend.yaml: blocks.{name}: {key} decides what all blocks share; change it under root instead"
                )
        return changed(self.root, changes, f"extend.yaml: blocks.{name}", "extend.yaml's root")


def by_key(changes: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Values by key, written as section.key, of what may be nested, as `dvc exp run -S` makes it."""
    found: dict[str, Any] = {}
    for key, value in changes.items():
        found |= by_key(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return found


def load_settings(path: str | Path = "extend.yaml") -> Settings:
    """The settings; see `read_params` and `Settings.of_block`."""
    settings = read_params(path, Settings)
    for name in settings.blocks:
        settings.of_block(name)
    return settings


def write_params(settings: Settings, path: str | Path = "params.yaml") -> None:
    """Writes what the root's stages read, into the folder that they run in."""
    values = yaml.safe_dump(settings.root.model_dump(), sort_keys=False)
    write_text(path, f"# Made from `root` of extend.yaml whenever a stage runs here; change it there.\n{values}")


if __name__ == "__main__":
    raise SystemExit(check(lambda: load_settings(FILE)))
