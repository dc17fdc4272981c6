"""Adapters, decoder and reconstruction: shapes, bounds, dropout; and every adapter through all stages."""

from __future__ import annotations

import math

import pytest
import torch

from lego.satipatthana.curriculum import advance, begin
from lego.satipatthana.nets import Adapter, Decoder, Reconstruction, upsampling
from lego.satipatthana.specs import spec_of
from lego.satipatthana.system import shaken
from lego.satipatthana.training import run_stage
from tests.satipatthana.conftest import ONCE, a_task, clusters, small, system

SHAPES = {"mlp": (12,), "cnn": (1, 16, 16), "lstm": (10, 4), "transformer": (10, 4), "identity": (8,)}


@pytest.mark.parametrize("kind", SHAPES)
def test_r3_1_latents_are_finite_and_bounded(kind):
    params = small(adapter__kind=kind, adapter__hidden=16)
    adapter = Adapter(SHAPES[kind], 8, params.adapter)
    found = adapter(10 * torch.randn(5, *SHAPES[kind]))
    assert found.shape == (5, 8)
    assert torch.isfinite(found).all()
    assert kind == "identity" or found.abs().max() <= 1
    with pytest.raises(ValueError, match="inputs must be"):
        adapter(torch.randn(5, 3))


def test_r3_1_sizes_that_do_not_fit_are_refused_and_dropout_is_used():
    with pytest.raises(ValueError, match="divisible by 16, got 20 x 20"):
        Adapter((1, 20, 20), 8, small(adapter__kind="cnn").adapter)
    with pytest.raises(ValueError, match="needs inputs of 2 dimensions"):
        Adapter((12,), 8, small(adapter__kind="lstm").adapter)
    with pytest.raises(ValueError, match=r"system\.dim must be 12"):
        Adapter((12,), 8, small(adapter__kind="identity").adapter)
    for kind, shape in SHAPES.items():
        if kind != "identity":
            adapter, x = (
                Adapter(shape, 8, small(adapter__kind=kind, adapter__dropout=0.5).adapter),
                torch.randn(6, *shape),
            )
            adapter.train()
            for one in adapter.modules():  # in training it differs from batch to batch as it is
                if isinstance(one, torch.nn.BatchNorm2d):
                    one.eval()
            assert not torch.equal(adapter(x), adapter(x)), kind
            adapter.eval()
            assert torch.equal(adapter(x), adapter(x)), kind


def test_r8_9_images_grow_without_a_checkerboard():
    made = Reconstruction((1, 32, 32), 8, 16)
    assert made(torch.randn(2, 8)).shape == (2, 1, 32, 32)
    for module in [*made.modules(), *system(small(adapter__kind="cnn"), (1, 16, 16)).modules()]:
        assert not (isinstance(module, torch.nn.ConvTranspose2d) and max(module.stride) > 1)

    def interior(trunk: torch.nn.Module) -> float:
        found = trunk(torch.ones(1, 8, 4, 4))[0, 0].detach()
        inner = found[8:-8, 8:-8]
        return float((inner - inner[0, 0]).abs().max())

    torch.manual_seed(0)
    assert interior(upsampling((8, 8, 8, 8), 1).eval()) < 1e-5
    strided = torch.nn.Sequential(*(torch.nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1) for _ in range(3)))
    assert interior(strided) > 1e-3  # the test can fail


def test_r3_8_logits_are_not_bounded():
    decoder = Decoder(8, 4, 10, 16, "none")
    with torch.no_grad():
        decoder.body[-1].bias.fill_(50.0)
    assert decoder(torch.randn(3, 8), torch.randn(3, 4)).max() > 10
    capped = Decoder(8, 4, 10, 16, "tanh")
    best = torch.softmax(torch.tensor([1.0, *[-1.0] * 9]), 0)[0]
    assert float(best) == pytest.approx(math.e / (math.e + 9 / math.e))
    assert capped(torch.randn(50, 8) * 100, torch.randn(50, 4)).abs().max() <= 1


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm", "transformer"])
def test_r6_2_dropout_of_a_drunk_run_is_doubled_at_least_to_the_minimum_in_every_adapter(kind):
    for rate, minimum, expected in ((0.1, 0.5, 0.5), (0.3, 0.5, 0.6), (0.2, 0.0, 0.4)):
        adapter = Adapter(SHAPES[kind], 8, small(adapter__kind=kind, adapter__dropout=rate).adapter).eval()
        drops = [one for one in adapter.modules() if isinstance(one, torch.nn.Dropout)]
        modes = [one.training for one in adapter.modules()]
        with shaken(adapter, minimum, torch.Generator().manual_seed(0)):
            assert [one.p for one in drops] == pytest.approx([expected] * len(drops))
        assert ([one.p for one in drops], [one.training for one in adapter.modules()]) == ([rate] * len(drops), modes)
    x = torch.randn(6, *SHAPES[kind])
    for drop in drops:  # each of them acts, without a graph too
        for other in drops:
            other.p = 0.3 if other is drop else 0.0
        with torch.no_grad(), shaken(adapter, 0.0, torch.Generator().manual_seed(0)):
            damaged = adapter(x)
        with torch.no_grad():
            assert not torch.allclose(damaged, adapter(x)), drop


def test_r7_2_every_adapter_trains_all_four_stages():
    for kind, shape in SHAPES.items():
        params = small(adapter__kind=kind, **{f"stage{n}__epochs": 1 for n in range(4)}, stage1__batch_size=20)
        made = system(params, shape)
        train = clusters(40, math.prod(shape))
        rows = type(train)(train.x.view(40, *shape), train.y)
        for number in range(4):
            history = run_stage(made, spec_of(number, made, rows, params, 0), number)
            assert math.isfinite(history[-1]["loss"]), (kind, number)


def test_the_decoder_brings_contexts_into_the_range_it_learned_from():
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    assert bool(torch.isinf(made.decoder.low).all())
    for number in range(4):
        advance(made, number, task, params, 0)
    found = made(task.train.x)
    assert torch.equal(made.decoder.low, found.v_ctx.amin(dim=0))
    assert torch.equal(made.decoder.high, found.v_ctx.amax(dim=0))
    with torch.no_grad():
        answered = made.decoder(found.s_star, found.v_ctx)
        far = made.decoder(found.s_star, found.v_ctx + 1e6)
        edge = made.decoder(found.s_star, made.decoder.high.expand_as(found.v_ctx))
    assert torch.equal(answered, found.output)
    assert torch.equal(far, edge)
    free = small(heads__bounded_context=False, **ONCE)
    spec_of(3, made := begin(task, free, 0).eval(), task.train, free, 0)
    assert bool(torch.isinf(made.decoder.high).all())
