"""The page of an extended model -> metrics/report.html of this folder, one file that opens offline, and report.md.

dvc repro stages/extend/dvc.yaml
"""

import csv
import json
from pathlib import Path
from typing import Any

from lego.base.artifacts import read_json
from lego.base.harness import Stage, exit_cleanly
from lego.base.params import load_params
from lego.report.page import Figure, Page, drawn, versions
from lego.report.pictures import COLOURS, picture
from stages.extend.settings import RivalParams, Settings, by_key, load_settings

Found = dict[str, dict[str, Any]]

FOLDER = Path("metrics")
OURS = {
    "base": "the given model",
    "routed": "extended, routed",
    "deep": "extended, always deep",
    "deep_without_gate": "extended, always deep, no gate",
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


def millions(numbers: int) -> str:
    return f"{numbers / 1e6:.3g} M"


def row(name: str, trains: str, one: dict[str, Any], base: dict[str, Any], told: list[str]) -> list[str]:
    changed = [f"{100 * (one[key] / base[key] - 1):+.1f} %" for key in ("ppl", "other_ppl")]
    return [name, trains, f"{one['ppl']:.2f}", changed[0], f"{one['other_ppl']:.2f}", changed[1], *told]


def of_block(name: str, found: dict[str, Any], changes: str, budget: float) -> list[list[str]]:
    """Rows of a block, with and without what routes its tokens.

    Args:
        name: of the block.
        found: its metrics.
        changes: what it changes under root.
        budget: MACs that the default block's training took.
    """
    models, block, rows = found["models"], found["block"], list[list[str]]()
    gated = models["deep"]["macs"] != models["deep_without_gate"]["macs"]  # which costs the exit's head
    for key in ("routed", "deep", "deep_without_gate")[: 2 + gated]:
        one, title = models[key], OURS[key] if name == "default" else f"{name}, {OURS[key].partition(', ')[2]}"
        title += " (mined on validation text)" if block["leaky"] else ""
        trained, macs = millions(block["trainable_parameters"]), f"{block['added_macs'] / budget:.2f}"
        told = [f"{100 * (1 - one['other_deep_share']):.0f} %", trained, macs, f"{one['macs']:.2f}"]
        rows.append(row(f"**{title}**", "" if rows else changes, one, models["base"], told))
    return rows


def quality(page: Page, blocks: Found, settings: Settings, results: Found) -> None:
    found, rivals = blocks["default"], settings.rivals
    base, block = found["models"]["base"], found["block"]
    rows = [row(f"**{OURS['base']}**", "", base, base, ["100 %", "", "", f"{base['macs']:.2f}"])]
    for name, one in blocks.items():
        changes = by_key(settings.blocks.get(name, {}))
        told = ", ".join(f"{key} {json.dumps(value)}" for key, value in changes.items())
        rows += of_block(name, one, told or "block 2", block["added_macs"])
    for name, one in results.items():
        macs, inference = one["added_macs"] / block["added_macs"], "" if rivals[name].trains == "new_layers" else "1.00"
        more = ["0 %", millions(one["trainable_parameters"]), f"{macs:.2f}", inference]
        rows.append(row(name, what(rivals[name]), one, base, more))
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
        "block 2's mining and phase 2, and of inference as a multiple of the given model's. Fitting block 2's gate and "
        f"criterion and setting its threshold on calibration text costs {block['fit_macs'] / block['added_macs']:.2f} "
        "of that budget on top, which no rival has; always deep without gate does without.",
    )


def costs(page: Page, blocks: Found, rivals: dict[str, RivalParams]) -> None:
    rows = []
    mining, memory = measured("timing", *PHASES), measured("memory", *PHASES)
    if len(mining) == len(memory) == len(PHASES):
        parts = ["-" if one["continued"] else f"{one['seconds']:.0f} s" for one in mining]
        rows.append(
            ["block 2: threshold, mining, phase 2", " + ".join(parts), f"{max(one['peak_mib'] for one in memory):.0f}"]
        )
    for name in blocks:
        for one in measured("timing/extend", name):
            seconds = "-" if one["continued"] else f"{one['training_seconds']:.0f} s"
            rows.append([f"{name}: threshold, mining, phase 2", seconds, f"{one['peak_mib']:.0f}"])
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
    weights = ", ".join(f"{name} {found['block']['megabytes']:.1f} MB" for name, found in blocks.items())
    page.text(f"Files of blocks, as `load_block` takes them: {weights}. The given model stays as it is.")


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
        blocks = {name: read_json(f"metrics/blocks/{name}.json") for name in ("default", *settings.blocks)}
        results = {name: read_json(f"metrics/rivals/{name}.json") for name in settings.rivals}
        with Path("data/curves/extend.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        figures = drawn(FOLDER / "pictures", lambda folder: {"shares": shares(folder, rows, results)})
        page = Page("Extending a given model")
        page.text(answer(blocks["default"], results), lead=True)
        page.heading("Quality and retention")
        quality(page, blocks, settings, results)
        page.figure(figures["shares"], FOLDER)
        page.heading("Time, memory, weight")
        costs(page, blocks, settings.rivals)
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
