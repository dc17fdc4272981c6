"""The trust that clean rows deserve in stage 2: all, or those whose answer a guide finds in their inputs (R-9.4)."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from torch import Tensor

from lego.satipatthana import jobs
from lego.satipatthana.sections import SatipatthanaParams
from lego.satipatthana.tasks import Split

FOLDS = 5
ALPHAS = (0.1, 1.0, 10.0, 100.0)  # of the ridge regression


def _guide(params: SatipatthanaParams) -> LogisticRegression | RidgeCV:
    """What tells hard rows by their inputs alone: settled states come of a stage 1 that has seen the answers of all
    rows, so a guide that reads them finds hardly an error."""
    return RidgeCV(ALPHAS) if params.task.job == "regression" else LogisticRegression(max_iter=500)


def _numbers(rows: Split) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, features) and answers (n,) as a guide takes them."""
    return rows.x.flatten(1).double().numpy(), rows.y.double().numpy()


def _agree(guess: np.ndarray, rows: Split, params: SatipatthanaParams) -> Tensor:
    """Where guesses (n,) are right, as 0 and 1 (n,)."""
    guessed = torch.from_numpy(guess)
    if params.task.job == "regression":
        return jobs.right("regression", guessed[:, None], rows.y, params.reject.tolerance).float()
    return (guessed == rows.y).float()


def guided(rows: Split, train: Split, params: SatipatthanaParams) -> Tensor:
    """Trust (n,) that rows deserve which no guide has seen: where one that was fitted on train answers rightly."""
    if rows.deserved is not None:
        return rows.deserved
    if not params.stage2.correctness or len(torch.unique(train.y)) < 2:
        return torch.ones(len(rows))
    guide = _guide(params).fit(*_numbers(train))
    return _agree(guide.predict(_numbers(rows)[0]), rows, params)


def cross_fitted(train: Split, params: SatipatthanaParams, seed: int) -> Tensor:
    """Whether a guide that was fitted on other rows answers each train row rightly (n,) of 0 and 1 (R-9.4).

    Rows of a class with fewer rows than folds are taken as right, and all rows of so small a regression.
    """
    right, regression = torch.ones(len(train)), params.task.job == "regression"
    if regression and len(train) < FOLDS:
        return right
    judged = torch.ones(len(train), dtype=torch.bool) if regression else torch.bincount(train.y)[train.y] >= FOLDS
    if not regression and len(torch.unique(train.y[judged])) < 2:
        print(f"stage 2: no two classes have {FOLDS} rows, so every clean row deserves trust", flush=True)
        return right
    parts = (KFold if regression else StratifiedKFold)(FOLDS, shuffle=True, random_state=seed % 2**32)
    some = Split(train.x[judged], train.y[judged])
    right[judged] = _agree(cross_val_predict(_guide(params), *_numbers(some), cv=parts), some, params)
    return right


def deserved(train: Split, params: SatipatthanaParams, seed: int) -> Tensor:
    """Trust (n,) that clean train rows deserve (R-9.4)."""
    if train.deserved is not None:
        return train.deserved
    return cross_fitted(train, params, seed) if params.stage2.correctness else torch.ones(len(train))
