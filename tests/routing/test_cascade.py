"""Text from models of more than two blocks: as reading says, at any depth, and exactly as all blocks would write it."""

from __future__ import annotations

import json

import pytest
import torch

from lego.base.artifacts import ArtifactError
from lego.model.checkpoint import load_routed, save_cascade
from lego.model.gate import Gate
from lego.routing.cascade import CascadeDecoder
from lego.routing.command_line import main
from lego.routing.decoder import RoutedDecoder
from lego.routing.generation import Sampling, generate, generate_lossless
from lego.text.tokenizer import TextEncoder, fit_bpe
from tests.conftest import VOCAB
from tests.model.test_blocks import models

SHAPE = [(1, 1), (2, 1), (0, 1)]


def reread(model, prompt: list[int], count: int, thresholds, gates) -> list[tuple[int, int]]:
    """Greedy text with the exit of each token, everything read anew for each of them."""
    ids, found = list(prompt), []
    for _ in range(count):
        read = CascadeDecoder(model, thresholds, gates=gates).read(torch.tensor([ids]), last_only=True)
        logits, exits = read.last()
        found.append((int(logits[0].argmax()), int(exits[0])))
        ids.append(found[-1][0])
    return found


@pytest.mark.parametrize("gated", [False, True])
def test_text_is_what_reading_says_with_prompts_of_any_lengths(gated):
    *_, model = models(SHAPE)
    gates = [Gate.at(0.4, 0.1 * place) if gated else None for place in range(3)]
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in (5, 1, 8)]
    confidence = RoutedDecoder(model, 0.0).read(torch.tensor([prompts[2]])).score
    thresholds = [float(confidence.quantile(share)) for share in (0.63, 0.55, 0.5)]
    expected = [reread(model, prompt, 6, thresholds, gates) for prompt in prompts]
    assert len({depth for one in expected for _, depth in one}) > 1
    found: list[list[tuple[int, int]]] = [[], [], []]
    for token in generate(model, prompts, 6, thresholds, gate=gates):
        found[token.sequence].append((token.id, token.exit))
    assert found == expected


@pytest.mark.parametrize("gated", [False, True])
def test_lossless_text_is_the_full_models(gated):
    *_, model = models(SHAPE)
    gates = [Gate.at(0.4, 0.1 * place) if gated else None for place in range(3)]
    prompt = torch.randint(0, VOCAB, (5,)).tolist()
    full = [token.id for token in generate(model, [prompt], 20, None, gate=gates)]
    drafted = list(generate_lossless(model, prompt, 20, drafts=3, gate=gates))
    assert [token.id for token in drafted] == full
    assert {token.exit for token in drafted} <= {1, 4}
    one = generate(model, [prompt], 3, 0.0, sampling=Sampling(), gate=gates)
    assert [token.exit for token in one] == [1, 1, 1]


def test_two_blocks_take_one_threshold():
    *_, model = models(SHAPE[:1])
    with pytest.raises(ValueError, match="one threshold and one gate for a model of two blocks"):
        list(generate(model, [[1]], 1, [0.5]))


@pytest.mark.parametrize("gated", [False, True])
def test_a_folder_says_how_it_routes(gated, tmp_path, capsys):
    *_, model = models(SHAPE, vocab=257)
    gates = [Gate.at(0.4, 0.1 * place) for place in range(3)] if gated else None
    save_cascade(model, tmp_path, [0.3, 0.4, 0.5], gates)
    TextEncoder.fitted(fit_bpe(["def main(): pass\n" * 9], 257, 1000)).save(tmp_path)
    routed = load_routed(tmp_path)
    assert (routed.thresholds, routed.gates is None) == ([0.3, 0.4, 0.5], not gated)
    if gated:
        assert [float(gate.bias) for gate in routed.gates] == pytest.approx([0.0, 0.1, 0.2])
    x = torch.randint(0, VOCAB, (1, 6))
    assert torch.equal(
        CascadeDecoder(routed.model, routed.thresholds, gates=routed.gates).read(x).logits,
        CascadeDecoder(model, [0.3, 0.4, 0.5], gates=gates).read(x).logits,
    )
    assert main([str(tmp_path), "a", "--max-new-tokens", "5", "--json"]) == 0
    assert {token["exit"] for token in json.loads(capsys.readouterr().out)["tokens"]} <= {1, 2, 3, 4}
    assert main([str(tmp_path), "a", "--max-new-tokens", "5", "--show-exits"]) == 0
    assert main([str(tmp_path), "a", "--max-new-tokens", "5", "--lossless"]) == 0
    (tmp_path / "routing.json").write_text('{"thresholds": [0.3], "gates": null}')
    with pytest.raises(ArtifactError, match=r"routing\.json"):
        load_routed(tmp_path)
