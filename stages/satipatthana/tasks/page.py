"""The page of all tasks -> metrics/satipatthana/tasks/report.html, one file that opens offline, and report.md.

dvc repro stages/satipatthana/tasks/dvc.yaml:page          (python -m stages.satipatthana.tasks.page)
"""

from pathlib import Path
from typing import Any

from lego.base.artifacts import read_json
from lego.base.harness import Stage, exit_cleanly
from lego.report.page import Page
from lego.report.stats import mean_interval, verdict
from lego.satipatthana.sections import SatipatthanaParams, load, profiles, with_profile
from stages.satipatthana.wording import Found, interval, over_seeds, shown

FOLDER = Path("metrics/satipatthana/tasks")
OWN, ERROR, DECODER = "satipatthana", "its -recon_error alone", "its decoder's probability"
WHAT = {
    "breast_cancer": "tumours by 30 features: answer or abstain",
    "wine": "three growers by 13 features: answer or abstain",
    "sensors": "windows of a machine in three ways of running, faults injected into test windows; an LSTM reads them",
    "regression": "recipe F: the progression of diabetes in a year",
    "isolation": "recipe A: digits 0 to 7 are normal; a guide is told of the known anomaly 8, 9 comes in test alone",
    "rejection": "recipe B: the same without a guide, which sees normal rows alone; the known anomaly is void",
    "unsupervised": "recipe C: tumours without labels, the malignant ones among them; noise is void",
    "domain_noise": "recipe D: windows without labels; windows mixed, spliced and at another speed are void",
}
NAMES = {
    "aurc": "AURC",
    "accuracy": "accuracy",
    "ece": "ECE",
    "auroc_correct": "right above wrong",
    "risk_at_90": "wrong of the 90 % trusted most",
    "r2": "R²",
    "within_tolerance": "right",
    "auprc_anomaly": "average precision",
    "auroc_anomaly": "AUROC",
    "recall_at_1": "found in the first 1 %",
    "precision_at_100": "anomalies in the first 100",
}
COLUMNS = {
    "classification": ("accuracy", "ece", "auroc_correct", "aurc", "risk_at_90"),
    "regression": ("r2", "within_tolerance", "auroc_correct", "aurc", "risk_at_90"),
    "anomaly": ("auprc_anomaly", "auroc_anomaly", "recall_at_1", "precision_at_100"),
}


def collected(name: str) -> tuple[str, dict[str, int], Found]:
    """Job, rows by split, and numbers by score and seed: those of the system itself, then of the others."""
    said: dict[str, Any] = read_json(FOLDER / f"found/{name}.json", "job", "rows", OWN)
    models = {model: over_seeds(one["seeds"]) for model, one in said.items() if model not in ("job", "rows")}
    mine = models.pop(OWN)
    error = {key.removesuffix("_recon"): values for key, values in mine.items() if key.endswith("_recon")}
    found = {OWN: mine, ERROR: error}
    if said["job"] == "classification":
        found[DECODER] = {"auroc_correct": mine["auroc_correct_msp"], "aurc": mine["aurc_msp"]}
    return said["job"], said["rows"], found | models


def compared(found: Found, job: str, kinds: list[str]) -> list[str]:
    """Trust beside other scores, by the rule of verdicts: of the system's own answers, and of rows from outside."""
    said = []
    if job == "anomaly":
        said += [_beside(found, f"auroc_{kind}", higher=True) for kind in kinds]
    else:
        answers = {name: found[name] for name in found if job == "regression" or name in (OWN, DECODER)}
        said.append(_beside({name: one for name, one in answers.items() if "aurc" in one}, "aurc", higher=False))
        hardest = min(kinds, key=lambda kind: sum(found[OWN][f"auroc_{kind}"]))
        said.append(_beside(found, f"auroc_{hardest}", higher=True))
    return said


def _beside(found: Found, key: str, higher: bool) -> str:
    """Trust beside the best of the scores that have a number."""
    sign = -1 if higher else 1  # of a difference that is better below 0
    others = [name for name in found if name != OWN and key in found[name]]
    best = min(others, key=lambda name: sign * sum(found[name][key]))
    pairs = zip(found[OWN][key], found[best][key], strict=True)
    word = verdict(mean_interval([sign * (a - b) for a, b in pairs]))
    mine, theirs = (shown(interval(found, name, key)) for name in (OWN, best))
    name = NAMES.get(key, key.replace("auroc_", "AUROC "))
    return f"{name}: trust {mine}, the best of the others, {best}, {theirs}: trust is {word}"


def table(page: Page, found: Found, job: str, kinds: list[str]) -> None:
    """A row for each score."""
    keys = [*COLUMNS[job], *(f"auroc_{kind}" for kind in kinds)]
    rows = [
        [f"**{name}**" if name == OWN else name, *(shown(interval(found, name, key), 3) for key in keys)]
        for name in found
    ]
    header = ["score", *(NAMES[key] for key in COLUMNS[job]), *(f"AUROC {kind}" for kind in kinds)]
    seeds = len(found[OWN]["recon_mse"])
    page.table(header, rows, f"Mean and half a 95 % interval over those of {seeds} seeds in which a number is defined.")


def build(params: SatipatthanaParams) -> Page:
    page = Page("Satipatthana on other data and in other jobs")
    page.text(
        "Each task is a profile; sizes and rates are those of digits but for what it changes. Of classification the "
        "scores of a plain network go with its own answers, so that AURC and right above wrong compare with trust only "
        "in the system's own rows; of anomalies the other scores are not told of those that are known.",
        lead=True,
    )
    for name in params.tasks.names:
        job, rows, found = collected(name)
        kinds = [key.removeprefix("fpr95_") for key in found[OWN] if key.startswith("fpr95_")]
        page.heading(name)
        sizes = f"{rows['train']} rows to train on, {rows['validation']} to validate, {rows['test']} to test"
        tolerance = f"; an answer is right within {params.reject.tolerance:g} deviations" if job == "regression" else ""
        page.text(f"{WHAT.get(name, job)}{tolerance}; {sizes}.")
        page.points(compared(found, job, kinds))
        table(page, found, job, kinds)
    page.heading("Threats to validity")
    page.points(
        [
            "Small data; intervals are over seeds, with the rows as they are.",
            "Kinds that begin with `seen_` are of a class that training was shown, or that was among its rows.",
            "Epochs and dropout of `regression` were chosen on validation rows; `heads.bounded_context` was found "
            "missing on test rows of wine, 20 prototypes for small tables there too.",
        ]
    )
    page.heading("Made with")
    changes = profiles()
    page.code("\n".join(f"{name}: {changes[name]}" for name in params.tasks.names))
    page.code("\n".join(f"{name}: {with_profile(params, name).task.model_dump()}" for name in params.tasks.names))
    return page


def main() -> None:
    params = load()
    with Stage("satipatthana/tasks/page", params.seed):
        page = build(params)
        page.write(FOLDER)
        print(f"{FOLDER}/report.html: {len(params.tasks.names)} tasks")


if __name__ == "__main__":
    exit_cleanly(main)
