"""CVFP's checks: ranks against references, networks that each test must flag and no other, verdicts, reports."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lego.base.artifacts import write_json
from lego.cvfp.checks import (
    Convergence,
    IdentityError,
    convergence,
    flags,
    frozen_passes,
    identity,
    require_no_identity,
    settles,
    trend,
    validation_trend,
)
from lego.cvfp.dependence import dependence, lag_r2
from lego.cvfp.evaluation import critical_checks, ranks, since_document_began
from lego.cvfp.passes import QUIET, sequential_pass
from lego.cvfp.phase2 import FixedText
from lego.cvfp.ranks import Spread, effective_rank, participation_ratio
from lego.cvfp.reports import ReportError, TrainFacts, ValidationFacts, report, validate
from lego.cvfp.sections import changed
from tests.cvfp.conftest import PARAMS, VOCAB, network, seed_params, text

CHECKS = PARAMS.checks
D = 32


class Network:
    """A network of one formula, with the two sizes that the checks read."""

    context_dim = embed_dim = D

    def __init__(self, formula) -> None:
        self.formula = formula

    def __call__(self, *, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return self.formula(context, token), token

    def frozen_step(self):
        return self.formula


MIX = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
CONSTANT = torch.randn(D, generator=torch.Generator().manual_seed(2))
DEGENERATE = {
    "constant": Network(lambda c, t: CONSTANT.expand_as(c)),
    "identity": Network(lambda c, t: c),
    "token-blind": Network(lambda c, t: torch.roll(c, 1, -1) * 0.9 + 0.3),
    "memoryless": Network(lambda c, t: t @ MIX),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_b25_each_degenerate_network_is_flagged_by_exactly_its_test(kind):
    model = DEGENERATE[kind]
    expected = {"constant": False, "identity": False, "token_blind": False, "memoryless": False}
    assert flags(model, CHECKS, 0) == expected | {kind.replace("-", "_"): True}
    embeddings = torch.randn(400, D, generator=torch.Generator().manual_seed(1))
    contexts = sequential_pass(model, embeddings, start=torch.randn(D, generator=torch.Generator().manual_seed(3)))
    spread = Spread.of(contexts, 0)
    assert spread.is_attractor(CHECKS.attractor_distance, CHECKS.attractor_cosine) == (kind in ("constant", "identity"))
    if kind == "identity":
        with pytest.raises(
            IdentityError, match=r"so phase 2 is not trained; .*raise checks\.identity_cosine above 0\.95"
        ):
            require_no_identity(model, CHECKS, 0)
    else:
        require_no_identity(model, CHECKS, 0)


def test_b25_a_network_that_is_none_of_these_is_not_flagged():
    assert not any(flags(network(seed_params()), CHECKS, 0).values())
    assert not any(flags(Network(lambda c, t: 0.5 * c + t), CHECKS, 0).values())


@pytest.mark.parametrize("kind", [*DEGENERATE, "zero"])
def test_b25_evaluation_says_so_of_a_degenerate_network_and_does_not_break(kind, tmp_path):
    model = Embedding(Network(lambda c, t: torch.zeros_like(c)) if kind == "zero" else DEGENERATE[kind])
    ids = text(300)
    contexts = sequential_pass(model, model.embed(ids))
    few = changed(PARAMS, {"checks.rank_tokens": 300, "checks.passes": 3}, "test")
    found = ranks(model, model, ids, few.checks, 0, "train", QUIET)
    facts, _ = critical_checks(model, model, FixedText(ids, contexts), few, 0, QUIET)
    write_json(tmp_path / "facts.json", found | facts)  # which takes no NaN
    assert found["train_zero"] == (kind in ("zero", "identity"))  # an identity keeps its start, which is 0
    assert found["train_attractor"] == (kind == "constant")
    assert [name for name in ("constant", "identity", "token_blind", "memoryless") if facts[f"is_{name}"]] == (
        ["constant"] if kind == "constant" else [] if kind == "zero" else [kind.replace("-", "_")]
    )


class Embedding:
    """A network of one formula with embeddings of ids."""

    context_dim = embed_dim = D

    def __init__(self, network: Network) -> None:
        self.network = network
        self.rows = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(5))

    def embed(self, ids: Tensor) -> Tensor:
        return self.rows[ids]

    def __call__(self, *, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(context=context, token=token)

    def frozen_step(self):
        return self.network.frozen_step()


def test_identity_on_data_needs_a_spread_and_another_direction_than_the_token():
    rows = torch.randn(300, D)
    noise = Network(lambda c, t: torch.randn_like(c))
    assert identity(noise, torch.zeros_like(rows), rows, CHECKS, 0).on_data
    assert identity(noise, rows.mean(0).expand_as(rows) + 1, rows, CHECKS, 0).on_data
    assert identity(noise, 2 * rows, rows, CHECKS, 0).on_data  # the token's own direction
    found = identity(noise, torch.randn_like(rows), rows, CHECKS, 0)
    assert not found.on_data
    assert not found.on_noise
    other = network(seed_params())
    contexts = sequential_pass(other, other.embed(text(50)).detach())
    assert identity(other, contexts, other.embed(text(50)).detach(), CHECKS, 0).token_cosine is None  # d is not e


@pytest.mark.parametrize("shape", [(100, 20), (20, 100)])
def test_b24_one_rank_by_two_ways(shape):
    rows = torch.randn(*shape) @ torch.diag(torch.linspace(0.01, 3, shape[1]))
    assert effective_rank(rows, "svd") == pytest.approx(effective_rank(rows, "gram"), abs=1e-4)
    sigma = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum()
    assert effective_rank(rows) == pytest.approx(math.exp(-(p * np.log(p + 1e-10)).sum()), abs=1e-4)
    assert effective_rank(rows) <= min(shape)
    assert participation_ratio(torch.randn(20_000, 10)) == pytest.approx(10, rel=0.01)
    noise = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    assert effective_rank(noise[:100]) < effective_rank(noise) < 20  # it grows with the tokens


def test_b23_norms_and_mean_squares_are_told_apart():
    """A constant shift s moves every pass by the L2 norm |s|, whose square is d times the MSE."""
    shift = torch.linspace(0.1, 0.4, D)
    model = Network(lambda c, t: c + shift)
    embeddings = torch.zeros(30, D)
    passes = frozen_passes(model, embeddings, 3)
    found = convergence(model, embeddings, CHECKS)
    mse = float((passes[2] - passes[1]).square().mean())
    assert found.differences == pytest.approx([30 * float(shift.norm())] * 4, rel=1e-4)
    assert found.final_diff**2 == pytest.approx(D * mse, rel=1e-3)
    assert found.per_dimension == pytest.approx(math.sqrt(mse), rel=1e-3)
    assert not found.passed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([0.5, 0.1, 0.0005], True),
        ([0.1, 0.5, 0.0005], False),  # it rose on its way
        ([0.5, 0.1, 0.002], False),
        ([0.0001, 0.0009, 0.0002], True),  # below the line it may rise
        ([0.0001, 0.002, 0.0001], False),
    ],
)
def test_settling_is_falling_below_the_line(changes, expected):
    assert settles(changes, 1e-3) is expected


@pytest.mark.parametrize(("last", "band"), [(5e-5, 1e-4), (5e-4, 1e-3), (1e-3, 1e-2), (0.5, None)])
def test_the_last_change_is_told_by_the_notes_lines(last, band):
    assert Convergence([1.0, last], D, True, torch.zeros(3)).below(CHECKS.final_diff_bands) == band


def test_frozen_passes_of_a_contraction_settle():
    model = Network(lambda c, t: 0.5 * c + t)
    found = convergence(model, torch.randn(40, D), CHECKS)
    assert found.passed
    assert found.final_diff < 1e-5
    result = validation_trend(model, torch.randn(40, D), PARAMS.phase1.convergence_threshold, CHECKS)
    assert (result.legacy, result.verdict, len(result.losses)) == ("CONVERGED", "CONVERGED", 9)


@pytest.mark.parametrize(
    ("losses", "legacy", "verdict"),
    [
        ([1.42] * 9, "CONVERGED", "NOT_CONVERGED"),
        (list(np.linspace(1.216, 1.198, 9)), "CONVERGING", "NOT_CONVERGED"),
        ([1e-4] * 9, "CONVERGED", "CONVERGED"),
        ([0.0] * 9, "CONVERGED", "CONVERGED"),
        (list(np.linspace(0.5, 0.001, 9)), "CONVERGING", "CONVERGING"),
        (list(np.linspace(0.1, 0.9, 9)), "DIVERGING", "DIVERGING"),
        ([0.5, 0.1, 0.1, 0.5], "UNSTABLE", "UNSTABLE"),
        ([0.3], "INSUFFICIENT_DATA", "INSUFFICIENT_DATA"),
        ([], "INSUFFICIENT_DATA", "INSUFFICIENT_DATA"),
    ],
)
def test_b30_a_verdict_needs_a_level(losses, legacy, verdict):
    found = trend(losses, threshold=0.1, variance=0.71, settings=CHECKS)
    assert (found.legacy, found.verdict) == (legacy, verdict)
    text = "\n".join(found.lines())
    assert verdict in text
    if losses:
        assert f"initial {losses[0]:.6g}, final {losses[-1]:.6g}" in text


def test_lag_r2_finds_what_a_linear_memory_holds():
    embeddings = torch.randn(3000, 8)
    contexts = torch.zeros(3000, 16)
    contexts[:, :8] = embeddings
    contexts[2:, 8:] = embeddings[:-2]
    values = [lag_r2(contexts, embeddings, lag, 1e-6) for lag in range(4)]
    assert values[0] == pytest.approx(1, abs=1e-3)
    assert values[2] == pytest.approx(1, abs=1e-3)
    assert abs(values[1]) < 0.05
    assert abs(values[3]) < 0.05


def test_dependence_of_a_linear_network_is_known_in_closed_form():
    model = Network(lambda c, t: 0.5 * c + t)
    embeddings = torch.randn(600, D)
    found = dependence(model, sequential_pass(model, embeddings), embeddings, CHECKS, 0)
    assert found.lyapunov == pytest.approx(math.log(0.5), abs=0.01)
    assert 6 <= found.forgetting <= 9  # MSE of two starts about 2.7, a quarter a step, below 1e-4
    assert found.memory_capacity == pytest.approx(sum(max(0, one) for one in found.lag_r2[1:]))
    keeps = dependence(Network(lambda c, t: c), torch.randn(600, D), embeddings, CHECKS, 0)
    assert keeps.forgetting is None
    assert keeps.lyapunov == pytest.approx(0, abs=0.01)


def test_positions_count_from_the_end_of_the_document_before():
    ids = torch.tensor([5, 6, 0, 7, 8, 0, 0, 9])
    assert since_document_began(ids, 0).tolist() == [0, 1, 0, 1, 2, 0, 0, 1]


TRAIN = TrainFacts(0, 6400, 10, 10, 9, 689.26, 695.0, 768, 0.001732)
VALIDATION = ValidationFacts(1280, 1280, 10, 10, 627.29, 768, 0.000745, 0.001)


def test_a4_the_report_is_the_form_of_the_specification():
    lines = report(TRAIN, VALIDATION).splitlines()
    assert lines == [
        "Train: convergence 0.0% (0/6400 tokens), iterations 10/10, weight updates 9 | ER 689.26/768 (89.7%), "
        "untrained ER 695.00/768 | CVFP loss 0.001732",
        "Val:   convergence 100.0% (1280/1280 tokens), passes 10/10 | ER 627.29/768 (81.7%) | "
        "CVFP check final_diff = 0.000745 (threshold < 0.001)",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("Val:", "Validation:"), "one line that begins with Val:"),
        ((", weight updates 9", ""), "is not of the form"),
        ((", untrained ER 695.00/768", ""), "is not of the form"),
        (("0.0% (0/6400", "5.0% (0/6400"), "5.0% is not 0/6400"),
        (("100.0% (1280/1280", "100.0% (1281/1280"), "is not 1281/1280"),
        (("ER 627", "good ER 627"), "is not of the form"),
        (("ER 689.26/768 (89.7%)", "ER 789.26/768 (102.8%)"), "789.26 is above 768"),
        (("untrained ER 695.00", "untrained ER 795.00"), "795.00 is above 768"),
        (("(81.7%)", "(91.7%)"), "91.7% is not 627.29/768"),
        (("iterations 10/10", "iterations 11/10"), "11 is above 10"),
    ],
)
def test_a_report_that_lacks_a_number_is_rejected(change, sentence):
    with pytest.raises(ReportError, match=sentence.replace("(", r"\(")):
        validate(report(TRAIN, VALIDATION).replace(*change))


@pytest.mark.parametrize("word", ["excellent", "Improved", "moderate", "good", "significantly"])
def test_a_report_that_judges_is_rejected(word):
    with pytest.raises(ReportError, match=f"take out '{word}'"):
        validate(f"{report(TRAIN, VALIDATION)}\nthis is {word}")
