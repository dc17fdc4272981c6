"""Sentences of the report: every one follows by rule from the numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from lego.model.cost import Ledger
from lego.report.stats import bootstrap_coverage
from stages.evidence.summary import (
    DEEP,
    Difference,
    Suite,
    by_regime,
    compared_in,
    difference,
    rivals,
    shallow_gain,
    tokens_per_parameter,
)

QUESTION = (
    "ASHEM trains a second block on the tokens that the first one is unsure of, and lets the others leave early. For "
    "the same multiply-accumulates (MACs) one could have trained block 1 further, trained a deeper model from the "
    "start, or given block 2 other tokens. Does ASHEM reach a lower perplexity on unseen text than these, and when?"
)
READING = (
    "Intervals are of 95 %: over seeds Student's t, over documents a paired bootstrap that draws the test documents "
    "anew with the seeds as they are. A verdict is better or worse only if both exclude 0. *added*: block 1 is given, "
    "the budget is what mining and phase 2 cost; *total*: the budget also holds phase 1. All these models had the "
    "same search of three learning rates on validation text, with the first seed; block 1 had none. *always deep*: "
    "the same model with every token at its full depth. Of models with two exits rate and state are those of the "
    "lowest validation perplexity with as many tokens deep as are mined, the least confident, and without a gate."
)
ROUTER = (
    "AUROC: the chance that of two tokens the one that block 2 helps has the lower score. Perplexity over cost: the "
    "mean, over budgets between always-shallow and the full model, of the lowest perplexity that routing reaches "
    "within the budget. Calibration error: of the score read as the probability that the exit's answer is right "
    "(gain: that block 2 does not help), in 15 bins, before and after one temperature on its log-odds fitted on "
    "validation text."
)
THREATS = (
    "The models are small (below a million parameters); nothing here says how it is at a billion.",
    "The text is the standard library of Python: code, with much repetition.",
    "Train is divided between the phases by blocks, so phase 2 mines blocks of documents that phase 1 saw other "
    "blocks of.",
    "What holds beyond the last point of the regime map is not known; that point has another width than the others.",
    "Models of equal inference cost cost only nearly so: their shares of the full model's MACs stand in the table.",
    "WikiText-2 is two files here, so phase 1 reads its text several times, as the default text of the regime map "
    "never is.",
    "The search of the learning rate is over three values on one seed; where the best lies at an end, which the tables "
    "say, a wider search could find a better one, and a rate that suits the first seed may not suit the others.",
    "Selections that use the loss at the exit are not charged for computing it: the mining pass could have kept it.",
    "Cost is counted in MACs of matrix products; time differs (data/timing and docs/results.md have it).",
    "Early stopping and learning rates were chosen on validation text, which all models share.",
    "There are many verdicts, and no correction for their number.",
)


def documents_fact(suite: Suite, setting: str) -> str:
    """How many test documents there are, how unequal, and what that makes of the bootstrap's intervals."""
    tokens = next(iter(suite.records[setting]["ashem"].values()))["documents"]["tokens"]
    effective, held = sum(tokens) ** 2 / sum(n * n for n in tokens), bootstrap_coverage(np.array(tokens))
    return (
        f"The {len(tokens)} test documents are of unequal length and count like {effective:.1f} equal ones; on "
        f"documents of these lengths a percentile bootstrap of 95 % holds the truth in {100 * held:.0f} % of 400 "
        "simulations with normal differences."
    )


def facts(suite: Suite, setting: str) -> str:
    """What stands above the main table."""
    records = suite.records[setting]["ashem"]
    phase1 = next(iter(records.values()))["phase1"]
    stopped = sum(bool(one["phase1"]["phase1_converged"]) for one in records.values())
    ended = "was given" if not phase1["train_tokens"] else f"stopped on patience in {stopped} of {len(records)} seeds"
    return (
        f"Phase 1 saw {phase1['train_tokens']:,} tokens with {phase1['parameters']:,} parameters "
        f"({tokens_per_parameter(next(iter(records.values()))):.1f} a parameter), {reading(phase1)}; it {ended}. A "
        "difference is ASHEM's test perplexity less the other's: below 0 ASHEM is better."
    )


def reading(phase1: dict[str, Any]) -> str:
    """How much of what phase 1 saw was different text."""
    text, seen = phase1["train_text_tokens"], phase1["train_tokens"]
    return f"of {text:,} tokens of text, each read {seen / text:.1f} times" if text else "of text that is not known"


def phrase(found: Difference | None, other: str) -> str:
    """A verdict in words with its intervals."""
    if found is None:
        return f"not compared with {other}"
    if found.verdict == "one seed":
        return f"against {other} {found.over_seeds:+.2f} (one seed)"
    relation = {"better": "better than", "worse": "worse than"}.get(found.verdict, "not distinguishable from")
    return f"{relation} {other} ({found.over_seeds:+.2f}; over documents {found.over_documents:+.2f})"


def answer(core: Suite, setting: str) -> str:
    """The answer in one sentence, by rule: against its own block 1, and the strongest model of each budget."""
    ratio = tokens_per_parameter(next(iter(core.records[setting]["ashem"].values())))
    parts = [
        f"At {ratio:.1f} tokens of phase 1 a parameter ASHEM reaches a test perplexity of "
        f"{core.interval(setting, 'ashem'):.2f}: {phrase(shallow_gain(core, setting), 'its own block 1')}"
    ]
    for kind in ("added", "total"):
        if names := rivals(core, setting, kind):
            best = phrase(
                difference(core, setting, "ashem", names[0]), f"the best model of equal {kind} MACs, {names[0]}"
            )
            parts.append(best)
    if not (names := rivals(core, setting, "added")):
        return "; ".join(parts) + "."
    deep, ppl = difference(core, setting, "ashem" + DEEP, names[0]), core.interval(setting, "ashem", "deep_ppl")
    return f"{'; '.join(parts)}. Always deep it reaches {ppl:.2f}: {phrase(deep, names[0])}."


def when(suite: Suite) -> str:
    """Of the models of equal added MACs, how many ASHEM is better than at each point of the regime map."""
    parts = []
    for mine, words in (
        ("ashem", "ASHEM is, by tokens of phase 1 a parameter,"),
        ("ashem" + DEEP, "Always deep it is"),
    ):
        said = []
        for seen, name in by_regime(suite):
            found = [difference(suite, name, mine, other) for other in rivals(suite, name, "added")]
            wins = sum(one is not None and one.verdict == "better" for one in found)
            losses = sum(one is not None and one.verdict == "worse" for one in found)
            said.append(f"at {seen:.1f} better than {wins} of {len(found)} and worse than {losses}")
        parts.append(f"{words} {'; '.join(said)}.")
    return f"When: of the models of equal added MACs, their always-deep form counted as another, {' '.join(parts)}"


def how_far(suite: Suite) -> str:
    """What is left for block 1 to learn at each point: by how much the added budget alone would have lowered it."""
    said, learns = [], True
    for seen, name in by_regime(suite):
        mine, others = (suite.records[name].get(model, {}) for model in ("ashem", "shallow_continued"))
        if seeds := sorted(mine.keys() & others.keys()):
            before = np.mean([mine[seed]["metrics"]["shallow_ppl"] for seed in seeds])
            after = np.mean([others[seed]["metrics"]["ppl"] for seed in seeds])
            said.append(f"{100 * (1 - after / before):.1f} % at {seen:.1f}")
            learns &= bool(after < before)
    return (
        "How far block 1 is from its end: the added budget, spent on block 1 alone, lowers its test perplexity by "
        f"{', '.join(said)} tokens a parameter.{' At none of these points has it stopped learning.' if learns else ''}"
    )


def deepest(suite: Suite) -> str:
    """Whether sending every token deep is as good as any smaller share, of the shares that were swept."""
    said = []
    for seen, name in by_regime(suite):
        sweeps = [one["sweep"]["ppl"] for one in suite.records[name]["ashem"].values()]  # always deep first
        excess = [sweep[0] / min(sweep) - 1 for sweep in sweeps]
        best, most = sum(one == 0 for one in excess), 100 * max(excess)
        above = f" (elsewhere at most {most:.2f} % above)" if most else ""
        said.append(f"in {best} of {len(sweeps)} seeds at {seen:.1f}{above}")
    return (
        "Depth: of all shares of tokens that go deep all of them is the best on test text "
        f"{', '.join(said)} tokens of phase 1 a parameter."
    )


def border(seen: list[tuple[float, str]]) -> str:
    """Between which points a verdict turns from worse to better, in words; nothing if it does not, or turns back."""
    told = [(at, said) for at, said in seen if said in ("worse", "better")]
    turns = [(a, b) for (a, one), (b, other) in pairwise(told) if one != other]
    if len(turns) != 1 or told[0][1] != "worse":
        return ""
    return f", so the border lies between {turns[0][0]:.1f} and {turns[0][1]:.1f}"


def crossover(suite: Suite) -> list[str]:
    """At how many tokens per parameter ASHEM wins and loses, for each model it is compared with, and where it turns."""
    said = []
    for other in compared_in(suite):
        found = [(seen, difference(suite, name, "ashem", other)) for seen, name in by_regime(suite)]
        verdicts = [(seen, one.verdict) for seen, one in found if one]
        kinds = {"better": "better at", "worse": "worse at", "not distinguishable": "not distinguishable at"}
        kinds["one seed"] = "one seed only at"
        parts = []
        for kind, words in kinds.items():
            if where := [f"{seen:.1f}" for seen, one in verdicts if one == kind]:
                parts.append(f"{words} {', '.join(where)}")
        if parts:
            words = f"against {other}: {'; '.join(parts)} tokens of phase 1 per parameter"
            said.append(words + border(verdicts))
    return said


def leak(suite: Suite, setting: str) -> str:
    """The historical claim on validation text and the truth on test text."""
    if "leaky_validation" not in suite.models(setting):
        return "Not run."
    before = [one["phase1"]["val_ppl"] for one in suite.records[setting]["ashem"].values()]
    keys = ("val_ppl", "ppl", "val_hard_ppl_before", "val_hard_ppl_after", "hard_ppl_before", "hard_ppl_after")
    mean = {key: suite.interval(setting, "leaky_validation", key) for key in keys}
    test_before = suite.interval(setting, "ashem", "shallow_ppl")
    return (
        "Mined, trained and scored on validation text, with a trainable head and tokens alone (`leaky_validation`). It "
        f"claims a validation perplexity of {sum(before) / len(before):.2f} -> {mean['val_ppl']:.2f}, on hard tokens "
        f"{mean['val_hard_ppl_before']:.1f} -> {mean['val_hard_ppl_after']:.1f}. The truth on test text: "
        f"{test_before:.2f} -> {mean['ppl']:.2f}, on hard tokens {mean['hard_ppl_before']:.1f} -> "
        f"{mean['hard_ppl_after']:.1f}."
    )


def break_even(ledger: Ledger, deep_share: float, criterion_macs: int | None) -> str:
    """What routing costs by the criterion in use, and from which shallow ratio it spares anything."""
    even, cost = ledger.break_even_shallow_ratio(criterion_macs), ledger.flops_ratio(1 - deep_share, criterion_macs)
    said = (
        f"Routing costs less than the full model from a shallow ratio of {even:.3f} on; at {1 - deep_share:.2f} it "
        f"costs {cost:.3f} of it."
    )
    if ledger.gated:
        deep = ledger.always_deep / ledger.full
        return f"{said} The gate reads the exit's logits of every token, so always deep costs {deep:.3f}."
    return said


def provenance(suites: dict[str, Suite], outdated: dict[str, list[list[str]] | None]) -> list[str]:
    """Which revisions the records were made at, and what has changed since, by suite.

    Args:
        suites: with their records.
        outdated: of each record that is not current, what has changed; None where that cannot be told.
    """
    said = []
    for suite in suites.values():
        made = [seeds for models in suite.records.values() for name, seeds in models.items() if DEEP not in name]
        records: list[dict[str, Any]] = [record for seeds in made for record in seeds.values()]
        if records:
            revisions, old = sorted({record["revision"] for record in records}), outdated.get(suite.name, [])
            note = "; its text is not here, so whether its records are still current was not checked"
            if old is not None:
                changed = ", ".join(sorted({name for one in old for name in one}))
                note = f"; {len(old)} of its {len(records)} records are not current: {changed} changed" if old else ""
            said.append(f"metrics/evidence/{suite.name}.json, made at {', '.join(revisions)}{note}")
    said.append(
        "reproduce: `python -m stages.evidence.queue --seeds 5` (`--full`: all suites), `dvc queue start -j 2`, "
        "`python -m stages.evidence.gather`, and the first again for the later seeds; then "
        "`dvc repro stages/evidence/dvc.yaml:report`"
    )
    return said
