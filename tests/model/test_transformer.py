"""Models: equality with transformers' Llama, exits that agree by construction, contexts, routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego import DeepSupervisionTransformer, StandardTransformer
from lego.model.losses import max_probability
from tests.conftest import VOCAB, logits_close, random_batches


def llama_weights(model: StandardTransformer) -> dict[str, torch.Tensor]:
    """Our weights under Llama's names: the exit norm of the last layer is Llama's final norm."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "embedding.weight":
            weights["model.embed_tokens.weight"] = tensor
        elif name == "output_head.weight":
            weights["lm_head.weight"] = tensor
        elif name == f"layers.{model.num_layers - 1}.exit_norm.weight":
            weights["model.norm.weight"] = tensor
        elif "exit_norm" not in name:
            weights[f"model.{name}"] = tensor
    return weights


def llama_twin(model: StandardTransformer, attention: str = "sdpa") -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    s = model.sizes
    config = LlamaConfig(
        vocab_size=s["vocab_size"],
        hidden_size=s["dim"],
        intermediate_size=s["ffn_dim"],
        num_hidden_layers=s["num_layers"],
        num_attention_heads=s["num_heads"],
        num_key_value_heads=s["num_kv_heads"],
        rms_norm_eps=s["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": s["rope_theta"]},
        tie_word_embeddings=s["tie_embeddings"],
        attn_implementation=attention,
    )
    llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(llama_weights(model), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} if s["tie_embeddings"] else not missing
    return llama


CONFIGURATIONS = [
    dict(dim=32, num_layers=2, num_heads=4),
    dict(dim=48, num_layers=3, num_heads=6, num_kv_heads=2, ffn_dim=100),
    dict(dim=64, num_layers=1, num_heads=2, num_kv_heads=1, rope_theta=500.0, norm_eps=1e-5),
    dict(dim=40, num_layers=5, num_heads=5, num_kv_heads=5, ffn_dim=37, tie_embeddings=True),
]


@pytest.mark.parametrize("sizes", CONFIGURATIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_depth_logits_equal_llama(sizes, attention):
    model = StandardTransformer(VOCAB, **sizes).eval()
    for parameter in model.parameters():  # norms away from one, weights large enough to tell differences
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    llama = llama_twin(model, attention).eval()
    x = torch.randint(0, VOCAB, (3, 17))
    with torch.no_grad():
        expected = llama(x).logits
        assert expected.std() > 0.5
        logits_close(model(x), expected)
        deep = DeepSupervisionTransformer(VOCAB, exit_layer=1, block2_context="full", **sizes).eval()
        deep.load_state_dict(model.state_dict())
        logits_close(deep(x), expected)


def grown_like(num_layers: int = 4, exit_layer: int = 2, **options) -> DeepSupervisionTransformer:
    model = DeepSupervisionTransformer(VOCAB, 32, num_layers, 4, exit_layer=exit_layer, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


SEQUENCE = grown_like(block2_context="sequence", num_kv_heads=2)


@pytest.mark.parametrize("context", ["full", "token", "sequence"])
@torch.no_grad()
def test_exits_agree(context):
    model = grown_like(block2_context=context)
    x = torch.randint(0, VOCAB, (2, 9))
    every = model.forward_all_layers(x)
    both = model.forward_train(x)
    assert len(every) == 4
    logits_close(every[3], model(x))
    logits_close(every[1], both["shallow_logits"])
    logits_close(every[3], both["deep_logits"])
    hidden = model.forward_to_hidden(x)
    assert hidden.shape == (2, 9, 32)
    logits_close(model.compute_confidence(hidden), every[1].softmax(-1).amax(-1))
    logits_close(model.compute_confidence(hidden), both["confidence"])
    logits_close(model.logits_at(hidden, 2), every[1])
    assert both["confidence"].shape == (2, 9)
    assert set(both) == {"shallow_logits", "deep_logits", "confidence", "shallow_ratio"}


@pytest.mark.parametrize("context", ["full", "token", "sequence"])
@torch.no_grad()
def test_routing_takes_each_token_from_the_exit_its_confidence_names(context):
    model = grown_like(block2_context=context)
    x = torch.randint(0, VOCAB, (3, 11))
    both = model.forward_train(x)
    model.routing_threshold = both["confidence"].median().item()
    easy = both["confidence"] >= model.routing_threshold
    expected = torch.where(easy.unsqueeze(-1), both["shallow_logits"], both["deep_logits"])
    logits, stats = model.forward_inference(x)
    logits_close(logits, expected)
    share = easy.float().mean().item()
    assert 0 < share < 1
    assert set(stats) == {"mean_confidence", "shallow_ratio", "compute_cost"}
    assert all(type(value) is float for value in stats.values())
    assert stats["shallow_ratio"] == pytest.approx(share)
    assert stats["compute_cost"] == pytest.approx(share * 0.5 + (1 - share))
    assert stats["mean_confidence"] == pytest.approx(both["confidence"].mean().item())
    assert model.forward_train(x)["shallow_ratio"] == pytest.approx(share)


@torch.no_grad()
def test_threshold_zero_is_routing_off_and_one_above_all_is_deep():
    model = grown_like()
    x = torch.randint(0, VOCAB, (2, 5))
    for threshold, cost in ((0.0, 1.0), (1.1, 1.0)):
        model.routing_threshold = threshold
        logits, stats = model.forward_inference(x)
        logits_close(logits, model(x))
        assert (stats["shallow_ratio"], stats["compute_cost"]) == (0.0, cost)
    model.routing_threshold = 1e-9
    logits, stats = model.forward_inference(x)
    logits_close(logits, model.forward_all_layers(x)[1])
    assert (stats["shallow_ratio"], stats["compute_cost"]) == (1.0, 0.5)


@torch.no_grad()
def test_token_context_sees_no_other_token_above_the_exit_and_full_context_does():
    hidden = torch.randn(2, 7, 32)
    changed = hidden.clone()
    changed[:, 0] += 1.0
    token, full = grown_like(block2_context="token"), grown_like(block2_context="full")
    logits_close(token.run_layers(hidden, 3, 4)[:, 1:], token.run_layers(changed, 3, 4)[:, 1:])
    assert not torch.allclose(full.run_layers(hidden, 3, 4)[:, 1:], full.run_layers(changed, 3, 4)[:, 1:])
    alone = torch.stack([token.run_layers(hidden[:, t : t + 1], 3, 4)[:, 0] for t in range(7)], dim=1)
    logits_close(token.run_layers(hidden, 3, 4), alone)


def turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


@torch.no_grad()
def naive_sequence_context(model: DeepSupervisionTransformer, hidden: torch.Tensor) -> torch.Tensor:
    """Spec section 5 word by word: every token alone, over keys and values of exit states up to itself."""
    B, T, _ = hidden.shape
    out = torch.empty_like(hidden)
    for b in range(B):
        for t in range(T):
            x = hidden[b, t]
            for number in range(model.exit_layer + 1, model.num_layers + 1):
                layer = model.layer(number)
                attention, H, d = layer.self_attn, layer.self_attn.num_heads, layer.self_attn.head_dim
                group = H // attention.num_kv_heads
                normed = layer.input_layernorm(hidden[b, : t + 1])
                k, v = attention.k_proj(normed).view(t + 1, -1, d), attention.v_proj(normed).view(t + 1, -1, d)
                q = attention.q_proj(layer.input_layernorm(x)).view(H, d)
                angle = torch.outer(torch.arange(t + 1.0), attention.inv_freq).repeat(1, 2)  # (t + 1, d)
                heads = []
                for head in range(H):
                    keys = torch.stack([turned(k[s, head // group], angle[s]) for s in range(t + 1)])
                    weights = (keys @ turned(q[head], angle[t]) / d**0.5).softmax(0)
                    heads.append(weights @ v[:, head // group])
                x = x + attention.o_proj(torch.cat(heads))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            out[b, t] = x
    return out


@pytest.mark.parametrize("sizes", [{}, {"num_kv_heads": 2}])
@torch.no_grad()
def test_sequence_context_is_what_the_specification_says(sizes):
    model = grown_like(block2_context="sequence", **sizes)
    hidden = torch.randn(2, 7, 32)
    logits_close(model.run_layers(hidden, 3, 4), naive_sequence_context(model, hidden))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**20), batch=st.integers(1, 4), length=st.integers(2, 12), share=st.floats(0, 1))
@torch.no_grad()
def test_a_tokens_deep_result_never_depends_on_which_others_exit(seed, batch, length, share):
    torch.manual_seed(seed)
    hidden, mask = torch.randn(batch, length, 32), torch.rand(batch, length) < share
    everything = SEQUENCE.run_layers(hidden, 3, 4)
    gathered = SEQUENCE.deepen(hidden, mask, 2)
    assert gathered.shape == (int(mask.sum()), 32)
    logits_close(gathered, everything[mask])


@torch.no_grad()
def test_sequence_context_runs_from_the_exit_alone():
    model = grown_like(block2_context="sequence")
    with pytest.raises(ValueError, match="layers above the exit run from layer 3 on, got first = 4"):
        model.run_layers(torch.randn(1, 3, 32), 4, 4)


@torch.no_grad()
def test_the_shortcut_for_a_lone_token_equals_attention_over_one_key():
    layer = grown_like(num_kv_heads=2).layer(1)
    lone, pair = torch.randn(1, 1, 32), torch.randn(1, 1, 32)
    logits_close(layer(lone), layer(torch.cat([lone, pair], dim=1))[:, :1])  # causal: the first token sees only itself


@torch.no_grad()
def test_max_probability_is_the_largest_softmax_entry():
    logits = torch.randn(50, VOCAB) * 10
    logits_close(max_probability(logits), logits.softmax(-1).amax(-1), 1e-6)


def test_parameter_names_are_llamas():
    names = {name for name, _ in StandardTransformer(VOCAB, 32, 1, 4).layers[0].named_parameters()}
    projections = {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {
        f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "exit_norm.weight"}
    assert names == projections | norms


def test_a_plain_constructor_zeroes_nothing_and_ties_only_on_request():
    model = DeepSupervisionTransformer(VOCAB, 32, 2, 4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones(32)), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert model.output_head.weight is not model.embedding.weight
    tied = DeepSupervisionTransformer(VOCAB, 32, 2, 4, tie_embeddings=True)
    assert tied.output_head.weight is tied.embedding.weight
    assert (model.exit_layer, model.routing_threshold, model.num_layers) == (1, 0.0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_layers=2, exit_layer=3), "exit_layer must be in 1..num_layers = 2, got 3"),
        (dict(num_layers=0, exit_layer=1), "num_layers must be at least 1, got 0"),
        (
            dict(num_layers=2, block2_context="sentence"),
            "block2_context must be one of full, token, sequence, got 'sentence'",
        ),
        (dict(num_layers=2, num_kv_heads=3), "num_kv_heads must divide num_heads = 4, got 3"),
        (dict(num_layers=2, dim=36), "dim must be a multiple of 2 * num_heads = 8, got 36"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        DeepSupervisionTransformer(VOCAB, num_heads=4, **({"dim": 32} | arguments))


def test_layers_are_called_as_modules():
    model = DeepSupervisionTransformer(VOCAB, 32, 3, 4, exit_layer=1)
    called = []
    for number, layer in enumerate(model.layers, 1):
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    model(random_batches(1)[0][0])
    assert called == [1, 2, 3]
