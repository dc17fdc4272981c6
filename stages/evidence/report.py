"""The page: what was asked, what came out with its interval, against what and at which cost, what may be wrong.

dvc repro stages/evidence/dvc.yaml:report      (python -m stages.evidence.report)
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lego.base.artifacts import read_json
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.base.params import Params, load_params
from lego.evaluation.calibration import score_macs
from lego.evaluation.routed import TokenTable, load_table
from lego.model.checkpoint import load_model
from lego.model.cost import Ledger
from lego.model.exit_criteria import STATE_CRITERIA
from lego.report.page import Figure, Page, drawn, versions
from lego.tokens.blocks import PackedBlocks
from stages.evidence import routing_tables, tables, wording
from stages.evidence import suites as named
from stages.evidence.current import outdated
from stages.evidence.pictures import hard_against_random, regime_map, routed_against_cost, training_curves
from stages.evidence.quality import criterion_rows
from stages.evidence.records import results
from stages.evidence.suites import FULL, load_suites
from stages.evidence.summary import Suite, by_regime
from stages.evidence.token_pictures import confidences, hard_by_class, sample

SETTING, MOST_TEXT, OTHER_TEXT = "default", "tokens_5500k", "wikitext2"
NOT_RUN = "Not run yet: `python -m stages.evidence.queue --full`."
PICTURES = Path("metrics/pictures")


def draw(folder: Path, suites: dict[str, Suite], table: TokenTable, criterion: str) -> dict[str, Figure]:
    """All pictures that there are numbers for, by name; `table` is of test text, `criterion` routes the sample."""
    mining = float(read_json("data/facts/compute_threshold.json", "threshold")["threshold"])
    routed = float(read_json("metrics/details/ashem.json", "threshold")["threshold"])
    core = suites["core"]
    tokenizer = Tokenizer.from_file("data/tokens/tokenizer/tokenizer.json")
    targets = PackedBlocks("data/tokens", "test").targets()
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in targets]
    deep = ~table.easy(routed, criterion)
    figures = [
        routed_against_cost(folder, core, SETTING),
        training_curves(folder, core, SETTING),
        confidences(folder, table.confidence, table.right_shallow.astype(bool), mining),
        hard_by_class(folder, texts, ~table.easy(mining)),
        sample(folder, list(zip(texts, deep.tolist(), strict=True))),
    ]
    if by_regime(suites["regime"]):
        figures.append(regime_map(folder, suites["regime"]))
    if suites["ratios"].records:
        figures.append(hard_against_random(folder, suites["ratios"]))
    return {figure.file.stem: figure for figure in figures}


def router_rows(params: Params, ledger: Ledger, test: TokenTable) -> list[dict[str, Any]]:
    """How the exit criteria of the root pipeline's model route."""
    validation = load_table("data/evaluation/validation.safetensors")
    routing = params.routing
    shallow = 1 - routing.deep_share(params.ashem.hard_example_ratio)
    promised = shallow if routing.calibration == "quantile" else None
    macs = {name: score_macs(name, ledger.dim, routing) for name in STATE_CRITERIA}
    return criterion_rows(read_json("metrics/details/criteria.json"), validation, test, ledger, promised, macs)


def parameters(params: Params) -> list[str]:
    """Those of params.yaml but for the section of baselines, which the tables name."""
    values = params.model_dump(exclude={"baselines"})
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    named = [f"{key}.{name}: {value}" for key, section in sections.items() for name, value in section.items()]
    return [f"seed: {values['seed']}", *named]


def settings(asked: dict[str, named.Suite]) -> str:
    """What each suite changes in params.yaml, one setting a line."""
    lines = []
    for name, suite in asked.items():
        lines.append(f"{name}: seeds {suite.seeds}, search {suite.search}")
        lines += [f"  {key}: {', '.join(f'{k}: {v}' for k, v in one.items())}" for key, one in suite.settings.items()]
    return "\n".join(lines)


def findings(page: Page, params: Params, suites: dict[str, Suite], figures: dict[str, Figure]) -> None:
    """Question, answer, and every model at equal cost."""
    core, regime = suites["core"], suites["regime"]
    page.heading("Question")
    page.text(wording.QUESTION)
    page.heading("Answer")
    page.text(wording.answer(core, SETTING), lead=True)
    if "regime" in figures:
        page.text(wording.when(regime), lead=True)
        page.points([*wording.crossover(regime), wording.how_far(regime), wording.deepest(regime)])
    page.heading("Every model at equal cost")
    page.text(wording.facts(core, SETTING))
    page.table(*tables.main_table(core, SETTING))
    page.text(wording.READING)
    for name in ("cost", "curves"):
        page.figure(figures[name], Path("metrics"))
    page.heading("When: the regime map")
    if "regime" in figures:
        page.figure(figures["regime"], Path("metrics"))
        for mine in tables.OWN:
            page.table(*tables.regime_table(regime, mine))
        page.table(*routing_tables.criteria_table(regime))
        if (attainable := routing_tables.attainable_table(regime))[1]:
            page.table(*attainable)
    else:
        page.text(NOT_RUN)
    page.heading("From scratch: the total budget after the most text")
    if "dense" in suites["total"].models(MOST_TEXT):
        page.table(*tables.main_table(suites["total"], MOST_TEXT))
        page.table(*tables.rates_table(suites["total"], MOST_TEXT))
    else:
        page.text(NOT_RUN)
    page.heading("Which tokens: selection at the same share")
    if "ashem" in suites["selection"].models(SETTING):
        page.table(*tables.difference_table(suites["selection"], SETTING))
    else:
        page.text(NOT_RUN)
    if "ratios" in figures:
        page.table(*tables.ratios_table(suites["ratios"]))
        page.figure(figures["ratios"], Path("metrics"))
    page.heading("Which options")
    if "ashem" in suites["options"].models(SETTING):
        page.table(*tables.options_table(suites["options"], SETTING))
    else:
        page.text(NOT_RUN)
    other = suites[OTHER_TEXT]
    page.heading("On other text: WikiText-2")
    if "ashem" in other.models(SETTING):
        page.text(wording.facts(other, SETTING))
        page.table(*tables.main_table(other, SETTING))
    else:
        page.text(f"Not run yet: `python -m stages.evidence.queue --suite {OTHER_TEXT}` (docs/evidence.md).")
    page.heading("The historical protocol")
    page.text(wording.leak(core, SETTING))


def not_current(name: str, asked: named.Suite) -> list[list[str]] | None:
    """What has changed since, of each record that does not follow from today's code, text and parameters.

    None if that cannot be told here.
    """
    try:
        return outdated(asked, results(name))
    except StageError as error:
        print(f"{name}: {error}", flush=True)
        return None


def build(params: Params, suites: dict[str, Suite], figures: dict[str, Figure], test: TokenTable) -> Page:
    """The page, part by part."""
    ledger = Ledger.of(load_model("data/phase2"), params.model.seq_len, params.routing.gate == "fitted")
    asked = load_suites()
    page = Page("When is ASHEM worth using?")
    findings(page, params, suites, figures)
    page.heading("Routing")
    page.table(*routing_tables.router_table(router_rows(params, ledger, test)))
    page.text(wording.ROUTER)
    for name in ("confidence", "classes", "sample"):
        page.figure(figures[name], Path("metrics"))
    page.heading("Cost ledger")
    page.table(*routing_tables.ledger_table(ledger))
    share = params.routing.deep_share(params.ashem.hard_example_ratio)
    page.text(wording.break_even(ledger, share, score_macs(params.routing.criterion, ledger.dim, params.routing)))
    page.heading("Threats to validity")
    page.points([wording.documents_fact(suites["core"], SETTING), *wording.THREATS])
    page.heading("Made with")
    old = {suite.name: not_current(suite.name, asked[suite.name]) for suite in suites.values()}
    page.points(wording.provenance(suites, old))
    page.code("\n".join([*parameters(params), "", *versions()]))
    page.text("Each suite is that with these changes; `search` holds the factors of the learning rate that were tried.")
    page.code(settings(asked))
    return page


def main() -> None:
    params = load_params()
    with Stage("report", threads=params.train.threads):
        suites = {name: Suite.load(name) for name in (*FULL, OTHER_TEXT)}
        if "ashem" not in suites["core"].models(SETTING):
            suites["core"] = Suite.load("quick")
            if "ashem" not in suites["core"].models(SETTING):
                raise StageError("metrics/evidence/core.json: has no ASHEM; run python -m stages.evidence.queue first")
        test = load_table("data/evaluation/test.safetensors")
        figures = drawn(PICTURES, lambda folder: draw(folder, suites, test, params.routing.criterion))
        build(params, suites, figures, test).write("metrics")
        print(f"metrics/report.html: {len(figures)} pictures")


if __name__ == "__main__":
    exit_cleanly(main)
