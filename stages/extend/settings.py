"""The settings of stages/extend: which model is extended, what it should keep, and what users would do instead.

python -m stages.extend.settings            checks extend.yaml and says what is wrong with it
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from lego.base.artifacts import write_text
from lego.base.outside import printable
from lego.base.parameter_files import ParamsError, read_params
from lego.base.params import Params
from lego.base.sections import Count, CountOrZero, Positive, Section

FILE = Path(__file__).with_name("extend.yaml")
STAGES = ("base", "retention", "evaluate", "report")  # whose times lie beside those of rivals


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
    latency_repeats: CountOrZero
    root: Params

    @model_validator(mode="after")
    def _named(self) -> Settings:
        if not self.rivals:
            raise ValueError("rivals must name at least one, got none")
        for name in self.rivals:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in STAGES:
                raise ValueError(f"rivals must have names of letters a-z, digits and _, none a stage's, got {name!r}")
        return self


def load_settings(path: str | Path = "extend.yaml") -> Settings:
    """The settings; see `read_params`."""
    return read_params(path, Settings)


def write_params(settings: Settings, path: str | Path = "params.yaml") -> None:
    """Writes what the root's stages read, into the folder that they run in."""
    values = yaml.safe_dump(settings.root.model_dump(), sort_keys=False)
    write_text(path, f"# Made from `root` of extend.yaml whenever a stage runs here; change it there.\n{values}")


def main() -> int:
    try:
        print(load_settings(FILE).model_dump_json(indent=2))
    except ParamsError as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
