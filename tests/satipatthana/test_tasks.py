"""Tasks: how they are split, their shapes and their sets from outside, and anomalies among their classes."""

from __future__ import annotations

import pytest
import torch

from lego.satipatthana import tasks
from lego.satipatthana.sections import changed, with_profile
from tests.satipatthana.conftest import PARAMS, PROFILES

# tasks and tables


def test_digits_are_split_as_the_specification_says():
    task = tasks.load(PARAMS.task, PARAMS.test)
    assert (len(task.train), len(task.validation), len(task.test)) == (858, 152, 433)
    assert {kind: len(rows) for kind, rows in task.outside.items()} == {"near": 354} | dict.fromkeys(
        ("gauss_matched", "uniform", "pixel_perm", "inverted", "noisy_0.5"), 433
    )
    assert task.train.x.min() >= -1
    assert task.train.x.max() <= 1
    torch.testing.assert_close(task.outside["inverted"], -task.test.x)
    again = tasks.load(PARAMS.task, PARAMS.test)
    assert all(torch.equal(rows, again.outside[kind]) for kind, rows in task.outside.items())


@pytest.mark.parametrize(("name", "features"), [("breast_cancer", (30,)), ("wine", (13,)), ("sensors", (30, 4))])
def test_other_tasks_come_with_their_shapes_and_sets_from_outside(name, features):
    kinds = ["stuck", "drift", "spikes", "swapped"] if name == "sensors" else ["uniform", "noisy_0.5"]
    task = tasks.load(PARAMS.task.model_copy(update={"name": name}), PARAMS.test.model_copy(update={"kinds": kinds}))
    assert task.shape == features
    assert list(task.outside) == kinds
    for rows in task.outside.values():
        assert rows.shape == task.test.x.shape
        assert not torch.equal(rows, task.test.x)
    if name != "sensors":
        assert task.train.x.mean(0).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("anomalies", "said"),
    [(["ten"], "has ten, which is no class of digits"), ([str(one) for one in range(10)], "has all classes of digits")],
)
def test_anomalies_are_classes_of_the_task_and_not_all_of_them(anomalies, said):
    params = changed(
        PARAMS,
        {"task.job": "anomaly", "task.anomalies": anomalies, "stage2.correctness": False, "test.kinds": []},
        "test",
    )
    with pytest.raises(tasks.TaskError, match=said):
        tasks.load(params.task, params.test)


def test_unlabelled_train_rows_keep_their_anomalies_and_labelled_ones_lose_them():
    params = with_profile(PARAMS, "unsupervised", PROFILES)
    assert params.task.unlabelled
    mixed = tasks.load(params.task, params.test)
    clean = tasks.load(params.task.model_copy(update={"unlabelled": False}), params.test)
    assert len(mixed.train) > len(clean.train)
    assert len(mixed.validation) > len(clean.validation)
    assert len(mixed.test) == len(clean.test)
    assert set(mixed.outside) == {"seen_malignant"}
    assert set(clean.outside) == {"unseen_malignant"}
    whole = len(mixed.test) + len(mixed.outside["seen_malignant"])
    assert whole == 171  # three tenths of 569 rows
