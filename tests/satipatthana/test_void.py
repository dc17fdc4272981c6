"""Rows from outside of the data: each of its kind, mixed, warped, and far enough or said not to be."""

from __future__ import annotations

import pytest
import torch

from lego.base.parameter_files import ParamsError
from lego.satipatthana.specs import spec_of
from lego.satipatthana.void import VoidError, VoidSource, acceptance
from tests.satipatthana.conftest import PARAMS, clusters, small, system


def test_r6_4_void_rows_are_of_their_kind_and_the_filter_gives_up_loudly(capsys):
    train = clusters(90)
    source, generator = VoidSource(train.x, train.y, PARAMS.void), torch.Generator().manual_seed(0)
    mixed = source.of("mixup", 50, generator)
    sums = (train.x[:, None] + train.x[None]).flatten(0, 1)
    assert (2 * mixed[:, None] - sums[None]).abs().amax(2).amin(1).max() < 1e-6
    pasted = source.of("cut_paste", 50, generator)
    assert all((pasted[:, column, None] == train.x[:, column]).any(1).all() for column in range(12))
    shuffled = source.of("feature_shuffle", 50, generator)
    assert all((shuffled[:, column, None] == train.x[:, column]).any(1).all() for column in range(12))
    permuted = source.of("patch_permutation", 20, generator)
    ordered = permuted.sort(1).values[:, None] - train.x.sort(1).values[None]
    assert ordered.abs().amax(2).amin(1).max() < 1e-6
    far = VoidSource(train.x, None, PARAMS.void.model_copy(update={"min_distance": 1.5}))
    rows = far.of("filtered_uniform", 40, generator)
    assert torch.cdist(rows, train.x).min() >= 1.5
    never = VoidSource(train.x, None, PARAMS.void.model_copy(update={"min_distance": 100.0}))
    with pytest.raises(VoidError, match=r"0 of 10 rows lie at least 100 from the data after 20 attempts; lower"):
        never.of("filtered_uniform", 10, generator)
    filtered = small(void__kinds=["filtered_uniform"], void__min_distance=0.01, test__kinds=["inverted"])
    spec_of(2, system(filtered), clusters(40), filtered, 0)
    assert "warning: void.min_distance keeps 100.0 % of uniform rows" in capsys.readouterr().out
    assert acceptance(VoidSource(torch.randn(500, 64), None, PARAMS.void), generator) > 0.99  # vacuous in 64 dimensions
    with pytest.raises(ParamsError, match=r"kind that test\.kinds holds back, as are uniform and uniform"):
        small(void__kinds=["uniform", "mixup"])
    for kind, other in (("gaussian", "gauss_matched"), ("patch_permutation", "pixel_perm")):
        with pytest.raises(ParamsError, match=f"as are {kind} and {other}"):
            small(void__kinds=[kind])


def test_r6_4_a_mixture_is_of_two_classes_however_rare_one_is():
    x, y = torch.arange(200.0)[:, None], (torch.arange(200) % 100 == 7).long()  # two rows of the second class
    source, generator = VoidSource(x, y, PARAMS.void), torch.Generator().manual_seed(0)
    one, other = (rows[:, 0].long() for rows in source._pairs(3000, generator))
    assert (y[one] != y[other]).all()
    assert len(torch.unique(one)) > 190  # any row is mixed
    three = VoidSource(torch.arange(9.0)[:, None], torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1]), PARAMS.void)
    one, other = (rows[:, 0].long() for rows in three._pairs(6000, generator))
    pairs, counts = torch.unique(torch.stack([one, other]), dim=1, return_counts=True)
    assert pairs.shape[1] == 9 * 6  # every row with every row of the other classes, as often
    assert counts.min() > 70
    alone = VoidSource(x, torch.zeros(200, dtype=torch.long), PARAMS.void)
    assert alone.of("mixup", 5, generator).shape == (5, 1)


def test_time_warp_is_a_window_at_another_speed():
    ramp = torch.linspace(0, 1, 30).view(1, 30, 1).expand(1, 30, 4).contiguous()
    void = PARAMS.void.model_copy(update={"kinds": ["time_warp"]})
    rows = VoidSource(ramp, None, void).draw(200, torch.Generator().manual_seed(0))
    step = rows.diff(dim=1).abs()[:, :, 0] * 29  # steps of the ramp that a step of the window takes
    speed = step.median(dim=1).values
    assert 0.49 < float(speed.min()) < 2**-0.3 + 0.01
    assert 2**0.3 - 0.01 < float(speed.max()) < 2.01
    assert not bool(((speed > 2**-0.29) & (speed < 2**0.29)).any())
    assert torch.equal(rows[:, :, 0], rows[:, :, 3])
    with pytest.raises(VoidError, match="rows of this task are no windows"):
        VoidSource(ramp[:, :, 0], None, void).draw(2, torch.Generator())
