"""The page of all tasks -> metrics/satipatthana/tasks/report.html, one file that opens offline, and report.md.

dvc repro stages/satipatthana/tasks/dvc.yaml:page          (python -m stages.satipatthana.tasks.page)
"""

from pathlib import Path
from typing import Any

from lego.artifacts import read_json, write_text
from lego.harness import Stage, exit_cleanly
from lego.page import Page
from lego.satipatthana.sections import WRITTEN, SatipatthanaParams, load, with_profile
from lego.stats import mean_interval, verdict
from stages.satipatthana.report import Found, interval, over_seeds, shown

FOLDER = Path("metrics/satipatthana/tasks")
WHAT = {
    "breast_cancer": "tumours by 30 features: answer or abstain",
    "wine": "three growers by 13 features, 105 rows to learn from: answer or abstain",
    "sensors": "windows of a machine in three ways of running, faults injected into test windows; LSTM",
    "regression": "recipe F: the progression of diabetes; an answer is right within half a deviation",
    "isolation": "recipe A: digits 0 to 7 are normal; a guide is told of the known anomaly 8, 9 comes in test alone",
    "rejection": "recipe B: the same without a guide, which sees normal rows alone; the known anomaly is void",
    "unsupervised": "recipe C: tumours without labels, the malignant ones among them; noise is void",
    "domain_noise": "recipe D: windows without labels; windows mixed, spliced and at another speed are void",
}
COLUMNS = {  # headings and keys, the one that decides first; risks and AURC are better low
    "classification": ("aurc", "accuracy", "ece", "auroc_correct", "risk_at_90"),
    "regression": ("aurc", "r2", "within_tolerance", "auroc_correct", "risk_at_90"),
    "anomaly": ("auprc_anomaly", "auroc_anomaly", "recall_at_1", "precision_at_100"),
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


def collected(name: str) -> tuple[str, dict[str, int], Found]:
    """Job, rows by split, and numbers by model and seed."""
    said: dict[str, Any] = read_json(FOLDER / f"{name}.json", "job", "rows", "satipatthana")
    models = {model: over_seeds(one["seeds"]) for model, one in said.items() if model not in ("job", "rows")}
    return said["job"], said["rows"], models


def compared(found: Found, job: str) -> str:
    """Trust beside the best of the other scores in the number that decides, by the rule of verdicts."""
    key = COLUMNS[job][0]
    others = [name for name in found if name != "satipatthana"]
    sign = -1 if job == "anomaly" else 1  # of a difference that is better below 0
    best = min(others, key=lambda name: sign * sum(found[name][key]))
    pairs = zip(found["satipatthana"][key], found[best][key], strict=True)
    word = verdict(mean_interval([sign * (a - b) for a, b in pairs]))
    mine, theirs = (shown(interval(found, name, key)) for name in ("satipatthana", best))
    return f"{NAMES[key]} of trust {mine}, of the best of the other scores, {best}, {theirs}: trust is {word}."


def table(page: Page, found: Found, job: str) -> None:
    """A row for each score, and one for the reconstruction error where it has numbers."""
    mine = found["satipatthana"]
    kinds = [key.removeprefix("fpr95_") for key in mine if key.startswith("fpr95_")]
    keys = [*COLUMNS[job], *(f"auroc_{kind}" for kind in kinds)]
    error = {key: mine[f"{key}_recon"] for key in keys if f"{key}_recon" in mine}
    rows = [
        [f"**{name}**" if name == "satipatthana" else name, *(shown(interval(models, name, key), 3) for key in keys)]
        for models in (found | {"its -recon_error alone": error},)
        for name in models
    ]
    header = ["score", *(NAMES[key] for key in COLUMNS[job]), *(f"AUROC {kind}" for kind in kinds)]
    page.table(header, rows, f"Mean and half a 95 % interval over {len(mine['aurc'])} seeds.")


def build(params: SatipatthanaParams) -> Page:
    page = Page("Satipatthana on other data and in other jobs")
    page.text(
        "Each task is a profile of stages/satipatthana/profiles.yaml; sizes and rates are those of digits but for what "
        "a profile changes, and nothing was searched. Scores of a plain network have its answers, not the system's.",
        lead=True,
    )
    for name in params.tasks.names:
        job, rows, found = collected(name)
        page.heading(name)
        sizes = f"{rows['train']} rows to train on, {rows['validation']} to validate, {rows['test']} to test"
        page.text(f"{WHAT.get(name, job)}; {sizes}. {compared(found, job)}")
        table(page, found, job)
    page.heading("Threats to validity")
    page.points(
        [
            "Small data; intervals are over seeds, with the rows as they are.",
            "Strangers of the kind `seen_` are of a class that training was shown, or that was among its rows.",
        ]
    )
    page.heading("Made with")
    changes = {name: with_profile(params, name).task.model_dump() for name in params.tasks.names}
    page.code("\n".join(f"{name} {task}" for name, task in changes.items()))
    return page


def main() -> None:
    params = load()
    with Stage("satipatthana/tasks/page", params.seed):
        page = build(params)
        write_text(FOLDER / "report.html", page.html())
        write_text(FOLDER / "report.md", page.markdown())
        print(f"{FOLDER}/report.html: {len(params.tasks.names)} tasks")


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
