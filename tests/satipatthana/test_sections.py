"""The parameters: keys and ranges that are refused, and sections that do not fit together."""

from __future__ import annotations

import pytest

from lego.base.parameter_files import ParamsError
from lego.satipatthana.sections import changed
from tests.satipatthana.conftest import PARAMS, small

ODD = {"task.job": "anomaly", "task.anomalies": ["8", "9"], "stage2.correctness": False}


def test_r5_5_unknown_and_missing_keys_are_refused():
    with pytest.raises(
        ParamsError, match="test: adapter hidden must be a multiple of heads for the kind transformer, got 130 and 4"
    ):
        small(adapter__kind="transformer", adapter__hidden=130, adapter__heads=4)
    with pytest.raises(ParamsError, match=r"test: stage1\.speed is no key"):
        small(stage1__speed=1)
    with pytest.raises(ParamsError, match=r"stage2\.batch_size must be at least the number of paths, 5, got 4"):
        small(stage2__batch_size=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task.job": "regression"}, "job must not be regression when task.name is digits"),
        ({"task.anomalies": ["8"]}, "must be empty or false unless task.job is anomaly"),
        ({"task.job": "anomaly", "task.anomalies": ["8"], "task.known": ["9"]}, "known must be among task.anomalies"),
        ({"task.job": "anomaly", "task.anomalies": ["8"]}, "stage2.correctness must be false"),
        ({"void.kinds": ["anomalies"]}, "void.kinds must not have anomalies unless task.known names some"),
        ({"test.kinds": []}, "test.kinds must name at least one kind"),
        (ODD | {"task.known": ["8"], "task.unlabelled": True}, "known must be empty when task.unlabelled is true"),
        (
            ODD | {"task.known": ["8"], "system.guided": False},
            "unless system.guided is true or void.kinds has anomalies",
        ),
        (ODD | {"reject.rule": "risk"}, "reject.rule must not be risk when task.job is anomaly"),
    ],
)
def test_what_does_not_fit_together_is_said(changes, said):
    with pytest.raises(ParamsError, match=said):
        changed(PARAMS, changes, "test")
