"""Losses that never form a batch's logits against torch's own, which do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lego import DeepSupervisionTransformer, grow_model
from lego.model import losses
from lego.model.losses import exit_confidence, linear_cross_entropy, max_probability, read_exit, read_mixture
from tests.conftest import VOCAB

SIZES = {
    "n": st.integers(1, 40),
    "dim": st.integers(1, 9),
    "vocab": st.integers(2, 30),
    "rows": st.integers(1, 50),
    "most": st.integers(1, 50),
    "scale": st.sampled_from([0.1, 3.0, 60.0]),
    "seed": st.integers(0, 2**20),
}


def drawn(n: int, dim: int, vocab: int, scale: float, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, dim, generator=generator, dtype=dtype) * scale
    return h, torch.randn(vocab, dim, generator=generator, dtype=dtype), torch.randint(vocab, (n,), generator=generator)


@settings(max_examples=150, deadline=None)
@given(**SIZES, trained=st.sampled_from([(True, True), (True, False), (False, True)]))
def test_loss_and_gradients_equal_torchs(n, dim, vocab, rows, most, scale, seed, trained):
    h, weight, y = drawn(n, dim, vocab, scale, seed, torch.float64)  # float32 forgives less the larger the logits
    h.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS_IN_CACHE", rows * vocab)  # rows that are passed over together
        patch.setattr(losses, "LOGITS_AT_A_TIME", most * vocab)  # rows of a product, at most
        loss = linear_cross_entropy(h, weight, y)
    expected = F.cross_entropy(h @ weight.t(), y)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    (2.5 * loss).backward()
    actual = [tensor.grad for tensor in (h, weight)]
    h.grad = weight.grad = None
    (2.5 * expected).backward()
    for mine, reference, wanted in zip(actual, (h.grad, weight.grad), trained, strict=True):
        assert (mine is not None) is wanted
        if wanted:
            torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(**SIZES)
def test_what_an_exit_says_equals_torchs(n, dim, vocab, rows, most, scale, seed):
    h, weight, y = drawn(n, dim, vocab, scale, seed, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS_IN_CACHE", rows * vocab)
        patch.setattr(losses, "LOGITS_AT_A_TIME", most * vocab)
        nll, right, confidence, score = read_exit(h, weight, y, [lambda states, logits: states[:, 0] + logits[:, -1]])
        alone = exit_confidence(h, weight)
    logits = h @ weight.t()
    torch.testing.assert_close(nll, F.cross_entropy(logits, y, reduction="none"), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(confidence, max_probability(logits), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(alone, confidence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(score, h[:, 0] + logits[:, -1], rtol=1e-4, atol=1e-4)
    top = logits.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1]) > 1e-3  # where two guesses tie, either is right
    assert torch.equal(right[clear], (logits.argmax(1) == y)[clear])


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_a_mixture_of_two_exits_by_its_definition(n, dim, vocab, rows, most, scale, seed):
    h, weight, y = drawn(n, dim, vocab, scale, seed, torch.float32)
    h2, weight2, _ = drawn(n, dim, vocab, scale, seed + 1, torch.float32)

    def mixed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.stack([first.log_softmax(1) + math.log(0.3), second.log_softmax(1) + math.log(0.7)]).logsumexp(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS_IN_CACHE", rows * vocab)
        patch.setattr(losses, "LOGITS_AT_A_TIME", most * vocab)
        alone = read_exit(h, weight, y, [lambda states, logits: states[:, 0]])
        *first, nll, right, spared = read_mixture(
            (h, weight), (h2, weight2), mixed, y, [lambda states, logits: states[:, 0]]
        )
    assert all(torch.equal(one, other) for one, other in zip(first, alone, strict=True))
    shallow = (h @ weight.t()).log_softmax(1)
    answer = mixed(h @ weight.t(), h2 @ weight2.t())
    torch.testing.assert_close(nll, F.nll_loss(answer, y, reduction="none"), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(spared, (answer.exp() * (answer - shallow)).sum(1), rtol=1e-3, atol=1e-3)
    assert spared.min() > -1e-4
    top = answer.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1]) > 1e-3
    assert torch.equal(right[clear], (answer.argmax(1) == y)[clear])


@pytest.mark.parametrize(
    ("vocab", "dim", "product", "together"),
    [
        (1024, 64, 512, 512),  # the head is small: as many rows as stay in the cache
        (4096, 64, 128, 128),
        (49_152, 576, 580, 10),  # the head is large: it is read once for about D rows
        (128_256, 2048, 523, 4),  # and the logits are not more than 256 MiB
        (2**27, 8, 1, 1),
    ],
)
def test_the_head_is_read_rarely_and_the_logits_stay_bounded(vocab, dim, product, together):
    on_gpu = torch.empty(vocab, dim, device="meta")  # any device but a CPU
    assert losses._rows_of_a_product(on_gpu) == losses._rows_of_a_pass(on_gpu) == max(1, 2**26 // vocab)
    weight = torch.zeros(1, 1).expand(vocab, dim)  # on the CPU, without memory
    assert (losses._rows_of_a_product(weight), losses._rows_of_a_pass(weight)) == (product, together)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_float32_gradients_are_within_rounding_of_torchs(scale):
    h, weight, y = drawn(300, 16, 500, scale, 0, torch.float32)
    linear_cross_entropy(h.requires_grad_(), weight.requires_grad_(), y).backward()
    expected = F.cross_entropy(h @ weight.t(), y)
    for mine, reference in zip((h.grad, weight.grad), torch.autograd.grad(expected, (h, weight)), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


def test_under_autocast_the_products_are_bfloat16_and_the_gradients_keep_their_types():
    h, weight, y = drawn(64, 16, 40, 1.0, 0, torch.float32)
    h.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, weight, y)
        expected = F.cross_entropy((h @ weight.t()).float(), y)
    assert loss.dtype is torch.float32
    loss.backward()
    assert h.grad.dtype is weight.grad.dtype is torch.float32
    exact = F.cross_entropy(h @ weight.t(), y)
    assert 0 < abs(loss.item() - exact.item()) < 0.02
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    reference = torch.autograd.grad(exact, weight)[0]
    assert (weight.grad - reference).norm() < 0.02 * reference.norm()


def test_a_model_with_a_head_of_its_own_is_read_through_it():
    model = grow_model(DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2), 3, head="own")
    torch.nn.init.normal_(model.deep_head.weight)
    x, y = torch.randint(0, VOCAB, (2, 3, 7))
    h = model.states_at(x, 3)
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(model.loss_at(h, 3, y), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.read_at(h, 3, y)[0].mean(), expected, rtol=1e-5, atol=1e-5)


def test_a_target_outside_the_vocabulary_is_an_error():
    h, weight, _ = drawn(2, 4, 5, 1.0, 0, torch.float32)
    for wrong in (5, -100):
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(h, weight, torch.tensor([0, wrong]))


def test_memory_does_not_grow_with_the_logits():
    """What autograd keeps between forward and backward: the two gradients, not (n, V) numbers."""
    h, weight, y = drawn(600, 8, 900, 1.0, 0, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(h.requires_grad_(), weight.requires_grad_(), y)
    assert sum(kept) == h.numel() + weight.numel()
