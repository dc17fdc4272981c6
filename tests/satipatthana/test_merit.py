"""The trust that rows deserve: where a guide that has not seen them answers rightly."""

from __future__ import annotations

import torch

from lego.satipatthana.merit import cross_fitted, deserved, guided
from lego.satipatthana.paths import Way, damaged
from lego.satipatthana.sections import changed
from lego.satipatthana.tasks import Split
from tests.satipatthana.conftest import COMPAT, PARAMS, clusters, small, system


def test_validation_rows_deserve_trust_where_a_guide_of_train_rows_is_right():
    train, held = clusters(60), clusters(30, seed=5)
    labels = held.y.clone()
    labels[[2, 9]] = (labels[[2, 9]] + 1) % 3
    assert (guided(Split(held.x, labels), train, PARAMS) == 0).nonzero()[:, 0].tolist() == [2, 9]
    known = Split(held.x, held.y, torch.full((30,), 0.25))
    assert torch.equal(guided(known, train, PARAMS), known.deserved)  # the task itself knows
    assert torch.equal(guided(Split(held.x, labels), train, small(stage2__correctness=False)), torch.ones(30))
    alike = Split(train.x, torch.zeros(60, dtype=torch.long))
    assert torch.equal(guided(held, alike, PARAMS), torch.ones(30))  # nothing to guide


def test_r9_4_rows_that_a_guide_of_other_rows_gets_wrong_deserve_no_trust():
    train = clusters(rows=90)
    wrong = torch.tensor([4, 31, 77])
    labels = train.y.clone()
    labels[wrong] = (labels[wrong] + 1) % 3
    right = cross_fitted(Split(train.x, labels), PARAMS, 0)
    assert (right == 0).nonzero()[:, 0].tolist() == wrong.tolist()
    assert torch.equal(cross_fitted(train, PARAMS, 0), torch.ones(90))
    assert torch.equal(cross_fitted(Split(train.x[:4], train.y[:4]), PARAMS, 0), torch.ones(4))  # too few for folds
    rare = torch.cat([labels, torch.tensor([3, 3])])
    with_rare = cross_fitted(Split(torch.cat([train.x, train.x[:2]]), rare), PARAMS, 0)
    assert with_rare[90:].tolist() == [1, 1]  # of a class with fewer rows than folds
    assert float(with_rare[wrong].sum()) == 0
    known = Split(train.x, train.y, torch.arange(90) / 90)
    assert torch.equal(deserved(known, PARAMS, 0), known.deserved)  # where the task itself knows
    task = {"task.name": "table", "task.file": "rows.csv", "task.label": "y", "task.job": "regression"}
    line = train.x[:, 0].clone()
    line[wrong] += 5
    number = cross_fitted(Split(train.x, line), changed(PARAMS, task, "test"), 0)
    assert set(wrong.tolist()) <= set((number == 0).nonzero()[:, 0].tolist())
    assert float(number.mean()) > 0.8
    made, counts = system(small()), {"clean": 40, "augmented": 40}
    generator = torch.Generator().manual_seed(0)
    clean = Way.of(made, train.x)
    rows = damaged(made, clean, counts, PARAMS.stage2, None, generator, right)
    fewer = damaged(made, clean, counts, PARAMS.stage2, None, torch.Generator().manual_seed(0))
    lower = rows.target < fewer.target
    shown = [place for place in wrong.tolist() if bool((fewer.encoded == train.x[place]).all(dim=1).any())]
    assert int(lower[:40].sum()) == len(shown)
    assert bool((rows.target[lower] == 0).all())
    assert PARAMS.stage2.correctness is True
    assert COMPAT.stage2.correctness is False
