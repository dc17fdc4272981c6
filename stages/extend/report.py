"""The page of an extended model -> metrics/report.html of this folder, one file that opens offline, and report.md.

dvc repro stages/extend/dvc.yaml
"""

import csv
from pathlib import Path
from typing import Any

from lego.base.artifacts import read_json
from lego.base.harness import Stage, exit_cleanly
from lego.base.params import load_params
from lego.report.page import Figure, Page, drawn, versions
from lego.report.pictures import COLOURS, picture
from stages.extend.settings import RivalParams, load_settings

FOLDER = Path("metrics")
OURS = {
    "base": "the given model",
    "routed": "extended, routed",
    "deep": "extended, always deep",
    "deep_without_gate": "the same without gate",
}
PHASES = ("compute_threshold", "collect_hard", "train_phase2")
HOW = ("prefill_batch_1", "prefill_batch_8", "decode_batch_1", "decode_batch_8")


def measured(kind: str, *names: str) -> list[dict[str, Any]]:
    """What this machine's runs left of times or memory; nothing of those that came from a cache."""
    files = [Path("data") / kind / f"{name}.json" for name in names]
    return [read_json(file) for file in files if file.exists()]


def what(rival: RivalParams) -> str:
    """What a rival trains, in words."""
    layers = {"last_layers": "last", "new_layers": "new"}
    if rival.trains in layers:
        return f"{rival.size} {layers[rival.trains]} layers"
    return "all weights" if rival.trains == "all" else f"LoRA, rank {rival.size}"


def row(name: str, trains: str, one: dict[str, Any], base: dict[str, Any], told: list[str]) -> list[str]:
    changed = [f"{100 * (one[key] / base[key] - 1):+.1f} %" for key in ("ppl", "other_ppl")]
    return [name, trains, f"{one['ppl']:.2f}", changed[0], f"{one['other_ppl']:.2f}", changed[1], *told]


def quality(
    page: Page, found: dict[str, Any], rivals: dict[str, RivalParams], results: dict[str, dict[str, Any]]
) -> None:
    models, base, block = found["models"], found["models"]["base"], found["block"]
    rows = []
    for key, name in OURS.items():
        one = models[key]
        trained = "" if key == "base" else f"{block['trainable_parameters'] / 1e6:.2f} M"
        macs = "" if key == "base" else "1.00"
        same = f"{100 * (1 - one['other_deep_share']):.0f} %"
        rows.append(
            row(f"**{name}**", "block 2" if trained else "", one, base, [same, trained, macs, f"{one['macs']:.2f}"])
        )
    for name, one in results.items():
        trained, macs = one["trainable_parameters"], one["added_macs"] / block["added_macs"]
        told = ["0 %", f"{trained / 1e6:.2f} M", f"{macs:.2f}", "1.00" if rivals[name].trains != "new_layers" else ""]
        rows.append(row(name, what(rivals[name]), one, base, told))
    header = [
        "model",
        "trains",
        "test ppl",
        "",
        "other text",
        "",
        "unchanged there",
        "trained",
        "MACs",
        "inference MACs",
    ]
    page.table(
        header,
        rows,
        "Perplexity on test text of the kind that was learned and on other text, and their change; the share of tokens "
        "there whose logits are the given model's bit for bit; trained numbers; MACs of training as a multiple of "
        "mining and phase 2, and of inference as a multiple of the given model's. Fitting gate and criterion and "
        f"setting the threshold on calibration text costs {block['fit_macs'] / block['added_macs']:.2f} of that budget "
        "on top, which no rival has; always deep without gate does without.",
    )


def costs(page: Page, found: dict[str, Any], rivals: dict[str, RivalParams]) -> None:
    rows = []
    mining, memory = measured("timing", *PHASES), measured("memory", *PHASES)
    if len(mining) == len(memory) == len(PHASES):
        parts = ["-" if one["continued"] else f"{one['seconds']:.0f} s" for one in mining]
        rows.append(
            ["block 2: threshold, mining, phase 2", " + ".join(parts), f"{max(one['peak_mib'] for one in memory):.0f}"]
        )
    for name in rivals:
        for one, peak in zip(measured("timing/extend", name), measured("memory", name), strict=False):
            seconds = f"{one['train_seconds']:.0f} s" if "train_seconds" in one else "-"
            rows.append([name, seconds, f"{peak['peak_mib']:.0f}"])
    if rows:
        caption = "On the machine that made this page, once; - where a run went on after it had been stopped."
        page.table(["training", "time", "peak memory, MiB"], rows, caption)
    latency = next(iter(measured("timing/extend", "evaluate")), {}).get("latency")
    if latency:
        rows = [[name, *(f"{latency[how][name]:.2f}" for how in HOW)] for name in ("routed", "deep")]
        page.table(
            ["answers", "reading, batch 1", "batch 8", "writing, batch 1", "batch 8"],
            rows,
            "Median time as a multiple of the given model's, pairs taken in turn.",
        )
    page.text(f"Block 2 weighs {found['block']['megabytes']:.1f} MB in float32; the given model stays as it is.")


def shares(folder: Path, rows: list[dict[str, str]], results: dict[str, dict[str, Any]]) -> Figure:
    """Perplexity against the share of deep tokens, of each criterion with the gate and without."""
    with picture(folder, "shares", height=5.0) as axes:
        kinds = sorted({(row["criterion"], row["gated"]) for row in rows}, reverse=True)
        for number, (criterion, gated) in enumerate(kinds):
            mine = [row for row in rows if (row["criterion"], row["gated"]) == (criterion, gated)]
            label = f"{criterion}{', gate' if gated == '1' else ''}"
            x, y = ([float(row[key]) for row in mine] for key in ("deep_share", "ppl"))
            axes.plot(x, y, color=COLOURS[number], marker="o", markersize=4, label=label)
        for number, (name, one) in enumerate(results.items()):
            axes.axhline(one["ppl"], color="#777777", linewidth=0.8, linestyle=("-", "--", ":", "-.")[number % 4])
            axes.text(1.01, one["ppl"], name, fontsize=7, va="center")
        axes.set_xlabel("share of test tokens that go deep")
        axes.set_ylabel("test perplexity")
        axes.legend(fontsize=9)
    caption = "Test perplexity by the share of tokens that go deep; lines across are the rivals."
    return Figure(folder / "shares.svg", "Perplexity against the share of deep tokens", caption)


def main() -> None:
    params, settings = load_params(), load_settings()
    with Stage("extend/report"):
        found = read_json("metrics/extend.json")
        results = {name: read_json(f"metrics/rivals/{name}.json") for name in settings.rivals}
        with Path("data/curves/extend.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        figures = drawn(FOLDER / "pictures", lambda folder: {"shares": shares(folder, rows, results)})
        page = Page("Extending a given model")
        page.text(answer(found, results), lead=True)
        page.heading("Quality and retention")
        quality(page, found, settings.rivals, results)
        page.figure(figures["shares"], FOLDER)
        page.heading("Time, memory, weight")
        costs(page, found, settings.rivals)
        page.heading("Made with")
        facts = read_json("data/facts/tokenize.json")
        learned = f"{facts['train_tokens']:,} train tokens, {facts['test_tokens']:,} of test; seed {params.seed}"
        page.points([f"`dvc repro stages/extend/dvc.yaml`: {settings.base.source}, {learned}", *versions()])
        page.write(FOLDER)


def answer(found: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """What came out, in three sentences."""
    base, routed, deep = (found["models"][name] for name in ("base", "routed", "deep"))
    name = min(results, key=lambda one: results[one]["ppl"])
    best = results[name]
    return (
        f"The given model has a test perplexity of {base['ppl']:.2f}; extended, {deep['ppl']:.2f} with all tokens deep "
        f"and {routed['ppl']:.2f} with {100 * routed['deep_share']:.0f} % of them. The best of what users would do "
        f"instead, {name}, has {best['ppl']:.2f}: always deep lies {100 * (deep['ppl'] / best['ppl'] - 1):+.1f} % from "
        f"it. On text of another kind the given model has {base['other_ppl']:.2f}, routed {routed['other_ppl']:.2f}, "
        f"always deep {deep['other_ppl']:.2f}, {name} {best['other_ppl']:.2f}."
    )


if __name__ == "__main__":
    exit_cleanly(main)
