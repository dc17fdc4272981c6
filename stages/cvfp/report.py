"""The results page of CVFP -> metrics/cvfp/report.html, one file that opens offline, and report.md.

dvc repro stages/cvfp/dvc.yaml:report          (python -m stages.cvfp.report)
"""

import csv
import json
from pathlib import Path
from typing import Any

from lego.base.artifacts import read_json
from lego.base.harness import Stage, exit_cleanly
from lego.base.progress import share
from lego.cvfp.reports import validate
from lego.cvfp.sections import CvfpParams, load
from lego.report.page import Figure, Page, drawn, versions
from stages.cvfp.compared import FOLDER, Compared
from stages.cvfp.figures import Column, memory, perplexities, scaling, settling
from stages.cvfp.trials import shown as trials

DEGENERATE = ("constant", "identity", "token_blind", "memoryless")


def table(file: Path) -> Column:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {key: [float(row[key] or "nan") for row in rows] for key in rows[0]}


def contexts(page: Page, facts: dict[str, Any], compared: Compared, figures: dict[str, Figure]) -> None:
    page.heading("What contexts are worth")
    keys = ("ppl", "ppl_zero_contexts", "ppl_shuffled_contexts")
    rows = [["this run", *(f"{facts[key]:.2f}" if key in facts else "" for key in keys)]]
    rows += [[name, *(f"{one[key]:.2f}" for key in keys)] for name, one in compared.current.items() if keys[1] in one]
    page.table(
        ["contexts of", "as they are", "0 instead", "those of other tokens"],
        rows,
        "Held-out perplexity where the finished head gets other contexts: what it relies on.",
    )
    if said := compared.blind_heads():
        page.text(said)
    by_place = {int(key.rpartition("_")[2]): value for key, value in facts.items() if key.startswith("ppl_from_token_")}
    if by_place:
        page.table(
            ["tokens since the document began", "held-out perplexity"],
            [[f"from {low}", f"{value:.2f}"] for low, value in sorted(by_place.items())],
            "Of this run, by position.",
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


def under_line(facts: dict[str, Any], params: CvfpParams) -> str:
    """Which of the notes' lines the last change is below."""
    lines, found = params.checks.final_diff_bands, facts["final_diff_below_l2"]
    return f"below {found:g}" if found is not None else f"below none of {', '.join(f'{one:g}' for one in lines)}"


def checks(page: Page, params: CvfpParams, facts: dict[str, Any], figures: dict[str, Figure]) -> None:
    trend, phase1 = (read_json(FOLDER / f"{name}.json") for name in ("check_val_convergence", "train_phase1"))
    page.heading("Critical checks")
    lines = (FOLDER / "report.txt").read_text().strip()
    validate(lines)
    page.code(lines)
    if params.phase1.objective == "predict":
        page.text(
            "Convergence and CVFP loss of the train line are those of frozen passes over its first tokens, as no such "
            "loss is trained here."
        )
    kinds = {"rank": "effective rank", "centred_rank": "of centred rows", "participation": "participation ratio"}
    splits, d = (("train", "train"), ("val", "validation")), facts["train_dims"]
    rows = [
        [
            f"{name}, {facts[f'{prefix}_tokens']:,.0f} tokens",
            said,
            *(f"{facts[f'{prefix}_{key}{other}']:.1f}" for other in ("", "_untrained", "_embeddings", "_gaussian")),
        ]
        for prefix, name in splits
        for key, said in kinds.items()
    ]
    page.table(
        ["text", "", "contexts", "untrained", f"embeddings (of {params.model.embed_dim})", "Gaussian"],
        rows,
        f"Of {d:.0f} dimensions; ranks grow with tokens, hence references with as many.",
    )
    lines_drawn = ", ".join(f"{100 * band:.0f} %" for band in params.checks.rank_bands)
    shares = [f"{name} {100 * facts[f'{prefix}_rank'] / d:.1f} %" for prefix, name in splits]
    page.text(
        f"The notes drew lines at {lines_drawn} of the width and took less than the first as failure; here "
        f"{' and '.join(shares)}, of the untrained network {100 * facts['train_rank_untrained'] / d:.1f} %."
    )
    if "carried_rank" in phase1:
        page.text(
            "These contexts start from 0. Of a last pass that starts where the one before it ended the effective rank "
            f"is {phase1['carried_rank']:.1f}."
        )
    page.figure(figures["settling"], FOLDER)
    page.points(
        [
            f"identity: on data {facts['identity_on_data']}, on noise {facts['identity_on_noise']} "
            f"(cosine of c and f(c, t) {facts['identity_noise_cosine']:.3f})",
            f"degenerate: {', '.join(name for name in DEGENERATE if facts[f'is_{name}']) or 'none'} of "
            f"{', '.join(DEGENERATE)}; global attractor: {facts['train_attractor']} on train, {facts['val_attractor']} "
            f"on validation; zero solution: {facts['train_zero']}, {facts['val_zero']}",
            f"convergence of frozen passes: final_diff {facts['final_diff_l2']:.2e} (mean L2), passed: "
            f"{facts['converges']}, {under_line(facts, params)}; tokens that moved less than "
            f"{params.phase1.convergence_threshold:g} (MSE): "
            f"{share(facts['converged_when_frozen'], facts['frozen_tokens'])}, of the untrained network "
            f"{share(facts['untrained_converged_when_frozen'], facts['frozen_tokens'])} with final_diff "
            f"{facts['untrained_final_diff_l2']:.2e}",
            f"validation trend over {trend['tokens']:,} tokens: legacy verdict {trend['legacy']}, with level test "
            f"{trend['verdict']}",
            f"weight updates of phase 1: {facts['updates']:,}; validation text: {facts['validation_is']}",
        ]
    )


def build(params: CvfpParams, figures: dict[str, Figure], compared: Compared) -> Page:
    tokens, facts = read_json(FOLDER / "tokenize.json"), read_json(FOLDER / "evaluate.json")
    page = Page("CVFP: do contexts that settle say what comes next?")
    page.text(compared.answer(), lead=True)
    compared.write(page, figures)
    trials.write(page, params, read_json(FOLDER / "trials.json"), tokens)
    contexts(page, facts, compared, figures)
    checks(page, params, facts, figures)
    page.heading("Threats to validity")
    page.points(
        [
            f"One corpus, {tokens['train_tokens']:,} train tokens, one size; intervals are over seeds, with the text "
            "as it is.",
            f"Rates are searched on the first seed alone, {len(params.contest.lr_factors)} each; the table marks those "
            "at an end. Of `sound` and `sound_reservoir` it is the rate of phase 1, of other forms that of phase 2.",
            f"Train contexts of `seed` and `seed_untrained` are settled in {params.contest.seed_sweeps} sweeps (0 = "
            "until they rest), as their networks do not forget; test contexts are exact.",
            f"Equal tokens are not equal steps: contexts of `sound` learn in windows of {params.predict.bptt_len} "
            f"tokens, peers in windows of {params.peers.window} and end_to_end of {params.peers.end_to_end.window}; "
            "docs/results.md has what shorter ones do to the others.",
            "Equal tokens are not equal time: what a run took is in the table (one thread, others beside it), and "
            "recurrent networks of our own step in Python. Peak memory is of the whole process, PyTorch "
            "and, of `sound`, its two heads without contexts included.",
        ]
    )
    page.heading("Made with")
    page.code("\n".join(versions()))
    values = params.model_dump(exclude={"threads", "progress"})
    page.code("\n".join(f"{section} {json.dumps(one)}" for section, one in values.items()))
    return page


def draw(
    folder: Path, facts: dict[str, Any], curves: dict[str, Any], params: CvfpParams, compared: Compared
) -> dict[str, Figure]:
    """The pictures of the page, as far as there is something to show."""
    still = (curves["convergence"], curves["check_val_convergence"], params.checks.final_diff)
    figures = {"memory": memory(folder, facts, params), "settling": settling(folder, *still)}
    if compared.current:
        figures["perplexity"] = perplexities(folder, compared.intervals(), compared.ngrams())
    if compared.curves:
        figures["scaling"] = scaling(folder, compared.curves)
    return figures


def main() -> None:
    params = load()
    with Stage("cvfp/report", params.seed):
        compared = Compared(
            params, *(read_json(FOLDER / f"{name}.json") for name in ("contest", "scaling", "tokenize"))
        )
        facts, pictures = read_json(FOLDER / "evaluate.json"), FOLDER / "pictures"
        curves = {name: table(FOLDER / f"curves/{name}.csv") for name in ("convergence", "check_val_convergence")}
        figures = drawn(pictures, lambda folder: draw(folder, facts, curves, params, compared))
        build(params, figures, compared).write(FOLDER)
        print(f"{FOLDER}/report.html: {len(compared.current)} models, {len(figures)} pictures")


if __name__ == "__main__":
    exit_cleanly(main)
