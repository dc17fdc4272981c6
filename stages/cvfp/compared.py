"""The contest on the CVFP page: the table of models and the sentences that follow from it.

Rows of another text, or of parameters that have changed since, are marked, and no sentence speaks of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lego.cvfp.contest import made_of
from lego.cvfp.sections import CvfpParams
from lego.cvfp.text import SPLITS
from lego.report.page import Figure, Page
from lego.report.stats import Interval, mean_interval, verdict

FOLDER = Path("metrics/cvfp")
NOT_RUN = "Not run yet: `dvc repro stages/cvfp/baselines/dvc.yaml`."
OUTDATED = "Outdated, run again: `dvc repro stages/cvfp/baselines/dvc.yaml`."
TRIED = "What was tried to reach it stands under the next heading."
BLIND = {"zero": "sound, head trained with C* = 0", "shuffled": "sound, head trained with shuffled C*"}
NGRAMS = ("unigram", "trigram", "fivegram")
FORMS = {
    "sound": "contexts trained to predict",
    "sound_reservoir": "its blocks stay as they began, its embedding learns",
    "untrained": "nothing of phase 1 is trained; as many steps of phase 2, so fewer tokens, its rate searched",
    "untrained_longer": "the same with what the others spend on phase 1 in phase 2: as many tokens",
    "seed": "contexts trained by the rulings of the founding notes, on a part of the text in several passes",
    "seed_untrained": "the network of `seed` with the weights it began with; as many steps of phase 2",
    "end_to_end": "the network of `sound` in one phase, by cross-entropy alone, with what peers.end_to_end says",
}
CLAIMS = {  # what training contexts apart changes: with it and without, on the same layers
    "training blocks by prediction": (
        "sound",
        "sound_reservoir",
        "its embedding, reader and phase 2 are trained alike",
    ),
    "phase 1 by prediction as a whole": ("sound", "untrained", "its embedding is not trained, its head begins at 0"),
    "training contexts by the notes' rulings": ("seed", "seed_untrained", "its phase 2 is trained alike"),
    "two phases instead of one": ("sound", "end_to_end", "of the same layers, its rate, windows and LayerNorm its own"),
}


@dataclass(frozen=True)
class Compared:
    """What metrics/cvfp/contest.json and scaling.json hold, under these parameters and metrics of tokenize."""

    params: CvfpParams
    found: dict[str, dict[str, Any]]
    scaling: dict[str, dict[str, Any]]
    tokens: dict[str, Any]

    @cached_property
    def current(self) -> dict[str, dict[str, Any]]:
        """Models whose rows are of this text and these parameters."""
        return {
            name: one for name, one in self.found.items() if name in self.params.contest.lr and self.fits(name, one)
        }

    def fits(self, name: str, one: dict[str, Any]) -> bool:
        """Whether a model's numbers are of this text and these parameters."""
        text = {split: self.tokens[f"{split}_sha256"] for split in SPLITS}
        return one["made_of"] == made_of(name, self.params, text)

    @cached_property
    def curves(self) -> dict[str, list[tuple[float, Interval]]]:
        """Train tokens and perplexity with its interval, by current model of the curve over train text."""
        found, train = {}, self.tokens["train_tokens"]
        for name, one in self.scaling.items():
            ngram = name == "fivegram"
            if not self.fits(name, one) or not (ngram or name in self.current):
                continue
            whole = [self.tokens["test_fivegram_ppl"]] if ngram else self.over_seeds(name)
            shares = {float(share): list(seeds.values()) for share, seeds in one.items() if share != "made_of"}
            points = sorted((shares | {1.0: whole}).items())
            found[name] = [(share * train, mean_interval(seeds)) for share, seeds in points]
        return found

    def over_seeds(self, name: str, key: str = "ppl") -> list[float]:
        one = self.found[name]
        return [one[f"{key}_{seed}"] for seed in range(len(one)) if f"{key}_{seed}" in one]

    def intervals(self) -> dict[str, Interval]:
        """Perplexity by current model."""
        return {name: mean_interval(self.over_seeds(name)) for name in self.current}

    def ngrams(self) -> dict[str, float]:
        return {name: self.tokens[f"test_{name}_ppl"] for name in NGRAMS}

    def against(self, mine: str, other: str) -> Interval:
        """Perplexity of one model less another's, over seeds."""
        pairs = zip(self.over_seeds(mine), self.over_seeds(other), strict=False)
        return mean_interval([a - b for a, b in pairs])

    def rivals(self) -> list[str]:
        """What `sound` should beat: untrained contexts, the best of the MLPs, the GRU; and the best of all others."""
        others = self._best_first([name for name in self.current if name != "sound"])
        wanted = ["untrained", "untrained_longer", "sound_reservoir", *self._mlps()[:1], "gru", *others[:1]]
        return [name for name in dict.fromkeys(wanted) if name in self.current]

    def _best_first(self, names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: self.current[name]["ppl"])

    def _mlps(self) -> list[str]:
        """Current MLPs, the best first."""
        return self._best_first([name for name in self.current if name.startswith("mlp_")])

    def answer(self) -> str:
        """One sentence with the intervals that decide it."""
        if "sound" not in self.current:
            return OUTDATED if "sound" in self.found else NOT_RUN
        mine, said = self.over_seeds("sound"), []
        for rival in self.rivals():
            difference = self.against("sound", rival)
            said.append(f"{rival} {self.current[rival]['ppl']:.1f} ({difference:+.1f}: {verdict(difference)})")
        name, value = min(self.ngrams().items(), key=lambda one: one[1])
        said.append(f"{name} {value:.1f}")
        return (
            f"On text that neither phase has seen, `sound` has a perplexity of **{mean_interval(mine):.1f}** over "
            f"{len(mine)} seeds; with equal parameters: {', '.join(said)}."
        )

    def claims(self) -> list[str]:
        """What training contexts changes in perplexity: the claim to be refuted (section 12)."""
        said = []
        for what, (trained, began, otherwise) in CLAIMS.items():
            if trained in self.current and began in self.current:
                difference = self.against(trained, began)
                said.append(
                    f"{what} changes perplexity by {difference:+.2f} ({verdict(difference)}) against `{began}`: "
                    f"{otherwise}"
                )
        return said

    def goals(self) -> list[str]:
        """Whether `sound` is ahead of what it was asked to be ahead of (the goal of the results page)."""
        mlps = self._mlps()
        said = []
        for what, name in (
            ("untrained contexts", "untrained"),
            ("the best MLP", mlps[0] if mlps else ""),
            ("the GRU", "gru"),
        ):
            if name in self.current and "sound" in self.current:
                difference = self.against("sound", name)
                reached = "reached" if verdict(difference) == "better" else "**not reached**"
                said.append(f"ahead of {what} (`{name}`): {reached}, {difference:+.2f} ({verdict(difference)})")
        return said

    def blind_heads(self) -> str:
        """Heads that never saw contexts, beside the one that did."""
        if "sound" not in self.current:
            return ""
        sound = self.current["sound"]
        return (
            "Heads that phase 2 trains without contexts, from the same reader of phase 1, reach "
            f"{sound['ppl_trained_zero_contexts']:.2f} (C* = 0) and {sound['ppl_trained_shuffled_contexts']:.2f} (C* "
            f"shuffled), that with them {sound['ppl']:.2f}: means over seeds, equal but for the contexts."
        )

    def write(self, page: Page, figures: dict[str, Figure]) -> None:
        """The section with picture and table."""
        page.heading("Against other models")
        if not self.found:
            page.text(NOT_RUN)
            return
        if missing := [name for name in self.params.contest.lr if name not in self.found]:
            page.text(f"{NOT_RUN.partition(':')[0]}: {', '.join(missing)}.")
        if "perplexity" in figures:
            page.figure(figures["perplexity"], FOLDER)
        rows = [self._row(name) for name in sorted(self.found, key=lambda name: self.found[name]["ppl"])]
        rows += self._blind_rows()
        for name, ppl in self.ngrams().items():
            rows.append([name, f"{ppl:.2f}", f"{self.tokens[f'test_{name}_bits_per_byte']:.3f}", *[""] * 9])
        header = ["model", "held-out perplexity", "bits per byte", "parameters", "without embeddings"]
        header += ["tokens in training", "weight updates", "a run took", "tokens/s", "peak memory", "rate", ""]
        page.table(header, rows, "Held-out text, mean and 95 % interval over seeds.")
        page.points([f"`{name}`: {said}" for name, said in FORMS.items() if name in self.found])
        if said := self.claims():
            page.points(said)
        if said := self.goals():
            page.text(f"The goal was to be better than three: {'; '.join(said)}. {TRIED}")
        self._write_curves(page, figures)

    def _write_curves(self, page: Page, figures: dict[str, Figure]) -> None:
        if "scaling" not in figures:
            return
        page.figure(figures["scaling"], FOLDER)
        sizes = sorted({tokens for points in self.curves.values() for tokens, _ in points})
        rows = [
            [name, *(f"{values[size]:.2f}" if size in values else "" for size in sizes)]
            for name, values in ((name, dict(points)) for name, points in self.curves.items())
        ]
        page.table(
            ["train tokens", *(f"{size / 1e3:,.0f} k" for size in sizes)],
            rows,
            "Held-out perplexity by train text, with intervals over seeds; parts at the rate found on the whole.",
        )

    def _blind_rows(self) -> list[list[str]]:
        """Heads that never saw contexts, on the network of `sound`."""
        if "sound" not in self.current:
            return []
        return [
            [
                said,
                f"{mean_interval(self.over_seeds('sound', f'ppl_trained_{kind}_contexts')):.2f}",
                f"{mean_interval(self.over_seeds('sound', f'bits_per_byte_trained_{kind}_contexts')):.3f}",
                *[""] * 9,
            ]
            for kind, said in BLIND.items()
        ]

    def _row(self, name: str) -> list[str]:
        one = self.found[name]
        notes = ["rate at an end of the search"] if one["rate_at_an_end"] else []
        notes += [] if name in self.current else ["**outdated**: of other text or parameters"]
        return [
            f"**{name}**" if name == "sound" else name,
            f"{mean_interval(self.over_seeds(name)):.2f}",
            f"{mean_interval(self.over_seeds(name, 'bits_per_byte')):.3f}",
            f"{one['parameters'] / 1e3:,.0f} k",
            f"{one['parameters_without_embeddings'] / 1e3:,.0f} k",
            f"{one['tokens'] / 1e6:.2f} M",
            f"{one['updates']:,.0f}" if "updates" in one else "",
            f"{one['seconds']:.0f} s" if one["seconds"] is not None else "",
            f"{one['tokens'] / one['seconds']:,.0f}" if one["seconds"] else "",
            f"{one['peak_mib']:,.0f} MiB" if one["peak_mib"] is not None else "",
            f"{one['lr']:g}",
            "; ".join(notes),
        ]
