"""Data that are made: inputs from outside of a task by kind, windows of a machine, and faults of its sensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lego.satipatthana.settings import TestParams

SYNTHETIC = ("gauss_matched", "uniform", "pixel_perm", "inverted", "noisy_0.5")
FAULTS = ("stuck", "drift", "spikes", "swapped")
WAYS = ("idle", "cruise", "load")


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


def windows() -> tuple[np.ndarray, np.ndarray]:
    """Windows (n, 30 steps, 4 channels) of three ways of running a machine, and which way (n,).

    Each way has its own frequency, phase and coupling of channels, with measurement noise.
    """
    random = np.random.default_rng(0)
    ways = np.repeat(np.arange(len(WAYS)), 400)
    return np.stack([_window(random, int(way)) for way in ways]), ways


def faults(held_out: np.ndarray, test: TestParams) -> dict[str, Tensor]:
    """Windows (n, 30, 4) with faults: a sensor that sticks, one that drifts, spikes, and two that are swapped."""
    random, found = np.random.default_rng(test.ood_seed), dict[str, np.ndarray]()
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
    return {kind: torch.from_numpy(rows.astype(np.float32)) for kind, rows in found.items()}


def _window(random: np.random.Generator, way: int) -> np.ndarray:
    """One window (30, 4) in a way of running."""
    time, speed = np.arange(30), (0.15, 0.35, 0.6)[way] * random.normal(1, 0.05)
    phase = random.uniform(0, 2 * np.pi)
    main = np.sin(speed * time + phase)
    follows = np.sin(speed * time + phase - 0.5)
    load = (0.2, 0.6, 1.0)[way] * main**2
    heat = np.cumsum(load) / 15
    return np.stack([main, follows, load, heat], axis=1) + random.normal(0, 0.05, (30, 4))
