"""Trust as an exit criterion of ASHEM's routed model, beside the others -> metrics/satipatthana/ashem/bridge.json.

dvc repro stages/satipatthana/ashem/dvc.yaml          (python -m stages.satipatthana.bridge)

Inputs are exit states of the calibration text that ASHEM's fitted criteria learn from; the task is whether block 1's
best guess is right, which is also the trust that a token deserves. Thresholds come from the rest of that text, numbers
from test text, all criteria in one pass.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lego.base.artifacts import derived_seed, read_json, write_json
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.base.params import Params, load_params
from lego.evaluation.calibration import Calibration
from lego.evaluation.routed import Route, TokenTable, token_table
from lego.evaluation.router_quality import quality_lines, router_quality
from lego.model.checkpoint import load_exit, load_model
from lego.model.cost import Ledger
from lego.model.exit_criteria import features
from lego.model.transformer import DeepSupervisionTransformer
from lego.report.stats import mean_interval
from lego.satipatthana.ablation import macs
from lego.satipatthana.curriculum import STAGES, advance, begin
from lego.satipatthana.metrics import correct_above_wrong
from lego.satipatthana.sections import SatipatthanaParams, load, with_profile
from lego.satipatthana.system import Satipatthana, evaluation
from lego.satipatthana.tasks import Split, Task
from lego.tokens.batches import split_batches
from lego.tokens.blocks import PackedBlocks
from stages.evaluate_routing import decide, scored
from stages.satipatthana.seeds import for_each_seed

CLASSES = ["wrong", "right"]


class Criterion:
    """(exit states (n, D), logits) -> score (n,) of a system that was trained on such states.

    Args:
        system: its input is a normalised exit state (D,).
        kind: `trust`; or `answer`, the decoder's probability that block 1 is right.
    """

    needs_logits = False

    def __init__(self, system: Satipatthana, kind: str) -> None:
        self.system, self.kind = system, kind

    @torch.no_grad()
    def __call__(self, exit_states: Tensor, logits: Tensor | None = None) -> Tensor:
        if not len(exit_states):
            return exit_states.new_zeros(0)
        rows = features(exit_states)
        if self.kind == "answer":
            return self.system(rows).output.softmax(dim=1)[:, 1]
        with evaluation(self.system):  # without the decoder, whose time trust does not need
            view, _ = self.system.look(self.system.samatha(rows))
            return view.trust[:, 0]


KINDS = ("trust", "answer")


def task_of(states: Tensor, right: Tensor, rows: int, seed: int) -> Task:
    """A task of `rows` tokens drawn from exit states (n, D) and whether block 1 was right (n,); an eighth is held out.

    Raises:
        StageError: there are fewer tokens, or all are of one class.
    """
    if len(states) < rows:
        raise StageError(
            f"stages/satipatthana/params.yaml: bridge.rows is {rows}, but there are {len(states)} fitted tokens of "
            "calibration text; lower it, or raise data.max_calibration_tokens in params.yaml"
        )
    places = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:rows]
    x, y = features(states[places]), right[places].long()
    if len(y.unique()) < 2:
        raise StageError("block 1 is right on all fitted tokens or on none; there is nothing to tell apart")
    count = rows - rows // 8
    held_out = Split(x[count:], y[count:])
    return Task(Split(x[:count], y[:count], y[:count].float()), held_out, held_out, outside={}, classes=CLASSES)


def train(task: Task, params: SatipatthanaParams, seed: int) -> Satipatthana:
    """All four stages of a seed."""
    system = begin(task, params, seed)
    for number in STAGES:
        history = advance(system, number, task, params, seed)
        said = ", ".join(f"{name} {value:.4f}" for name, value in history[-1].items())
        print(f"stage {number}, seed {seed}: {said}", flush=True)
    return system.eval().requires_grad_(False)


def fitted_tokens(model: DeepSupervisionTransformer, batch_size: int, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Exit states (n, D) of the first tokens of a split, and whether block 1 was right (n,)."""
    states: list[Tensor] = []
    share = count / PackedBlocks("data/tokens", split).tokens
    first = split_batches("data/tokens", split, batch_size, (0.0, share))
    table = token_table(model, first, "cpu", on_states=lambda found, *_: states.append(found))
    return torch.cat(states), torch.from_numpy(table.right_shallow)


def cuts(table: TokenTable, fit_tokens: int, ratio: float, root: Params) -> Calibration:
    """Thresholds by quantile on the calibration text that nothing was fitted on."""
    rest = table.part(fit_tokens)
    return Calibration(rest, 0, torch.zeros(len(rest.confidence)).numpy(), 0.0, ratio, root.routing)


def told_apart(system: Satipatthana, task: Task) -> dict[str, float]:
    """Chance that of two held-out tokens the one that block 1 guesses right has the higher score, by score."""
    right = task.test.y.numpy() == 1
    # inputs are normalised already, and normalising them again changes nothing
    return {kind: correct_above_wrong(Criterion(system, kind)(task.test.x).double().numpy(), right) for kind in KINDS}


def judged(
    systems: list[Satipatthana], model: DeepSupervisionTransformer, root: Params, facts: dict[str, Any], example: Tensor
) -> tuple[dict[str, Any], dict[str, int], int]:
    """Router quality on test text of every criterion, MACs of a token by new criterion, and the tokens of test text.

    Args:
        systems: by seed.
        model: routed.
        root: parameters of the root pipeline.
        facts: of data/exit.
        example: exit states (n, D), whose MACs are counted.
    """
    mine = {f"{kind}_{seed}": Criterion(one, kind) for seed, one in enumerate(systems) for kind in KINDS}
    routing = decide(root, model, derived_seed(root.seed, "evaluate_routing"), torch.device("cpu"))
    size = root.evaluation.batch_size
    rest = token_table(model, split_batches("data/tokens", facts["split"], size), "cpu", mine)
    found = cuts(rest, facts["fit_tokens"], facts["hard_example_ratio"], root)
    test = split_batches("data/tokens", "test", size)
    table = token_table(model, test, "cpu", {**scored(routing.criteria), **mine}, gate=routing.gate)
    cost = {name: round(macs(one, example)) for name, one in mine.items()}
    routes = routing.routes | {name: Route(name, found.quantile(name), cost[name]) for name in mine}
    ledger = Ledger.of(model, test.blocks.seq_len, gated=routing.gate is not None)
    quality = {name: router_quality(table, route, ledger) for name, route in routes.items()}
    print("\n".join(["exit criteria on test text:", *quality_lines(quality)]))
    print(f"a layer of the model takes {ledger.layer:,} MACs a token, trust {cost['trust_0']:,}")
    return quality, cost, len(table.nll_deep)


def summarized(quality: dict[str, Any], cost: dict[str, int], apart: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds by kind of score."""
    summary = {}
    for kind in KINDS:
        ppl = mean_interval([cast(float, quality[f"{kind}_{seed}"]["ppl"]) for seed in range(len(apart))])
        held_out = sum(one[kind] for one in apart) / len(apart)
        print(f"{kind}: perplexity {ppl:.2f}, right above wrong on held-out tokens {held_out:.4f}")
        summary[kind] = {"macs": cost[f"{kind}_0"], "auroc_right": held_out, "ppl": ppl.mean}
    return summary


def main() -> None:
    params, root = with_profile(load(), "bridge"), load_params()
    root = root.model_copy(update={"routing": root.routing.model_copy(update={"calibration": "quantile"})})
    with Stage("satipatthana/ashem/bridge", params.seed, params.threads) as stage:
        model = cast(DeepSupervisionTransformer, load_model("data/phase2"))
        leaky = read_json("data/facts/collect_hard.json", "leaky")["leaky"]
        facts, _ = load_exit("data/exit", model)
        states, right = fitted_tokens(model, root.evaluation.batch_size, facts["split"], facts["fit_tokens"])
        task = task_of(states, right, params.bridge.rows, derived_seed(params.seed, "bridge"))
        systems = for_each_seed(partial(train, task, params), params, params.bridge.seeds)
        quality, cost, tokens = judged(systems, model, root, facts, states[-1024:])
        summary = summarized(quality, cost, [told_apart(system, task) for system in systems])
        content = {"quality": quality, "summary": summary, "rows": len(task.train), "leaky": leaky}
        write_json("metrics/satipatthana/ashem/bridge.json", content)
        stage.record |= {"counts": {"tokens": tokens}}


if __name__ == "__main__":
    exit_cleanly(main)
