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
from lego.cvfp.contest import made_of
from lego.cvfp.reports import validate
from lego.cvfp.sections import WRITTEN, CvfpParams, load
from lego.cvfp.text import SPLITS
from lego.harness import RECORDED_PACKAGES, Stage, exit_cleanly
from lego.page import Figure, Page
from lego.stats import Interval, mean_interval, verdict
from stages.cvfp.figures import Column, memory, perplexities, settling

FOLDER = Path("metrics/cvfp")
NOT_RUN = "Not run yet: `dvc repro stages/cvfp/baselines/dvc.yaml`."
DEGENERATE = ("constant", "identity", "token_blind", "memoryless")
NGRAMS = ("unigram", "trigram", "fivegram")
FORMS = {
    "sound": "contexts trained to predict",
    "sound_reservoir": "its blocks stay as they began, its embedding learns",
    "untrained": "nothing of phase 1 is trained; what the others spend there goes into the head",
    "seed": "contexts trained by the rulings of the founding notes, on a part of the text in as many passes",
    "seed_untrained": "the network of `seed` as it began",
    "end_to_end": "the network of `sound` in one phase, by cross-entropy alone",
}


def table(file: Path) -> Column:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {key: [float(row[key] or "nan") for row in rows] for key in rows[0]}


def over_seeds(found: dict[str, Any], key: str) -> list[float]:
    return [found[f"{key}_{seed}"] for seed in range(len(found)) if f"{key}_{seed}" in found]


def rivals(found: dict[str, Any]) -> list[str]:
    """What `sound` should beat: untrained contexts, the best of the MLPs, the GRU."""
    mlps = sorted((name for name in found if name.startswith("mlp_")), key=lambda name: found[name]["ppl"])
    return [name for name in ("untrained", "sound_reservoir", *mlps[:1], "gru") if name in found]


def against(found: dict[str, Any], mine: str, other: str) -> Interval:
    """Perplexity of one model less another's, over seeds."""
    pairs = zip(over_seeds(found[mine], "ppl"), over_seeds(found[other], "ppl"), strict=False)
    return mean_interval([a - b for a, b in pairs])


def answer(found: dict[str, dict[str, Any]]) -> str:
    """One sentence with the intervals that decide it."""
    if "sound" not in found:
        return NOT_RUN
    mine, said = over_seeds(found["sound"], "ppl"), []
    for rival in rivals(found):
        difference = against(found, "sound", rival)
        said.append(f"{rival} {found[rival]['ppl']:.1f} ({difference:+.1f}: {verdict(difference)})")
    return (
        f"On text that neither phase has seen, `sound` has a perplexity of **{mean_interval(mine):.1f}** over "
        f"{len(mine)} seeds; at equal tokens and parameters: {', '.join(said)}."
    )


def row(name: str, one: dict[str, Any], outdated: bool) -> list[str]:
    """Of the table of models."""
    notes = ["rate at an end of the search"] if one["rate_at_an_end"] else []
    notes += ["**outdated**: of other text or parameters"] if outdated else []
    return [
        f"**{name}**" if name == "sound" else name,
        f"{mean_interval(over_seeds(one, 'ppl')):.2f}",
        f"{mean_interval(over_seeds(one, 'bits_per_byte')):.3f}",
        f"{one['parameters'] / 1e3:,.0f} k",
        f"{one['parameters_without_embeddings'] / 1e3:,.0f} k",
        f"{one['tokens'] / 1e6:.2f} M",
        f"{one['seconds']:.0f} s",
        f"{one['lr']:g}",
        "; ".join(notes),
    ]


def contest(
    page: Page,
    params: CvfpParams,
    found: dict[str, dict[str, Any]],
    tokens: dict[str, Any],
    figures: dict[str, Figure],
) -> None:
    page.heading("Against other models")
    if not found:
        page.text(NOT_RUN)
        return
    page.figure(figures["perplexity"], FOLDER)
    text = {split: tokens[f"{split}_sha256"] for split in SPLITS}
    rows = []
    for name in sorted(found, key=lambda one: found[one]["ppl"]):
        outdated = name not in params.contest.lr or found[name]["made_of"] != made_of(name, params, text)
        rows.append(row(name, found[name], outdated))
    for name in NGRAMS:
        ppl, bits = tokens[f"test_{name}_ppl"], tokens[f"test_{name}_bits_per_byte"]
        rows.append([name, f"{ppl:.2f}", f"{bits:.3f}", "", "", "", "", "", ""])
    header = ["model", "held-out perplexity", "bits per byte", "parameters", "without embeddings"]
    header += ["tokens in training", "a run took", "rate", ""]
    page.table(header, rows, "Held-out text, mean and 95 % interval over seeds.")
    page.points([f"`{name}`: {said}" for name, said in FORMS.items() if name in found])
    if "seed" in found and "seed_untrained" in found:
        difference = against(found, "seed", "seed_untrained")
        page.text(
            f"What training contexts by the notes' rulings changes: {difference:+.2f} in perplexity against the same "
            f"network untrained ({verdict(difference)}). Its stop rule may end it before it has read as many tokens."
        )


def contexts(page: Page, facts: dict[str, Any], found: dict[str, dict[str, Any]], figures: dict[str, Figure]) -> None:
    page.heading("What contexts are worth")
    keys = ("ppl", "ppl_zero_contexts", "ppl_shuffled_contexts")
    rows = [["this run", *(f"{facts[key]:.2f}" if key in facts else "" for key in keys)]]
    rows += [[name, *(f"{one[key]:.2f}" for key in keys)] for name, one in found.items() if keys[1] in one]
    page.table(
        ["contexts of", "as they are", "0 instead", "those of other tokens"],
        rows,
        "Held-out perplexity where the finished head gets other contexts: what it relies on.",
    )
    if "sound" in found:
        sound = found["sound"]
        page.text(
            f"Heads that were trained without contexts from the start reach {sound['ppl_trained_zero_contexts']:.2f} "
            f"(C* = 0) and {sound['ppl_trained_shuffled_contexts']:.2f} (C* shuffled), that with them "
            f"{sound['ppl']:.2f}: means over seeds, equal but for the contexts."
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
    lines_drawn = ", ".join(f"{100 * band:.0f} %" for band in params.checks.rank_bands)
    shares = [
        f"{name} {100 * facts[f'{prefix}_rank'] / d:.1f} %"
        for prefix, name in (("train", "train"), ("val", "validation"))
    ]
    page.text(
        f"The notes drew lines at {lines_drawn} of the width and took less than the first as failure; here "
        f"{' and '.join(shares)}, of the untrained network {100 * facts['train_rank_untrained'] / d:.1f} %."
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
            f"{facts['converges']}; tokens that moved less than {params.phase1.convergence_threshold:g} (MSE): "
            f"{100 * facts['converged_share']:.1f} %, of the untrained network "
            f"{100 * facts['untrained_converged_share']:.1f} % with final_diff {facts['untrained_final_diff_l2']:.2e}",
            f"validation trend: legacy verdict {trend['legacy']}, with level test {trend['verdict']}",
            f"weight updates of phase 1: {facts['updates']:,}; validation text: {facts['validation_is']}",
        ]
    )


def build(params: CvfpParams, figures: dict[str, Figure], found: dict[str, dict[str, Any]]) -> Page:
    tokens, facts = read_json(FOLDER / "tokenize.json"), read_json(FOLDER / "evaluate.json")
    page = Page("CVFP: do contexts that settle say what comes next?")
    page.text(answer(found), lead=True)
    contest(page, params, found, tokens, figures)
    contexts(page, facts, found, figures)
    checks(page, params, facts, figures)
    page.heading("Threats to validity")
    page.points(
        [
            f"One corpus, {tokens['train_tokens']:,} train tokens, one size; intervals are over seeds, with the text "
            "as it is.",
            "Rates are searched on the first seed alone, three factors each; the table marks those at an end.",
            "Equal tokens are not equal time: what a run took is in the table (one thread, others beside it), and "
            "recurrent networks of our own step in Python.",
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
                ngrams = {name: tokens[f"test_{name}_ppl"] for name in NGRAMS}
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
