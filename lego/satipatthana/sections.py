"""The whole of stages/satipatthana/params.yaml, how its sections fit together, and the profiles that change them.

python -m lego.satipatthana.sections            checks the file and says what is wrong with it
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lego.base.parameter_files import read_params
from lego.base.profiles import Sibling
from lego.base.sections import Count, NonNegative, Positive, Section, at_least
from lego.satipatthana.settings import (
    AdapterParams,
    AugmenterParams,
    HeadsParams,
    PathsParams,
    RejectParams,
    SamathaParams,
    SatiParams,
    Stage1Params,
    Stage2Params,
    StageParams,
    SystemParams,
    TaskParams,
    TestParams,
    VicaraParams,
    VipassanaParams,
    VitakkaParams,
    VoidParams,
)

PARAMS, PROFILES = Path("stages/satipatthana/params.yaml"), Path("stages/satipatthana/profiles.yaml")
SAME = {  # kinds of void and of test that are one kind, however they are called
    "gaussian": ("gaussian", "gauss_matched", "noisy_0.5"),
    "uniform": ("uniform",),
    "filtered_uniform": ("filtered_uniform", "uniform"),
    "patch_permutation": ("patch_permutation", "pixel_perm"),
}
PeerName = Literal[
    "msp",
    "energy",
    "knn",
    "input_knn",
    "mahalanobis",
    "ensemble",
    "temperature",
    "outlier_exposure",
    "isolation_forest",
]


class PeersParams(Section):
    """How the plain networks train that one-line scores read, and their number in an ensemble."""

    names: Annotated[list[PeerName], Field(min_length=1)]
    hidden: Count
    dim: Count
    epochs: Count
    lr: Positive
    batch_size: Annotated[int, at_least(2, 10**6)]
    members: Annotated[int, at_least(2, 100)]
    neighbours: Count
    exposure: NonNegative

    @model_validator(mode="after")
    def _each_once(self) -> PeersParams:
        if len(set(self.names)) < len(self.names):
            raise ValueError("names must have each peer once")
        return self


class AblationsParams(Section):
    """What parts of the system are worth: seeds of them, and how their heads are trained."""

    seeds: Count
    batches: Count
    epochs: Count
    lr: Positive


class TasksParams(Section):
    """Other data and jobs, each a profile, and how many seeds of each."""

    names: Annotated[list[str], Field(min_length=1)]
    seeds: Count


class BridgeParams(Section):
    """Trust as an exit criterion of ASHEM: tokens it learns from and is looked at with, and how often."""

    rows: Annotated[int, at_least(64)]
    seeds: Count


class SatipatthanaParams(Section):
    """The whole of stages/satipatthana/params.yaml."""

    seed: Annotated[int, at_least(0, 2**63 - 1)]
    seeds: Count
    threads: Annotated[int, at_least(1, 4096)]
    workers: Annotated[int, at_least(1, 256)]
    task: TaskParams
    system: SystemParams
    adapter: AdapterParams
    augmenter: AugmenterParams
    vitakka: VitakkaParams
    vicara: VicaraParams
    sati: SatiParams
    samatha: SamathaParams
    vipassana: VipassanaParams
    heads: HeadsParams
    stage0: StageParams
    stage1: Stage1Params
    stage2: Stage2Params
    stage3: StageParams
    paths: PathsParams
    void: VoidParams
    test: TestParams
    reject: RejectParams
    peers: PeersParams
    ablations: AblationsParams
    tasks: TasksParams
    bridge: BridgeParams

    @property
    def rows_apart(self) -> bool:
        """Whether nothing that happens to a row depends on the rows beside it."""
        return self.sati.per_sample and self.samatha.drunk_per_sample and self.augmenter.per_sample

    @model_validator(mode="after")
    def _fits_together(self) -> SatipatthanaParams:
        if self.paths.augmented and self.augmenter.kind == "identity":
            raise ValueError("augmenter.kind must not be identity when paths.augmented is above 0: its rows are clean")
        alike = [
            f"{void} and {test}"
            for void in self.void.kinds
            for test in self.test.kinds
            if test in SAME.get(void, (void,))
        ]
        if alike:
            raise ValueError(f"void.kinds must not be of a kind that test.kinds holds back, as are {', '.join(alike)}")
        if self.system.guided and not self.stage1.weight_guidance:
            raise ValueError(
                "stage1.weight_guidance must be above 0 when system.guided is true, which asks for a guide"
            )
        if self.stage2.batch_size < len(self.paths.shares()):
            raise ValueError(
                f"stage2.batch_size must be at least the number of paths, {len(self.paths.shares())}, "
                f"got {self.stage2.batch_size}"
            )
        if not self.test.kinds and not self.task.anomalies:
            raise ValueError("test.kinds must name at least one kind unless task.anomalies does")
        if self.task.job == "anomaly" and self.stage2.correctness:
            raise ValueError(
                "stage2.correctness must be false when task.job is anomaly: there is no answer to be right"
            )
        if self.task.job == "anomaly" and self.reject.rule == "risk":
            raise ValueError("reject.rule must not be risk when task.job is anomaly: validation has no known mistakes")
        if ("anomalies" in self.void.kinds) > bool(self.task.known):
            raise ValueError("void.kinds must not have anomalies unless task.known names some")
        if ("file" in self.void.kinds) != bool(self.task.strangers):
            raise ValueError("task.strangers must name a CSV or Parquet file if void.kinds has file, and only then")
        if self.task.known and not self.system.guided and "anomalies" not in self.void.kinds:
            raise ValueError("task.known must be empty unless system.guided is true or void.kinds has anomalies")
        if self.sati.min_steps > self.samatha.max_steps:
            raise ValueError(
                f"sati.min_steps must be at most samatha.max_steps, {self.samatha.max_steps}, got {self.sati.min_steps}"
            )
        if self.ablations.seeds > self.seeds:
            raise ValueError(f"ablations.seeds must be at most seeds, {self.seeds}, got {self.ablations.seeds}")
        return self


def load(path: str | Path = PARAMS) -> SatipatthanaParams:
    """The parameters of the Satipatthana pipeline.

    Raises:
        ParamsError: unreadable file, unknown or missing key, wrong type or range; the message names file and key.
    """
    return read_params(path, SatipatthanaParams)


SIBLING = Sibling(load, PARAMS, PROFILES)
profiles, with_profile, changed, main = SIBLING.profiles, SIBLING.with_profile, SIBLING.changed, SIBLING.main


if __name__ == "__main__":
    raise SystemExit(main())
