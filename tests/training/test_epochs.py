"""Epochs until the perplexity stops falling: the best state is kept, the start too, and the curve's rows."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from lego.training.epochs import epoch_rows, fit


def scripted(perplexities: list[float], **options):
    """fit() over a model whose single weight is the number of the epoch."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, -1.0)

    class Epochs:
        def set_epoch(self, epoch: int) -> None:
            torch.nn.init.constant_(model.weight, epoch + 1)

    values = iter(perplexities)
    bests: list[int] = []
    history = fit(
        model,
        Epochs(),
        lambda: 1.0,
        lambda: {"ppl": next(values), "acc": 0.0},
        verbose=False,
        on_best=bests.append,
        **options,
    )
    return history, model.weight.item(), bests


@pytest.mark.parametrize(
    ("perplexities", "patience", "min_delta", "best", "total", "early"),
    [
        ([5, 4, 3, 2], 1, 0.0, 4, 4, False),
        ([5, 4, 4.5, 2], 1, 0.0, 2, 3, True),
        ([5, 4, 4.5, 2], 2, 0.0, 4, 4, False),
        ([5, 4.9, 4.8, 2], 2, 0.5, 1, 3, True),
        ([5, 5, 5, 5], 3, 0.0, 1, 4, True),
    ],
)
def test_early_stopping_keeps_the_best(perplexities, patience, min_delta, best, total, early):
    history, weight, bests = scripted(perplexities, max_epochs=4, patience=patience, min_delta=min_delta)
    result = history.as_result()
    assert (result["best_epoch"], result["total_epochs"], result["stopped_early"]) == (best, total, early)
    assert result["val_losses"] == perplexities[:total]
    assert weight == best
    assert bests[-1] == best


def test_a_start_that_no_epoch_beats_is_kept():
    history, weight, bests = scripted([3, 5, 4, 3.5], max_epochs=3, patience=3, keep_start=True)
    assert (history.best_epoch, history.best["ppl"], bests) == (0, 3, [])
    assert weight == -1.0
    assert history.as_result()["val_losses"] == [5, 4, 3.5]
    history, weight, _ = scripted([3, 5, 2, 3.5], max_epochs=3, patience=3, keep_start=True)
    assert (history.best_epoch, history.best["ppl"], weight) == (2, 2, 2.0)


def test_the_rows_of_a_curve_end_at_the_tokens_really_seen():
    result = {"train_losses": [3.0, 2.0], "val_losses": [9.0, 8.0], "val_accs": [0.1, 0.2]}
    rows = epoch_rows(result, seen=[100, 130], macs=1300, macs_before=50)
    assert [row["tokens"] for row in rows] == [100, 130]
    assert [row["macs"] for row in rows] == [1050, 1350]
    last = {"epoch": 2, "tokens": 130, "macs": 1350, "train_loss": 2.0, "val_ppl": 8.0, "val_acc": 0.2}
    assert rows[1] == last
