"""Sentences of the report: every one follows by rule from the numbers."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from lego.cost import Ledger
from stages.evidence.summary import (
    Difference,
    Suite,
    budget_kind,
    by_regime,
    difference,
    leaky,
    shallow_gain,
    tokens_per_parameter,
)

QUESTION = (
    "ASHEM trains a second block on the tokens that the first one is unsure of, and lets the others leave early. For "
    "the same multiply-accumulates (MACs) one could have trained block 1 further, trained a deeper model from the "
    "start, "
    "or given block 2 other tokens. Does ASHEM reach a lower perplexity on unseen text than these, and when?"
)
REGIME_OF_CORE = (
    "Phase 1 saw {tokens:,} tokens with {parameters:,} parameters ({ratio:.1f} a parameter); it {converged}. {seeds} "
    "seeds. "
    "A difference is ASHEM's test perplexity less the other's: below 0 ASHEM is better."
)
READING = (
    "Intervals are of 95 %: over seeds Student's t, over documents a paired bootstrap that draws the test documents "
    "anew "
    "with the seeds as they are. The verdict is better or worse only if both exclude 0. *added*: block 1 is given, the "
    "budget is what mining and phase 2 cost; *total*: the budget also holds phase 1. Every model had the same search "
    "of "
    "its learning rate on validation text, with the first seed."
)
ROUTER = (
    "AUROC: the chance that of two tokens the one that block 2 helps has the lower score. Perplexity over cost: the "
    "mean, "
    "over budgets between always-shallow and the full model, of the lowest perplexity that routing reaches within the "
    "budget. Calibration error: of the score read as the probability that the exit's answer is right (gain: that "
    "block 2 "
    "does not help), in 15 bins, before and after one temperature on its log-odds fitted on validation text."
)
THREATS = (
    "The models are small (below a million parameters); nothing here says how it is at a billion.",
    "The text is the standard library of Python: code, with much repetition. docs/results.md has prose (WikiText-2).",
    "Test documents are few and of unequal length, so the interval over documents is wide and rests on a few of them.",
    "The search of the learning rate is over three values on one seed; a finer one could change close verdicts.",
    "Cost is counted in MACs of matrix products; time differs (metrics/timing and docs/results.md have it).",
    "Early stopping and learning rates were chosen on validation text, which all models share.",
    "Verdicts are many and not corrected for their number: one in twenty close ones may be chance.",
)


def core_facts(suite: Suite, setting: str) -> dict[str, Any]:
    """What stands above the main table."""
    records = suite.records[setting]["ashem"]
    phase1 = next(iter(records.values()))["phase1"]
    stopped = sum(bool(one["phase1"]["phase1_converged"]) for one in records.values())
    return {
        "tokens": phase1["train_tokens"],
        "parameters": phase1["parameters"],
        "ratio": tokens_per_parameter(next(iter(records.values()))),
        "converged": f"stopped on patience in {stopped} of {len(records)} seeds, and was cut off in the others"
        if stopped < len(records)
        else "stopped on patience in every seed",
        "seeds": len(records),
    }


def phrase(found: Difference | None, other: str) -> str:
    """A verdict in words with its intervals."""
    if found is None:
        return f"not compared with {other}"
    relation = {"better": "better than", "worse": "worse than"}.get(found.verdict, "not distinguishable from")
    return f"{relation} {other} by {found.over_seeds:+.2f} (documents {found.over_documents:+.2f})"


def rivals(core: Suite, setting: str, kind: str) -> list[str]:
    """The models of one budget, the lowest test perplexity first."""
    others = [model for model in core.models(setting) if model != "ashem" and not leaky(core, setting, model)]
    mine = [model for model in others if budget_kind(core, setting, model) == kind]
    return sorted(mine, key=lambda model: fmean(core.values(setting, model, "ppl")))


def answer(core: Suite, setting: str) -> str:
    """The answer in one sentence, by rule: against its own block 1, and the strongest model of each budget."""
    own = core.interval(setting, "ashem")
    parts = [
        f"At {core_facts(core, setting)['ratio']:.1f} tokens of phase 1 a parameter ASHEM reaches a test perplexity of "
        f"{own:.2f}, {phrase(shallow_gain(core, setting), 'its own block 1')}"
    ]
    for kind in ("added", "total"):
        if names := rivals(core, setting, kind):
            best = phrase(difference(core, setting, "ashem", names[0]), names[0])
            parts.append(f"and at equal {kind} MACs {best}")
    return ", ".join(parts) + "."


def answer_points(core: Suite, setting: str) -> list[str]:
    """ASHEM against every model, by budget."""
    said = []
    for kind in ("added", "total"):
        compared = [phrase(difference(core, setting, "ashem", name), name) for name in rivals(core, setting, kind)]
        if compared:
            said.append(f"at equal {kind} MACs: " + "; ".join(compared))
    return said


def crossover(suite: Suite) -> str:
    """From which tokens per parameter on ASHEM wins, for each model it is compared with."""
    settings = by_regime(suite)
    others = [model for model in suite.models(settings[0][1]) if model != "ashem"]
    said = []
    for other in others:
        found = [(seen, difference(suite, name, "ashem", other)) for seen, name in settings]
        verdicts = [(seen, one.verdict) for seen, one in found if one]
        wins, losses = ([f"{seen:.1f}" for seen, one in verdicts if one == wanted] for wanted in ("better", "worse"))
        close = [f"{seen:.1f}" for seen, one in verdicts if one not in ("better", "worse")]
        parts = [("better at", wins), ("worse at", losses), ("not distinguishable at", close)]
        said.append(f"{other}: " + ", ".join(f"{what} {' and '.join(where)}" for what, where in parts if where))
    return "By tokens of phase 1 per parameter, ASHEM against " + "; ".join(said) + "."


def ratios(suite: Suite) -> str:
    """Hard against random selection at every ratio."""
    said = []
    for setting in suite.records:
        found = difference(suite, setting, "ashem", "random")
        if found:
            said.append(f"{setting.removeprefix('ratio_')} %: {found.verdict} ({found.over_seeds:+.2f})")
    return "Hard against random selection, by share: " + "; ".join(said) + "."


def leak(suite: Suite, setting: str) -> str:
    """The historical claim on validation text and the truth on test text."""
    seeds = suite.records[setting].get("leaky_validation")
    if not seeds:
        return "Not run."
    before = [one["phase1"]["val_ppl"] for one in suite.records[setting]["ashem"].values()]
    mean = {
        key: suite.interval(setting, "leaky_validation", key)
        for key in ("val_ppl", "ppl", "val_hard_ppl_before", "val_hard_ppl_after", "hard_ppl_before", "hard_ppl_after")
    }
    test_before = suite.interval(setting, "ashem", "shallow_ppl")
    return (
        "Mined, trained and scored on validation text, with a trainable head and tokens alone (`leaky_validation`). "
        "It claims "
        f"a validation perplexity of {sum(before) / len(before):.2f} -> {mean['val_ppl']:.2f}, on hard tokens "
        f"{mean['val_hard_ppl_before']:.1f} -> "
        f"{mean['val_hard_ppl_after']:.1f}. The truth on test text: {test_before:.2f} -> {mean['ppl']:.2f}, on hard "
        f"tokens {mean['hard_ppl_before']:.1f} -> {mean['hard_ppl_after']:.1f}."
    )


def break_even(ledger: Ledger, hard_ratio: float) -> str:
    logits, state = ledger.break_even_shallow_ratio(), ledger.break_even_shallow_ratio(ledger.dim)
    return (
        f"Routing costs less than the full model from a shallow ratio of {logits:.3f} with a criterion that reads "
        f"the exit's "
        f"logits and of {state:.3f} with one that reads its state; at {1 - hard_ratio:.2f} it costs "
        f"{ledger.flops_ratio(1 - hard_ratio):.3f} and {ledger.flops_ratio(1 - hard_ratio, ledger.dim):.3f} of it."
    )


def provenance(suites: dict[str, Suite]) -> list[str]:
    """Which revisions the records were made at."""
    said = []
    for name, suite in suites.items():
        records = [
            record for models in suite.records.values() for seeds in models.values() for record in seeds.values()
        ]
        if records:
            revisions = sorted({record["revision"] for record in records})
            said.append(f"metrics/evidence/{name}.json: {len(records)} models, at revision {', '.join(revisions)}")
    said.append(
        "reproduce: `python -m stages.evidence.run --seeds 5`, `--full` for all suites, then `dvc repro "
        "stages/evidence/dvc.yaml:report`"
    )
    return said
