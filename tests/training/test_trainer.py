"""The training loop: losses by layer, steps, a golden curve from transformers' Llama, failing."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from lego import (
    DeepSupervisionTransformer,
    NonFiniteLossError,
    StageConfig,
    StandardTransformer,
    StepOptions,
    Trainer,
    TrainingConfig,
    create_deep_supervision_config,
    create_standard_config,
)
from tests.conftest import VOCAB, random_batches
from tests.model.test_transformer import llama_twin


def small(num_layers: int = 2, **sizes) -> StandardTransformer:
    return StandardTransformer(VOCAB, 32, num_layers, 4, **sizes)


def test_ready_made_configs():
    assert create_standard_config(3).layer_weights() == {3: 1.0}
    assert create_deep_supervision_config(4).layer_weights() == dict.fromkeys(range(1, 5), 0.25)
    shared = TrainingConfig([StageConfig((1, 3), 0.5), StageConfig((2, 2), 2.0), StageConfig((3, 3), 0.0)])
    assert shared.layer_weights() == {1: 0.5, 2: 2.5, 3: 0.5}
    assert (shared.routing_threshold, shared.exit_layer) == (0.0, 1)
    with pytest.raises(ValueError, match=r"1 <= first <= last, got \(3, 2\)"):
        StageConfig((3, 2))


def test_loss_is_the_weighted_sum_of_the_layers_cross_entropies(batches):
    model, (x, y) = small(4), batches[0]
    config = TrainingConfig([StageConfig((1, 2), 0.5), StageConfig((2, 2), 1.0), StageConfig((4, 4), 2.0)])
    losses = [F.cross_entropy(logits.flatten(0, 1), y.flatten()) for logits in model.forward_all_layers(x)]
    expected = 0.5 * losses[0] + 1.5 * losses[1] + 2.0 * losses[3]
    torch.testing.assert_close(Trainer(config, VOCAB).compute_loss(model, x, y), expected)


def test_layers_above_the_deepest_loss_are_not_run(batches):
    model, (x, y) = small(4), batches[0]
    for layer in model.layers[2:]:
        layer.register_forward_hook(lambda *_: pytest.fail("a layer above the loss was run"))
    assert Trainer(create_standard_config(2), VOCAB).compute_loss(model, x, y) > 0
    with pytest.raises(ValueError, match=r"names layer 5, but the model has layers 1\.\.4"):
        Trainer(create_standard_config(5), VOCAB).compute_loss(model, x, y)


GOLDEN_CURVE = [
    4.5531,
    4.5989,
    4.4913,
    4.546,
    4.55,
    4.4703,
    4.3977,
    4.3943,
    4.3564,
    4.3616,
    4.407,
    4.4057,
    4.2036,
    4.4167,
    4.3596,
    4.2107,
    4.3281,
    4.3147,
    4.4647,
    4.2337,
]


def test_twenty_steps_equal_a_hugging_face_llama_trained_on_the_same_batches():
    """Another route to the same curve: transformers' model and loss, torch's plain AdamW and clipping."""
    model = small(2, num_kv_heads=2)
    llama = llama_twin(model)
    norms = [p for n, p in llama.named_parameters() if p.dim() == 1 or "embed_tokens" in n]
    others = [p for n, p in llama.named_parameters() if not (p.dim() == 1 or "embed_tokens" in n)]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=False, foreach=False)
    data = random_batches(20, seed=3)
    expected = []
    for x, y in data:
        loss = F.cross_entropy(llama(x).logits.flatten(0, 1), y.flatten())
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
    trainer = Trainer(create_standard_config(2), VOCAB, options=StepOptions(grad_clip=1.0))
    ours = trainer.create_optimizer(model, 3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    curve = [trainer.train_epoch(model, [batch], ours) for batch in data]
    assert curve == pytest.approx(expected, abs=1e-4)
    assert curve == pytest.approx(GOLDEN_CURVE, abs=1e-3)


@pytest.mark.parametrize("count", [6, 5])
def test_gradient_accumulation_equals_the_large_batch(count):
    """Also where batches differ in size and the last step has fewer of them; SGD shows gradients as they are."""
    batches = [(x[: 1 + n % 3], y[: 1 + n % 3]) for n, (x, y) in enumerate(random_batches(count))]
    large = [
        tuple(torch.cat(column) for column in zip(*batches[at : at + 2], strict=True)) for at in range(0, count, 2)
    ]
    states = []
    for data, accumulation in ((large, 1), (batches, 2)):
        torch.manual_seed(0)
        model = small()
        trainer = Trainer(create_standard_config(2), VOCAB, options=StepOptions(accumulation=accumulation))
        trainer.train_epoch(model, data, torch.optim.SGD(model.parameters(), lr=1.0))
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-6)


def test_norms_and_embeddings_do_not_decay_and_the_frozen_is_left_out():
    model = small(tie_embeddings=True)
    model.layers[0].requires_grad_(False)
    decayed, spared = Trainer(create_standard_config(2), VOCAB).create_optimizer(model, 1e-3).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert spared["weight_decay"] == 0.0 < decayed["weight_decay"]
    assert {names[id(p)] for p in spared["params"]} == {
        "embedding.weight",
        *(f"layers.1.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm", "exit_norm")),
    }
    assert len(decayed["params"]) == 7
    assert all(names[id(p)].startswith("layers.1.") for p in decayed["params"])


def test_bf16_changes_little_and_keeps_float32_weights(batches):
    losses = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = small()
        trainer = Trainer(create_standard_config(2), VOCAB, options=StepOptions(precision=precision))
        losses.append(trainer.train_epoch(model, batches, trainer.create_optimizer(model, 1e-3)))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_evaluation_equals_brute_force(batches):
    model = DeepSupervisionTransformer(VOCAB, 32, 3, 4, exit_layer=1, routing_threshold=0.9)
    with torch.no_grad():
        both = [model.forward_train(x) for x, _ in batches]
        y = torch.cat([y.flatten() for _, y in batches])
        conf, shallow, deep = (
            torch.cat([b[key].flatten(0, 1) for b in both]) for key in ("confidence", "shallow_logits", "deep_logits")
        )
    threshold = conf.quantile(0.3).item()
    logits = torch.where((conf >= threshold)[:, None], shallow, deep)
    stats = Trainer(TrainingConfig([StageConfig((3, 3))], threshold, 1), VOCAB).evaluate(model, batches)
    assert stats["ppl"] == pytest.approx(F.cross_entropy(logits, y).exp().item(), rel=1e-5)
    assert stats["acc"] == pytest.approx((logits.argmax(-1) == y).float().mean().item())
    assert stats["shallow_ratio"] == pytest.approx((conf >= threshold).float().mean().item())
    assert stats["compute_cost"] == pytest.approx(1 - stats["shallow_ratio"] * 2 / 3)
    off = Trainer(TrainingConfig([StageConfig((3, 3))]), VOCAB).evaluate(model, batches)  # the trainer's threshold wins
    assert off["ppl"] == pytest.approx(F.cross_entropy(deep, y).exp().item(), rel=1e-5)
    assert (off["shallow_ratio"], off["compute_cost"]) == (0.0, 1.0)


def test_a_non_finite_loss_names_step_and_rate_and_leaves_the_best_model(batches):
    model = small()
    trainer = Trainer(create_standard_config(2), VOCAB)
    optimizer = trainer.create_optimizer(model, 1e-3)
    calls, kept = [], []

    class Explodes:
        def __iter__(self):
            calls.append(1)
            for number, batch in enumerate(batches):
                if len(calls) == 2 and number == 3:
                    model.layers[0].mlp.up_proj.weight.data.fill_(math.inf)
                yield batch

    def keep(epoch: int) -> None:
        kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    message = r"epoch 2: loss is nan at step 4 of the epoch, learning rate 0\.001; the best epoch before it was 1"
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.train_with_early_stopping(
            model, Explodes(), batches, optimizer, max_epochs=3, patience=1, verbose=False, on_best=keep
        )
    assert len(kept) == 1
    assert all(torch.equal(tensor, kept[0][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_step_with_a_non_finite_gradient_is_not_taken(batches, grad_clip):
    model = small()
    model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(create_standard_config(2), VOCAB, options=StepOptions(grad_clip=grad_clip))
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is (nan|inf) at step 1 of the epoch"):
        trainer.train_epoch(model, batches, trainer.create_optimizer(model, 1e-3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_generator_that_is_used_up_is_an_error_and_not_an_epoch_of_nothing(batches):
    model = small()
    trainer = Trainer(create_standard_config(2), VOCAB)
    optimizer = trainer.create_optimizer(model, 1e-3)
    once = (batch for batch in batches)
    with pytest.raises(ValueError, match="no batches: give a re-iterable such as a list"):
        trainer.train_with_early_stopping(model, once, batches, optimizer, max_epochs=3, patience=3, verbose=False)
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.num_layers = 2, got 3"):
        Trainer(TrainingConfig([StageConfig((2, 2))], 0.5, 3), VOCAB).evaluate(model, batches)


def test_set_epoch_is_called_from_zero(batches):
    class Loader(list):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    model, loader = small(), Loader(batches)
    trainer = Trainer(create_standard_config(2), VOCAB)
    optimizer = trainer.create_optimizer(model, 1e-3)
    result = trainer.train_with_early_stopping(model, loader, batches, optimizer, max_epochs=3, patience=3)
    assert epochs == [0, 1, 2]
    assert result["val_losses"][-1] < result["val_losses"][0] < VOCAB
