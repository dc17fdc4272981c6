"""The results page of CVFP -> metrics/cvfp/report.html, one file that opens offline, and report.md.

dvc repro stages/cvfp/dvc.yaml:report          (python -m stages.cvfp.report)
"""

import csv
import json
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lego.artifacts import atomic_folder, read_json, write_text
from lego.cvfp.reports import validate
from lego.cvfp.sections import WRITTEN, CvfpParams, load
from lego.harness import RECORDED_PACKAGES, Stage, exit_cleanly
from lego.page import Figure, Page
from lego.stats import Interval, mean_interval, verdict
from stages.cvfp.figures import Column, memory, perplexities, settling

FOLDER = Path("metrics/cvfp")
RIVALS = ("untrained", "mlp_4", "gru")  # those that `sound` should beat
NOT_RUN = "Not run yet: `dvc repro stages/cvfp/baselines/dvc.yaml`."


def table(file: Path) -> Column:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {key: [float(row[key] or "nan") for row in rows] for key in rows[0]}


def over_seeds(found: dict[str, Any], key: str) -> list[float]:
    return [found[f"{key}_{seed}"] for seed in range(len(found)) if f"{key}_{seed}" in found]


def answer(found: dict[str, dict[str, Any]]) -> str:
    """One sentence with the intervals that decide it."""
    if "sound" not in found:
        return NOT_RUN
    mine, said = over_seeds(found["sound"], "ppl"), []
    for rival in RIVALS:
        if rival in found:
            theirs = over_seeds(found[rival], "ppl")
            difference = mean_interval([a - b for a, b in zip(mine, theirs, strict=False)])
            said.append(f"{rival} {mean_interval(theirs):.1f} ({difference:+.1f}: {verdict(difference)})")
    return (
        f"On text that neither phase has seen, `sound` has a perplexity of **{mean_interval(mine):.1f}** over "
        f"{len(mine)} seeds; at equal tokens and parameters: {', '.join(said)}."
    )


def contest(page: Page, found: dict[str, dict[str, Any]], tokens: dict[str, Any], figures: dict[str, Figure]) -> None:
    page.heading("Against other models")
    if not found:
        page.text(NOT_RUN)
        return
    page.figure(figures["perplexity"], FOLDER)
    rows = []
    for name in sorted(found, key=lambda one: found[one]["ppl"]):
        one = found[name]
        ends = ", rate at an end of the search" if one["rate_at_an_end"] else ""
        rows.append(
            [
                f"**{name}**" if name == "sound" else name,
                f"{mean_interval(over_seeds(one, 'ppl')):.2f}",
                f"{mean_interval(over_seeds(one, 'bits_per_byte')):.3f}",
                f"{one['parameters']:,.0f}",
                f"{one['tokens'] / 1e6:.1f} M",
                f"{one['lr']:g}{ends}",
            ]
        )
    for name in ("unigram", "fivegram"):
        ppl, bits = tokens[f"test_{name}_ppl"], tokens[f"test_{name}_bits_per_byte"]
        rows.append([name, f"{ppl:.2f}", f"{bits:.3f}", "", "", ""])
    header = ["model", "held-out perplexity", "bits per byte", "parameters", "tokens in training", "rate"]
    page.table(header, rows, "Held-out text, mean and 95 % interval over seeds; every model reads as many tokens.")
    page.text(
        "`untrained` is the same network with the weights it began with, and the same head: what training contexts is "
        "worth is the difference. `seed` trains contexts by the rulings of the founding notes, its head as `sound`'s; "
        "it reads as many tokens, in ten passes over a fifth of the text."
    )


def contexts(page: Page, facts: dict[str, Any], found: dict[str, dict[str, Any]], figures: dict[str, Figure]) -> None:
    page.heading("What contexts are worth")
    header = ["contexts of", "as they are", "0 instead", "those of other tokens"]
    rows = [["this run", *(f"{facts[k]:.2f}" for k in ("ppl", "ppl_zero_contexts", "ppl_shuffled_contexts"))]]
    for name, one in found.items():
        if "ppl_zero_contexts" in one:
            rows.append([name, *(f"{one[k]:.2f}" for k in ("ppl", "ppl_zero_contexts", "ppl_shuffled_contexts"))])
    page.table(
        header,
        rows,
        "Held-out perplexity where the finished head gets other contexts: what it relies on.",
    )
    page.figure(figures["memory"], FOLDER)
    forgets = "not within the tokens tried" if facts["forgetting"] is None else f"{facts['forgetting']} tokens"
    page.points(
        [
            f"cosine for the same context and another token {facts['same_context']:.3f}, for the same token and "
            f"another context {facts['same_token']:.3f}",
            f"two starts agree after: {forgets}; largest Lyapunov exponent {facts['lyapunov']:.3f} nats a token; "
            f"memory capacity {facts['memory_capacity']:.2f}",
        ]
    )


def checks(page: Page, params: CvfpParams, facts: dict[str, Any], figures: dict[str, Figure]) -> None:
    trend = read_json(FOLDER / "check_val_convergence.json")
    page.heading("Critical checks")
    lines = (FOLDER / "report.txt").read_text().strip()
    validate(lines)
    page.code(lines)
    header = ["effective rank", "contexts", "untrained", "embeddings", "Gaussian", "centred", "participation"]
    rows = []
    for prefix, name in (("train", "train"), ("val", "validation")):
        keys = ("rank", "rank_untrained", "rank_embeddings", "rank_gaussian", "centred_rank", "participation")
        rows.append([name, *(f"{facts[f'{prefix}_{key}']:.1f}" for key in keys)])
        rows[-1][3] += f" of {params.model.embed_dim}"
    n, d = facts["train_tokens"], facts["train_dims"]
    page.table(
        header, rows, f"Of {n:,.0f} tokens and {d:.0f} dimensions each; rank grows with tokens, hence the references."
    )
    page.figure(figures["settling"], FOLDER)
    page.points(
        [
            f"identity: on data {facts['identity_on_data']}, on noise {facts['identity_on_noise']} "
            f"(cosine of c and f(c, t) {facts['identity_noise_cosine']:.3f})",
            f"convergence of frozen passes: final_diff {facts['final_diff_l2']:.2e} (mean L2), passed: "
            f"{facts['converges']}",
            f"validation trend: legacy verdict {trend['legacy']}, with level test {trend['verdict']}",
            f"weight updates of phase 1: {facts['updates']:,}; validation text: {facts['validation_is']}",
        ]
    )


def build(params: CvfpParams, figures: dict[str, Figure], found: dict[str, dict[str, Any]]) -> Page:
    tokens, facts = read_json(FOLDER / "tokenize.json"), read_json(FOLDER / "evaluate.json")
    page = Page("CVFP: do contexts that settle say what comes next?")
    page.text(answer(found), lead=True)
    contest(page, found, tokens, figures)
    contexts(page, facts, found, figures)
    checks(page, params, facts, figures)
    page.heading("Threats to validity")
    page.points(
        [
            f"One corpus, {tokens['train_tokens']:,} train tokens, one size; intervals are over seeds, with the text "
            "as it is.",
            "Rates are searched on the first seed alone, three factors each; the table marks those at an end.",
            "Equal tokens are not equal time: recurrent networks of our own step in Python.",
        ]
    )
    page.heading("Made with")
    versions = {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}}
    page.code("\n".join(f"{name} {number}" for name, number in versions.items()))
    values = params.model_dump(exclude={"threads", "progress"})
    page.code("\n".join(f"{section} {json.dumps(one)}" for section, one in values.items()))
    return page


def main() -> None:
    params = load()
    with Stage("cvfp/report", params.seed):
        found, tokens = read_json(FOLDER / "contest.json"), read_json(FOLDER / "tokenize.json")
        facts, pictures = read_json(FOLDER / "evaluate.json"), FOLDER / "pictures"
        curves = {name: table(FOLDER / f"curves/{name}.csv") for name in ("convergence", "check_val_convergence")}
        with atomic_folder(pictures) as folder:
            drawn = {
                "memory": memory(folder, facts, params),
                "settling": settling(
                    folder, curves["convergence"], curves["check_val_convergence"], params.checks.final_diff
                ),
            }
            if found:
                ngrams = {name: tokens[f"test_{name}_ppl"] for name in ("unigram", "fivegram")}
                intervals: dict[str, Interval] = {
                    name: mean_interval(over_seeds(one, "ppl")) for name, one in found.items()
                }
                drawn["perplexity"] = perplexities(folder, intervals, ngrams)
        figures = {name: replace(one, file=pictures / one.file.name) for name, one in drawn.items()}
        page = build(params, figures, found)
        write_text(FOLDER / "report.html", page.html())
        write_text(FOLDER / "report.md", page.markdown())
        print(f"{FOLDER}/report.html: {len(found)} models, {len(figures)} pictures")


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
