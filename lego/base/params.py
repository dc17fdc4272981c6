"""The parameters of the root pipeline, params.yaml.

python -m lego.params            checks params.yaml and says what is wrong with it
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from lego.base.ashem_sections import (
    AshemParams,
    BaselinesParams,
    EvaluationParams,
    ExitsParams,
    RoutingParams,
    SearchParams,
    YardstickParams,
)
from lego.base.parameter_files import ParamsError, check, read_params
from lego.base.sections import DataParams, ModelParams, Section, TrainParams, pretrained_tokenizer


class Params(Section):
    """The whole of params.yaml, one attribute per section."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    data: DataParams
    model: ModelParams
    train: TrainParams
    ashem: AshemParams
    exits: ExitsParams
    yardstick: YardstickParams
    routing: RoutingParams
    evaluation: EvaluationParams
    search: SearchParams
    baselines: BaselinesParams

    @model_validator(mode="after")
    def _given_or_trained(self) -> Params:
        if self.data.tokenizer == "pretrained" and not pretrained_tokenizer(self.data, self.model.init_from):
            raise ValueError("data.pretrained must name a tokenizer or its folder when data.tokenizer is pretrained")
        if not self.ashem.phase1_epochs and not self.model.init_from:
            raise ValueError(
                "ashem.phase1_epochs must be at least 1 unless model.init_from names a trained model, got 0"
            )
        depth, dim = self._block1()
        try:
            if depth is not None:
                self.ashem.branch_of(depth)
                self.ashem.require_block2(depth)
            if dim is not None:
                self.ashem.rank_of(dim)
        except ParamsError as error:
            raise ValueError(str(error).removeprefix("params.yaml: ")) from None
        return self

    def _block1(self) -> tuple[int | None, int | None]:
        """Depth and width of block 1; None where the given model is in no folder here: its stage will say."""
        depth: int | None = self.ashem.phase1_layers
        if self.model.init_from is None:
            return depth, self.model.dim
        found: tuple[int | None, int | None] = None, None
        with suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((Path(self.model.init_from) / "config.json").read_text(encoding="utf-8"))
            found = int(config["num_hidden_layers"]), int(config["hidden_size"])
        return (depth if self.model.init_layers == "phase1_layers" else found[0]), found[1]


def load_params(path: str | Path = "params.yaml") -> Params:
    """The parameters of the root pipeline; see `read_params`."""
    return read_params(path, Params)


def main() -> int:
    return check(load_params)
