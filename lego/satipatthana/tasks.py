"""Data to learn and to be judged on: real ones that come with scikit-learn, generated windows, tables of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor

from lego.artifacts import read_json, read_tensors, write_json, write_tensors
from lego.harness import StageError
from lego.satipatthana.sections import PARAMS, TaskParams, TestParams

SYNTHETIC = ("gauss_matched", "uniform", "pixel_perm", "inverted", "noisy_0.5")
FAULTS = ("stuck", "drift", "spikes", "swapped")
NEAR = (8, 9)  # digits that are held back as near-OOD (specification, section 11)


class TaskError(StageError):
    """Data that cannot be used; the message names file, column and row."""


@dataclass(frozen=True)
class Split:
    """Inputs (n, *shape), classes (n,), and the trust (n,) that each deserves where the task itself knows it."""

    x: Tensor
    y: Tensor
    deserved: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Task:
    """Train, validation and test, sets from outside by kind, and how inputs are called and scaled."""

    train: Split
    validation: Split
    test: Split
    outside: dict[str, Tensor]
    classes: list[str]
    columns: list[str] = field(default_factory=list)
    mean: Tensor | None = None
    std: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.x.shape[1:])


def load(settings: TaskParams, test: TestParams) -> Task:
    """The task that params.yaml names, split as the specification says.

    Raises:
        TaskError: a table that cannot be used.
    """
    known = FAULTS if settings.name == "sensors" else (*SYNTHETIC, *(("near",) if settings.name == "digits" else ()))
    if unknown := [kind for kind in test.kinds if kind not in known]:
        raise TaskError(
            f"{PARAMS}: test.kinds has {', '.join(unknown)}, which the task {settings.name} cannot make; it has "
            f"{', '.join(known)}"
        )
    match settings.name:
        case "digits":
            return _digits(settings, test)
        case "breast_cancer" | "wine":
            bunch = load_breast_cancer() if settings.name == "breast_cancer" else load_wine()
            classes = [str(one) for one in bunch.target_names]
            return _table(bunch.data, bunch.target, classes, [str(one) for one in bunch.feature_names], settings, test)
        case "sensors":
            return _sensors(settings, test)
        case _:
            frame = read_table(Path(settings.file or ""))
            x, y, classes = labelled(frame, settings.label or "", str(settings.file))
            return _table(x.to_numpy(), y, classes, list(x.columns), settings, test)


def splits(x: np.ndarray, y: np.ndarray, settings: TaskParams) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Test, then validation out of the rest, stratified, seed 0 (section 11)."""
    rest_x, test_x, rest_y, test_y = train_test_split(x, y, test_size=settings.test_share, random_state=0, stratify=y)
    train_x, val_x, train_y, val_y = train_test_split(
        rest_x, rest_y, test_size=settings.validation_share, random_state=0, stratify=rest_y
    )
    return {"train": (train_x, train_y), "validation": (val_x, val_y), "test": (test_x, test_y)}


def _digits(settings: TaskParams, test: TestParams) -> Task:
    bunch = load_digits()
    x, y = (bunch.data / 8 - 1).astype(np.float32), bunch.target
    near = np.isin(y, NEAR)
    parts = splits(x[~near], y[~near], settings)
    outside = outside_sets(parts["train"][0], parts["test"][0], test)
    if "near" in test.kinds:
        outside = {"near": torch.from_numpy(x[near])} | outside
    classes = [str(one) for one in range(10) if one not in NEAR]
    return _task(_tensors(parts), outside, classes, [f"pixel_{n}" for n in range(x.shape[1])])


def outside_sets(train: np.ndarray, held_out: np.ndarray, test: TestParams) -> dict[str, Tensor]:
    """Sets of as many rows as the test split, from one generator in the order that params.yaml lists them.

    gauss_matched has the train inputs' mean and deviation, uniform their range; pixel_perm, inverted and noisy_0.5 are
    test inputs with features in one other order, with their sign changed, and with noise of half a unit.
    """
    random = np.random.default_rng(test.ood_seed)
    shape, found = held_out.shape, dict[str, np.ndarray]()
    for kind in test.kinds:
        match kind:
            case "gauss_matched":
                found[kind] = random.normal(train.mean(), train.std(), shape)
            case "uniform":
                found[kind] = random.uniform(train.min(), train.max(), shape)
            case "pixel_perm":
                flat = held_out.reshape(len(held_out), -1)
                found[kind] = flat[:, random.permutation(flat.shape[1])].reshape(shape)
            case "inverted":
                found[kind] = -held_out
            case "noisy_0.5":
                found[kind] = held_out + random.normal(0, 0.5, shape)
            case _:
                continue
    return {kind: torch.from_numpy(rows.astype(np.float32)) for kind, rows in found.items()}


def _tensors(parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Split]:
    return {
        name: Split(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), torch.from_numpy(y.astype(np.int64)))
        for name, (x, y) in parts.items()
    }


def _table(
    x: np.ndarray, y: np.ndarray, classes: list[str], columns: list[str], settings: TaskParams, test: TestParams
) -> Task:
    """Columns standardized by train rows."""
    parts = splits(x.astype(np.float64), y, settings)
    mean, std = parts["train"][0].mean(axis=0), parts["train"][0].std(axis=0)
    std[std == 0] = 1
    scaled = _tensors({name: ((rows - mean) / std, labels) for name, (rows, labels) in parts.items()})
    outside = outside_sets(scaled["train"].x.numpy(), scaled["test"].x.numpy(), test)
    return _task(scaled, outside, classes, columns, torch.from_numpy(mean), torch.from_numpy(std))


def _task(
    parts: dict[str, Split],
    outside: dict[str, Tensor],
    classes: list[str],
    columns: list[str],
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Task:
    return Task(parts["train"], parts["validation"], parts["test"], outside, classes, columns, mean, std)


def read_table(file: Path) -> pd.DataFrame:
    """A CSV or Parquet file.

    Raises:
        TaskError: it cannot be read.
    """
    try:
        return pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise TaskError(f"{file}: cannot be read as {file.suffix or 'CSV'} ({' '.join(str(error).split())})") from None


def features_of(frame: pd.DataFrame, columns: list[str], name: str) -> np.ndarray:
    """The named columns (n, features).

    Raises:
        TaskError: a column is missing, not numeric, or has a missing or infinite value.
    """
    if missing := [column for column in columns if column not in frame]:
        raise TaskError(f"{name}: has no column {', '.join(missing[:3])}; the model was trained with {len(columns)}")
    chosen = frame[columns]
    for column in columns:
        if not pd.api.types.is_numeric_dtype(chosen[column]):
            raise TaskError(f"{name}: column {column} is not numeric")
    values = chosen.to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise TaskError(
            f"{name}: row {row}, column {columns[column]} is not a finite number; fill it or leave the row out"
        )
    return values


def labelled(frame: pd.DataFrame, label: str, name: str) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Features, classes (n,) and their names.

    Raises:
        TaskError: there is no such column, or a class has fewer than four rows.
    """
    if label not in frame:
        raise TaskError(
            f"{name}: has no column {label}; task.label must name one of {', '.join(map(str, frame.columns))}"
        )
    x = frame.drop(columns=label)
    features_of(x, list(x.columns), name)
    codes, values = pd.factorize(frame[label], sort=True)
    if (codes < 0).any():
        raise TaskError(f"{name}: column {label} has a missing value in row {int(np.argmax(codes < 0))}")
    counts = np.bincount(codes)
    if len(counts) < 2 or counts.min() < 4:
        raise TaskError(f"{name}: column {label} needs at least two classes of four rows each")
    return x, codes, [str(value) for value in values]


def _sensors(settings: TaskParams, test: TestParams) -> Task:
    """Windows (30 steps, 4 channels) of three ways of running a machine; faults are sets from outside.

    Each way has its own frequency, phase and coupling of channels, with measurement noise. Faults that are injected
    into test windows: a sensor that sticks, one that drifts, spikes, and two that are swapped.
    """
    random = np.random.default_rng(0)
    windows, kinds = [], []
    for way in range(3):
        for _ in range(400):
            windows.append(_window(random, way))
            kinds.append(way)
    x, y = np.stack(windows), np.array(kinds)
    parts = splits(x, y, settings)
    held_out, found = parts["test"][0], dict[str, np.ndarray]()
    random = np.random.default_rng(test.ood_seed)
    for kind in test.kinds:
        faulty = held_out.copy()
        rows, channel = np.arange(len(faulty)), random.integers(4, size=len(faulty))
        match kind:
            case "stuck":
                faulty[rows, 10:, channel] = faulty[rows, 10, channel][:, None]
            case "drift":
                faulty[rows, :, channel] += np.linspace(0, 2, 30)[None]
            case "spikes":
                for row, place in zip(rows, channel, strict=True):
                    faulty[row, random.integers(30, size=3), place] += random.choice([-3, 3], size=3)
            case "swapped":
                faulty[rows, :, channel] = held_out[rows, :, (channel + 1) % 4]
                faulty[rows, :, (channel + 1) % 4] = held_out[rows, :, channel]
            case _:
                continue
        found[kind] = faulty
    outside = {kind: torch.from_numpy(rows.astype(np.float32)) for kind, rows in found.items()}
    return _task(_tensors(parts), outside, ["idle", "cruise", "load"], [])


def _window(random: np.random.Generator, way: int) -> np.ndarray:
    """One window (30, 4) in a way of running."""
    time, speed = np.arange(30), (0.15, 0.35, 0.6)[way] * random.normal(1, 0.05)
    phase = random.uniform(0, 2 * np.pi)
    main = np.sin(speed * time + phase)
    follows = np.sin(speed * time + phase - 0.5)
    load = (0.2, 0.6, 1.0)[way] * main**2
    heat = np.cumsum(load) / 15
    return np.stack([main, follows, load, heat], axis=1) + random.normal(0, 0.05, (30, 4))


def write_task(task: Task, folder: Path) -> None:
    """Writes a task into an existing folder."""
    for name in ("train", "validation", "test"):
        split: Split = getattr(task, name)
        write_tensors(folder / f"{name}.safetensors", {"x": split.x.contiguous(), "y": split.y.contiguous()})
    if task.outside:
        write_tensors(folder / "outside.safetensors", {kind: rows.contiguous() for kind, rows in task.outside.items()})
    scale = {"mean": task.mean, "std": task.std}
    facts = {name: [] if one is None else one.tolist() for name, one in scale.items()}
    write_json(
        folder / "task.json", facts | {"classes": task.classes, "columns": task.columns, "outside": list(task.outside)}
    )


def read_task(folder: str | Path) -> Task:
    """The task that `write_task` wrote.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    folder = Path(folder)
    facts = read_json(folder / "task.json", "classes", "columns", "mean", "std", "outside")
    parts = {}
    for name in ("train", "validation", "test"):
        tensors = read_tensors(folder / f"{name}.safetensors")
        parts[name] = Split(tensors["x"], tensors["y"])
    rows = read_tensors(folder / "outside.safetensors") if facts["outside"] else {}
    outside = {kind: rows[kind] for kind in facts["outside"]}
    scale = (torch.tensor(facts[name], dtype=torch.double) if facts[name] else None for name in ("mean", "std"))
    return _task(parts, outside, facts["classes"], facts["columns"], *scale)
