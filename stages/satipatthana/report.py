"""The results page of Satipatthana -> metrics/satipatthana/report.html, one file that opens offline, and report.md.

dvc repro stages/satipatthana/dvc.yaml:report          (python -m stages.satipatthana.report)
"""

import json
import math
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lego.base.artifacts import atomic_folder, read_json, write_text
from lego.base.harness import RECORDED_PACKAGES, Stage, exit_cleanly
from lego.report.page import Figure, Page
from lego.report.stats import Interval, mean_interval, verdict
from lego.satipatthana.evaluation import SWEEP
from lego.satipatthana.jobs import classification_only
from lego.satipatthana.sections import WRITTEN, SatipatthanaParams, load
from lego.satipatthana.targets import AHEAD, FAR, SUCCESSOR, less_recon, reproduced, targets
from stages.satipatthana.figures import abstaining, settling, strangers, trust_by_path
from stages.satipatthana.latency import latencies

FOLDER = Path("metrics/satipatthana")
Found = dict[str, dict[str, list[Any]]]
OTHERS = {"threads", "workers", "tasks", "bridge"}  # parameters that change nothing here
PARTS = {
    "all_features": "a head as the one in use",
    "without_log": "the three features that need no way: entropy, nearest prototype and reconstruction error",
    "latent": "the latent z alone",
    "recon_error": "no head: the reconstruction error",
    "without_vicara": "all features of a system without the loop, trained whole: states stay where they start",
}

THREATS = [
    "One small task; intervals are over seeds, with the rows as they are.",
    "Few test rows are answered wrongly: AUROC of right above wrong and AURC rest on a handful of them.",
    "void_target and trust_limit were chosen on validation rows with noise of 0.3, which is the kind of `noisy_0.5`; "
    "near strangers informed the choice of prototypes.",
    "A mismatch of state and way cannot occur in use; it is a training signal.",
]


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each metric's values by seed."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def collected(params: SatipatthanaParams) -> Found:
    """Metrics by model and seed: the system, compat, the peers."""
    seeds = read_json(FOLDER / "seeds.json")
    found = {"satipatthana": over_seeds([seeds[str(seed)] for seed in range(params.seeds)])}
    found["compat"] = over_seeds(read_json(FOLDER / "compat.json", "seeds")["seeds"])
    for name in params.peers.names:
        found[name] = over_seeds(read_json(FOLDER / f"peers/{name}.json", "seeds")["seeds"])
    return found


def interval(found: Found, model: str, key: str) -> Interval | None:
    values = [value for value in found[model].get(key, []) if value is not None]
    return mean_interval(values) if values else None


def by_seed(found: Found, model: str, key: str) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in found[model][key])


def shown(value: Interval | None, digits: int = 4) -> str:
    if value is None:
        return ""
    half = (value.high - value.low) / 2
    return f"{value.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else " (one seed)")


def ahead(found: Found, key: str, higher_is_better: bool) -> list[str]:
    """Peers whose number is better than the system's, with intervals over seeds that exclude no difference."""
    mine, names = found["satipatthana"][key], []
    for name in found:
        theirs = found[name].get(key)
        if name in ("satipatthana", "compat") or theirs is None:
            continue
        pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
        if pairs and verdict(mean_interval([a - b if higher_is_better else b - a for a, b in pairs])) == "better":
            names.append(name)
    return names


def hardest_of(found: Found, kinds: list[str]) -> str:
    """The kind of strangers that trust tells worst."""
    return min(kinds, key=lambda kind: sum(found["satipatthana"][f"auroc_{kind}"]))


def apart(difference: Interval) -> str:
    """A difference in a number that should be high, with its interval and whether that excludes 0."""
    word = {"better": "lower", "worse": "higher"}.get(verdict(difference), verdict(difference))
    return f"{difference:+.4f} ({word})"


def answer(found: Found, kinds: list[str]) -> str:
    """The hardest strangers with the best of the compared scores, and every number in which a peer is ahead."""
    mine, hardest = found["satipatthana"], hardest_of(found, kinds)
    peers = [name for name in found if name not in ("satipatthana", "compat")]
    best = max(peers, key=lambda name: sum(found[name][f"auroc_{hardest}"]))
    pairs = zip(mine[f"auroc_{hardest}"], found[best][f"auroc_{hardest}"], strict=True)
    difference = mean_interval([a - b for a, b in pairs])
    word = {"better": "worse", "worse": "better"}.get(verdict(difference), verdict(difference))  # higher is better here
    mine_shown, theirs = (shown(interval(found, name, f"auroc_{hardest}")) for name in ("satipatthana", best))
    keys = ("accuracy", "auroc_correct", "aurc", "ece", *(f"auroc_{kind}" for kind in kinds))
    losses = {key: ahead(found, key, higher_is_better=key not in ("aurc", "ece")) for key in keys}
    lost = "; ".join(f"{key} ({', '.join(names)})" for key, names in losses.items() if names)
    return (
        f"Trust tells the hardest strangers ({hardest}) from test rows with an AUROC of **{mine_shown}**; the best of "
        f"the compared scores, {best}, with {theirs} ({difference:+.4f}: {word}). Peers that are ahead over the seeds: "
        f"{lost or 'none in any column'}."
    )


def worth(seeds: dict[str, list[dict[str, float]]], kinds: list[str]) -> str:
    """Which parts can be left out without a loss: mean AUROC over the kinds, with intervals over seeds."""
    mean = {
        name: [sum(one[f"auroc_{kind}"] for kind in kinds) / len(kinds) for one in rows] for name, rows in seeds.items()
    }
    said = []
    for name in PARTS:
        if name in mean and name != "all_features" and "all_features" in mean:
            difference = mean_interval([a - b for a, b in zip(mean[name], mean["all_features"], strict=True)])
            said.append(f"{name} {apart(difference)}")
    return f"Mean AUROC over the kinds, less that of all features: {'; '.join(said)}." if said else ""


def asked(page: Page, found: Found) -> None:
    """What the specification asks of digits, line by line, and what the original measured (section 11)."""
    mine, old = (means_of(found, name) for name in ("satipatthana", "compat"))
    page.heading("What was asked")
    with_intervals = {
        less_recon(kind): over_recon(found, kind) for kind in (*AHEAD, *FAR) if f"auroc_{kind}" in found["satipatthana"]
    }
    rows = [
        [one.name, with_intervals.get(one.name, f"{one.value:.4f}"), one.asked(), "yes" if one.met else "**no**"]
        for one in targets(mine)
    ]
    page.table(
        ["of the system", "mean over seeds", "asked", "met"],
        rows,
        "Targets of the specification, section 11, by their means; of trust beside the reconstruction error alone with "
        "95 % intervals over seeds.",
    )
    rows = []
    for key, (value, reference, within) in reproduced(old).items():
        later = f"{SUCCESSOR[key]:.3f}" if key in SUCCESSOR else ""
        seeds = by_seed(found, "compat", key)
        rows.append([key, f"{value:.3f}", seeds, f"{reference:.3f}", "yes" if within else "**no**", later])
    page.table(
        ["of compat", "mean", "by seed", "v4.0", "reproduced", "v4.1"],
        rows,
        "The original (v4.0): means of 3 seeds, of aux_accuracy one seed; reproduced: within two of its deviations "
        "where it has one, or within 0.05. Stages 0 and 1 of its successor (v4.1) are the same, so that where the two "
        "differ in what comes of them, seeds do.",
    )


def over_recon(found: Found, kind: str) -> str:
    """Trust's AUROC less that of the reconstruction error, with its interval over seeds and what that says."""
    mine = found["satipatthana"]
    difference = mean_interval([a - b for a, b in zip(mine[f"auroc_{kind}"], mine[f"auroc_{kind}_recon"], strict=True)])
    return apart(difference)


def more(found: Found, kinds: list[str]) -> tuple[list[str], list[list[str]], str]:
    """Numbers that the tables above leave out, on the hardest strangers."""
    hardest = hardest_of(found, kinds)
    keys = {"eaurc": "E-AURC", "augrc": "AUGRC", "nll": "NLL", "brier": "Brier"}
    keys |= {"nll_before_temperature": "NLL, temperature 1", "brier_before_temperature": "Brier, temperature 1"}
    keys |= {f"fpr95_{hardest}": "FPR95", f"aupr_{hardest}": "AUPR, known", f"aupr_out_{hardest}": "AUPR, strangers"}
    rows = [[name, *(shown(interval(found, name, key)) for key in keys)] for name in found]
    return ["model", *keys.values()], rows, f"The last three of {hardest}; peers have no temperature but their own."


def means_of(found: Found, model: str) -> dict[str, float]:
    """Mean over the seeds in which a number is defined."""
    return {key: one.mean for key in found[model] if (one := interval(found, model, key))}


def ablations(page: Page, params: SatipatthanaParams, kinds: list[str]) -> None:
    """What the parts of the trust are worth, and what an answer costs."""
    said = read_json(FOLDER / "ablations.json", "means", "macs", "seeds")
    page.heading("What the parts are worth")
    keys = ("aurc", "auroc_correct", *(f"auroc_{kind}" for kind in kinds))
    rows = [
        [name, *("" if one[key] is None else f"{one[key]:.4f}" for key in keys)] for name, one in said["means"].items()
    ]
    header = ["trust from", "AURC", "right above wrong", *(f"AUROC {kind}" for kind in kinds)]
    page.table(
        header, rows, f"Means over {len(said['seeds']['recon_error'])} seeds; heads trained again on stored rows."
    )
    page.points([f"`{name}`: {what}" for name, what in PARTS.items() if name in said["means"]])
    page.text(worth(said["seeds"], kinds))
    costs = said["macs"]
    page.text(
        f"An answer with its trust takes {costs['satipatthana'] / 1e3:,.0f} thousand multiply-accumulates, "
        f"{costs['satipatthana'] / costs['plain']:.1f} times those of the plain network; an ensemble "
        f"{costs['ensemble'] / costs['plain']:.0f} times. Time does not follow these counts, as the system steps and "
        f"each step is small: {'; '.join(in_time(rows, one) for rows, one in latencies(params).items())}."
    )


def in_time(rows: int, took: dict[str, float]) -> str:
    """What answers to so many rows take in seconds, by model, in words."""
    mine = took["satipatthana"]
    what = "1 row takes" if rows == 1 else f"{rows:,} rows take"
    return (
        f"{what} {1000 * mine:.1f} ms, {mine / took['plain']:.1f} times the plain network and "
        f"{mine / took['ensemble']:.1f} times the ensemble"
    )


def compared(page: Page, params: SatipatthanaParams, found: Found, kinds: list[str], figure: Figure) -> None:
    """Every model on every kind of strangers, and on its own mistakes."""
    page.heading("Strangers and mistakes")
    header = ["model", "accuracy", "right above wrong", "AURC", "ECE", *(f"AUROC {kind}" for kind in kinds)]
    keys = ("accuracy", "auroc_correct", "aurc", "ece", *(f"auroc_{kind}" for kind in kinds))
    rows = [
        [f"**{name}**" if name == "satipatthana" else name, *(shown(interval(found, name, key)) for key in keys)]
        for name in found
    ]
    recon = ["its -recon_error alone", "", "", "", ""]
    rows.insert(1, recon + [shown(interval(found, "satipatthana", f"auroc_{kind}_recon")) for kind in kinds])
    seeds = len(found["satipatthana"]["accuracy"])
    page.table(
        header, rows, f"Mean and half a 95 % interval over {seeds} seeds; trust of the system, the score of a peer."
    )
    page.figure(figure, FOLDER)
    page.text(
        f"Stage 2 is trained with strangers of the kinds {', '.join(params.void.kinds)}, of which none is tested, and "
        "with noise of known severity, which `noisy_0.5` is too; of the peers `outlier_exposure` alone is trained with "
        "these strangers, none with noise. `compat` is what the founding note and the original describe, by this code."
    )


def answered(page: Page, params: SatipatthanaParams, found: Found, figure: Figure) -> None:
    """What abstaining by the threshold comes to."""
    page.heading("Abstaining")
    keys = ("coverage", "risk_of_accepted", "risk_at_80", "risk_at_90", "risk_at_95", "trust_ece_calibrated")
    page.table(
        ["", *keys],
        [[name, *(shown(interval(found, name, key)) for key in keys)] for name in ("satipatthana", "compat")],
        f"Threshold from validation rows by the rule {params.reject.rule} {params.reject.wanted:g}.",
    )
    page.figure(figure, FOLDER)


def fixed_point(page: Page, found: Found, figure: Figure) -> None:
    """What more steps change."""
    page.heading("The fixed point")
    page.figure(figure, FOLDER)
    keys = ("last_step", "recon_mse", "mean_steps", "probe_perplexity", "distinct_20T")
    page.table(
        ["", *keys],
        [[name, *(shown(interval(found, name, key), 3) for key in keys)] for name in ("satipatthana", "compat")],
        "Relative length of a row's last step, reconstruction error of the settled state, steps, perplexity of the "
        "probes nearest to it, share of distinct states after twenty times as many steps with the stop rule off.",
    )
    mine = means_of(found, "satipatthana")
    sweep = [f"{mine[f'accuracy_{factor}T']:.3f} at {factor} T" for factor in SWEEP]
    page.text(
        f"With the stop rule off the decoder, which reads the way as well, is right for {', '.join(sweep)}: it has "
        "never seen a way that goes on after the state rests. In use the rule ends it there."
    )


def build(params: SatipatthanaParams, found: Found, figures: dict[str, Figure]) -> Page:
    """The whole page."""
    kinds = [key.removeprefix("fpr95_") for key in found["satipatthana"] if key.startswith("fpr95_")]
    page = Page("Satipatthana: does a network that settles know what it does not know?")
    page.text(answer(found, kinds), lead=True)
    compared(page, params, found, kinds, figures["strangers"])
    if params.task.name == "digits":
        asked(page, found)
    page.table(*more(found, kinds))
    answered(page, params, found, figures["abstaining"])
    ablations(page, params, kinds)
    fixed_point(page, found, figures["settling"])
    page.heading("Trust by path")
    page.figure(figures["paths"], FOLDER)
    page.heading("Threats to validity")
    page.points(THREATS)
    page.heading("Made with")
    versions = {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}}
    page.code("\n".join(f"{name} {number}" for name, number in versions.items()))
    page.code("\n".join(f"{section} {json.dumps(one)}" for section, one in params.model_dump(exclude=OTHERS).items()))
    return page


def main() -> None:
    params = load()
    classification_only(params, "the page")
    with Stage("satipatthana/report", params.seed, params.threads):
        found, pictures = collected(params), FOLDER / "pictures"
        with atomic_folder(pictures) as folder:
            drawn = {
                "strangers": strangers(folder, found),
                "settling": settling(folder, found, SWEEP),
                "paths": trust_by_path(folder, found),
                "abstaining": abstaining(folder, found),
            }
        figures = {name: replace(one, file=pictures / one.file.name) for name, one in drawn.items()}
        page = build(params, found, figures)
        write_text(FOLDER / "report.html", page.html())
        write_text(FOLDER / "report.md", page.markdown())
        print(f"{FOLDER}/report.html: {len(found)} models, {len(figures)} pictures")


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
