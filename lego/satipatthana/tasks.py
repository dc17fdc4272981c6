"""Data to learn and to be judged on: real ones that come with scikit-learn, generated windows, tables of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor

from lego.base.artifacts import read_json, read_tensors, write_json, write_tensors
from lego.satipatthana.made import FAULTS, SYNTHETIC, WAYS, faults, outside_sets, windows
from lego.satipatthana.sections import PARAMS
from lego.satipatthana.settings import Job, TaskParams, TestParams
from lego.satipatthana.tables import TaskError, features_of, labelled, read_table

NEAR = (8, 9)  # digits that are held back as near-OOD (specification, section 11)
UNSCALED = ("digits", "sensors")  # their features are of one unit


@dataclass(frozen=True)
class Split:
    """Inputs (n, *shape), answers (n,): classes, or numbers of a regression, and the trust (n,) that each row deserves
    where the task itself knows it."""

    x: Tensor
    y: Tensor
    deserved: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Task:
    """Train, validation and test, sets from outside by kind, and how inputs are called and scaled.

    Args:
        train, validation, test: rows.
        outside: inputs by kind.
        classes: names of the classes, or of the number that is asked for.
        columns: names of the features, if inputs are rows of a table.
        mean, std: by which its columns were standardized.
        known: anomalies (k, *shape) that training is shown, in the job anomaly.
        answer: mean and deviation by which the answers of a regression were standardized.
        strangers: rows (k, *shape) of another dataset, which training is shown as void.
        names: of all classes of the data, in the job anomaly.
    """

    train: Split
    validation: Split
    test: Split
    outside: dict[str, Tensor]
    classes: list[str]
    columns: list[str] = field(default_factory=list)
    mean: Tensor | None = None
    std: Tensor | None = None
    known: Tensor | None = None
    answer: tuple[float, float] = (0.0, 1.0)
    strangers: Tensor | None = None
    names: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.x.shape[1:])


def load(settings: TaskParams, test: TestParams) -> Task:
    """The task that params.yaml names, split as the specification says.

    Raises:
        TaskError: a table that cannot be used, or kinds and classes that the task does not have.
    """
    near = settings.name == "digits" and settings.job == "classification"
    known = FAULTS if settings.name == "sensors" else (*SYNTHETIC, *(("near",) if near else ()))
    if unknown := [kind for kind in test.kinds if kind not in known]:
        raise TaskError(
            f"{PARAMS}: test.kinds has {', '.join(unknown)}, which the task {settings.name} cannot make; it has "
            f"{', '.join(known)}"
        )
    x, y, classes, columns = _rows(settings)
    odd = np.isin(y, NEAR) if near else np.zeros(len(y), dtype=bool)
    parts = splits(x[~odd], y[~odd], settings)
    outside: dict[str, np.ndarray] = {"near": x[odd]} if near and "near" in test.kinds else {}
    shown: np.ndarray | None = None
    names: list[str] = []
    if settings.job == "anomaly":
        parts, shown, outside = normal_rows(parts, classes, settings)
        classes, names = ["normal", "anomaly"], classes
    elif near:
        classes = [name for number, name in enumerate(classes) if number not in NEAR]
    center, scale = _scale(parts["train"][0], settings, columns)
    answer = (0.0, 1.0)
    if settings.job == "regression":
        answer = (float(parts["train"][1].mean()), float(parts["train"][1].std()) or 1.0)
    made = {
        name: _split((rows - center) / scale, answers, settings.job, answer) for name, (rows, answers) in parts.items()
    }
    held_out = made["test"].x.numpy()
    away = {kind: _float((rows - center) / scale) for kind, rows in outside.items()}
    away |= (
        faults(held_out, test) if settings.name == "sensors" else outside_sets(made["train"].x.numpy(), held_out, test)
    )
    scaled = settings.name not in UNSCALED
    return Task(
        made["train"],
        made["validation"],
        made["test"],
        away,
        classes,
        columns,
        torch.from_numpy(center) if scaled else None,
        torch.from_numpy(scale) if scaled else None,
        None if shown is None or not len(shown) else _float((shown - center) / scale),
        answer,
        None if settings.strangers is None else _float((_strangers(settings.strangers, columns) - center) / scale),
        names,
    )


def _strangers(file: str, columns: list[str]) -> np.ndarray:
    """Rows (k, features) of another dataset.

    Raises:
        TaskError: they cannot be read, lack a column, or the task is no table.
    """
    if not columns:
        raise TaskError(f"{PARAMS}: task.strangers is a table, but the inputs of this task are none; leave it null")
    return features_of(read_table(Path(file), columns), columns, file)


def _rows(settings: TaskParams) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Inputs (n, *shape), answers (n,), names of the classes and of the columns."""
    match settings.name:
        case "digits":
            bunch = load_digits()
            columns = [f"pixel_{n}" for n in range(bunch.data.shape[1])]
            return bunch.data / 8 - 1, bunch.target, [str(one) for one in range(10)], columns
        case "breast_cancer" | "wine":
            bunch = load_breast_cancer() if settings.name == "breast_cancer" else load_wine()
            classes = [str(one) for one in bunch.target_names]
            return bunch.data, bunch.target, classes, [str(one) for one in bunch.feature_names]
        case "diabetes":
            bunch = load_diabetes()
            return bunch.data, bunch.target, ["progression"], [str(one) for one in bunch.feature_names]
        case "sensors":
            return *windows(), list(WAYS), []
        case _:
            frame, name = read_table(Path(settings.file or "")), str(settings.file)
            x, y, classes = labelled(frame, settings.label or "", name, settings.job == "regression")
            return x.to_numpy(dtype=np.float64), y, classes, list(x.columns)


def splits(x: np.ndarray, y: np.ndarray, settings: TaskParams) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Test, then validation out of the rest, seed 0 (section 11); stratified unless answers are numbers.

    Raises:
        TaskError: too few rows for these shares.
    """

    def parted(x: np.ndarray, y: np.ndarray, share: float) -> tuple[np.ndarray, ...]:
        try:
            found: list[np.ndarray] = train_test_split(
                x, y, test_size=share, random_state=0, stratify=None if settings.job == "regression" else y
            )
        except ValueError as error:
            raise TaskError(
                f"{PARAMS}: {len(y)} rows of {settings.file or settings.name} cannot be split by task.test_share and "
                f"task.validation_share ({error}); give more rows or change the shares"
            ) from None
        return tuple(found)

    rest_x, test_x, rest_y, test_y = parted(x, y, settings.test_share)
    train_x, val_x, train_y, val_y = parted(rest_x, rest_y, settings.validation_share)
    return {"train": (train_x, train_y), "validation": (val_x, val_y), "test": (test_x, test_y)}


def normal_rows(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], classes: list[str], settings: TaskParams
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray, dict[str, np.ndarray]]:
    """The job anomaly: normal rows with the answer 0, known anomalies of train, and those of test by class.

    Train and validation have normal rows alone, unless they are unlabelled; anomalies that are not known are left out.
    Kinds of test begin with `seen_` or `unseen_`, by whether training was shown rows of that class.

    Raises:
        TaskError: an anomaly is no class of the task, or nothing is normal.
    """
    if strange := [name for name in settings.anomalies if name not in classes]:
        raise TaskError(
            f"{PARAMS}: task.anomalies has {', '.join(strange)}, which is no class of {settings.name}; it has "
            f"{', '.join(classes)}"
        )
    if len(settings.anomalies) == len(classes):
        raise TaskError(f"{PARAMS}: task.anomalies has all classes of {settings.name}; leave out what is normal")
    odd, known = ([classes.index(name) for name in names] for names in (settings.anomalies, settings.known))
    found = {}
    for name, (x, y) in parts.items():
        kept = np.ones(len(y), dtype=bool) if settings.unlabelled and name != "test" else ~np.isin(y, odd)
        found[name] = (x[kept], np.zeros(int(kept.sum()), dtype=np.int64))
    (train, of), (test, away) = parts["train"], parts["test"]
    seen = {name: "seen" if name in settings.known or settings.unlabelled else "unseen" for name in settings.anomalies}
    outside = {f"{seen[name]}_{name}": test[away == classes.index(name)] for name in settings.anomalies}
    return found, train[np.isin(of, known)], outside


def _scale(x: np.ndarray, settings: TaskParams, columns: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """What is taken from inputs and what they are divided by, from train rows; tables alone are standardized."""
    if settings.name in UNSCALED:
        return np.zeros(()), np.ones(())
    with np.errstate(over="ignore", invalid="ignore"):
        std = x.std(axis=0)
    if (wide := ~np.isfinite(std)).any():
        raise TaskError(
            f"{settings.file}: column {columns[int(wide.argmax())]} spreads beyond double precision; scale it down"
        )
    std[std == 0] = 1
    return x.mean(axis=0), std


def _float(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _split(x: np.ndarray, y: np.ndarray, job: Job, answer: tuple[float, float]) -> Split:
    numbers = job == "regression"
    return Split(_float(x), _float((y - answer[0]) / answer[1]) if numbers else torch.from_numpy(y.astype(np.int64)))


def write_task(task: Task, folder: Path) -> None:
    """Writes a task into an existing folder."""
    for name in ("train", "validation", "test"):
        split: Split = getattr(task, name)
        write_tensors(folder / f"{name}.safetensors", {"x": split.x.contiguous(), "y": split.y.contiguous()})
    if task.outside:
        write_tensors(folder / "outside.safetensors", {kind: rows.contiguous() for kind, rows in task.outside.items()})
    shown = {"known": task.known, "strangers": task.strangers}
    for name, rows in shown.items():
        if rows is not None:
            write_tensors(folder / f"{name}.safetensors", {"x": rows.contiguous()})
    scale = {"mean": task.mean, "std": task.std}
    facts: dict[str, Any] = {name: [] if one is None else one.tolist() for name, one in scale.items()}
    facts |= {"classes": task.classes, "columns": task.columns, "outside": list(task.outside), "names": task.names}
    facts |= {name: rows is not None for name, rows in shown.items()}
    write_json(folder / "task.json", facts | {"answer": list(task.answer)})


def read_task(folder: str | Path) -> Task:
    """The task that `write_task` wrote.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    folder = Path(folder)
    facts = read_json(
        folder / "task.json", "classes", "columns", "mean", "std", "outside", "known", "answer", "strangers", "names"
    )
    parts = []
    for name in ("train", "validation", "test"):
        tensors = read_tensors(folder / f"{name}.safetensors")
        parts.append(Split(tensors["x"], tensors["y"]))
    rows = read_tensors(folder / "outside.safetensors") if facts["outside"] else {}
    outside = {kind: rows[kind] for kind in facts["outside"]}
    mean, std = (torch.tensor(facts[name], dtype=torch.double) if facts[name] else None for name in ("mean", "std"))
    known, strangers = (
        read_tensors(folder / f"{name}.safetensors")["x"] if facts[name] else None for name in ("known", "strangers")
    )
    mid, spread = facts["answer"]
    train, validation, test = parts
    return Task(
        train,
        validation,
        test,
        outside,
        facts["classes"],
        facts["columns"],
        mean,
        std,
        known,
        (mid, spread),
        strangers,
        facts["names"],
    )
