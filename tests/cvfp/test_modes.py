"""The modes of phase 1: where a pass starts, how far its gradients reach, chunks and windows against all at once."""

from __future__ import annotations

import ast

import pytest
import torch

from lego.cvfp import modes
from lego.cvfp.passes import sequential_pass
from lego.cvfp.phase1 import ContextTrainer
from tests.conftest import ROOT
from tests.cvfp.conftest import network, seed_params, text, trained


@pytest.mark.parametrize("mode", ["sequential_batch", "sequential_online"])
def test_b2_sequential_modes_run_and_gradients_reach_back_bptt_len_tokens(mode, monkeypatch):
    params = seed_params(phase1__mode=mode, phase1__max_iterations=2, phase1__dist_reg_weight=0.0)
    trainer, iterations = trained(params, tokens=50)
    assert len(iterations) == 2
    assert trainer.updates == (1 if mode == "sequential_batch" else 50)
    for bptt, reaches in ((1, False), (4, True)):
        params = seed_params(phase1__mode=mode, phase1__bptt_len=bptt, phase1__dist_reg_weight=0.0)
        model = network(params)
        trainer = ContextTrainer(model, model.embed(text(9)).detach(), params.phase1)
        made: list[torch.Tensor] = []
        advance = type(model).next_context

        def kept(self, *, context, token, made=made, advance=advance):
            made.append(advance(self, context=context, token=token))
            return made[-1]

        monkeypatch.setattr(type(model), "next_context", kept)
        trainer.one_pass.run(1, torch.randn(9, 24), torch.randn(9, 24), lambda *_: None)
        monkeypatch.setattr(type(model), "next_context", advance)
        gradient = torch.autograd.grad(made[2].sum(), made[1], allow_unused=True)[0]
        assert (gradient is not None) == reaches


def test_b4_the_loop_over_tokens_computes_no_statistics():
    """The sequential modes hand contexts on; a mean there is of the loss terms that wait for their step."""
    tree = ast.parse((ROOT / "lego/cvfp/modes.py").read_text())
    loops = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in ("_sequential_batch", "_online")
        for node in ast.walk(function)
        if isinstance(node, ast.For)
    ]
    called = [ast.unparse(node.func) for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Call)]
    assert len(loops) >= 2
    assert any("get_distribution_loss" in one for one in called)
    statistics = [one for one in called if one.rpartition(".")[2] in ("mean", "var", "std", "var_mean", "std_mean")]
    assert statistics == ["torch.stack(terms).mean"]


@pytest.mark.parametrize("mode", ["parallel", "sequential_batch", "sequential_online"])
@pytest.mark.parametrize("start", ["carry", "zero"])
def test_b3_a_pass_starts_from_the_last_context_of_the_one_before(mode, start, monkeypatch):
    diversity = "centroid_ema" if mode == "sequential_online" else "centroid_batch"
    params = seed_params(phase1__mode=mode, phase1__start_context=start, phase1__diversity=diversity)
    params = params.model_copy(update={"phase1": params.phase1.model_copy(update={"max_iterations": 4})})
    model = network(params)
    trainer = ContextTrainer(model, model.embed(text(30)).detach(), params.phase1)
    starts, advance = [], type(model).next_context

    def spied(self, *, context, token):
        starts.append(context)
        return advance(self, context=context, token=token)

    monkeypatch.setattr(type(model), "next_context", spied)
    previous = None
    for iteration in trainer.iterations():
        if previous is not None:
            wanted = previous[-1] if start == "carry" else torch.zeros(24)
            assert torch.equal(starts[0][0], wanted)
            assert not starts[0].requires_grad
        previous = iteration.contexts.values
        starts.clear()


def test_chunks_give_the_same_weights_as_one_batch():
    whole, parts = (
        trained(seed_params(phase1__chunk_tokens=chunk, phase1__max_iterations=4))[0].model.state_dict()
        for chunk in (1000, 7)
    )
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"phase1\.chunk_tokens must be at least 60 for diversity ema_live"):
        trained(seed_params(phase1__chunk_tokens=7, phase1__diversity="ema_live"))


@pytest.mark.filterwarnings("ignore:phase1.diversity. ema_buffer")
@pytest.mark.parametrize("diversity", ["centroid_batch", "ema_live", "ema_buffer"])
@pytest.mark.parametrize("target", ["previous_iteration", "two_view"])
def test_gradients_window_by_window_are_those_of_all_at_once(diversity, target, monkeypatch):
    params = seed_params(
        phase1__mode="sequential_batch",
        phase1__diversity=diversity,
        phase1__cvfp_target=target,
        phase1__bptt_len=4,
        phase1__allow_zero_gradient_loss=True,
    )

    def gradients() -> list[torch.Tensor]:
        model = network(params)
        trainer = ContextTrainer(model, model.embed(text(30)).detach(), params.phase1)
        previous = sequential_pass(model, trainer.embeddings) + 0.1
        torch.manual_seed(3)
        trainer.iterate(1, previous)
        return [one.grad for one in trainer.parameters if one.grad is not None]

    windows = gradients()
    monkeypatch.setattr(modes, "chunks", lambda total, size: [slice(0, total)])
    assert any(bool(one.any()) for one in windows)
    for one, other in zip(windows, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)
