import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import named_sharding
from jmoe.models import generate
from jmoe.models.generate import sample_token


@pytest.fixture(scope="module")
def greedy(model):
    return functools.partial(generate, model, num_tokens=5, key=jax.random.key(0), temperature=0)


def test_greedy_generation_is_the_model_run_again_on_every_prefix(greedy, forward, tokens):
    generated = greedy(tokens[:, :7])
    assert generated.shape == (2, 12)
    np.testing.assert_array_equal(generated[:, :7], tokens[:, :7])
    likeliest = jnp.argmax(forward(generated)[0], axis=-1)
    np.testing.assert_array_equal(generated[:, 7:], likeliest[:, 6:-1])
    assert len(set(generated[:, 7:].ravel().tolist())) > 2, "a constant continuation shows nothing"


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unscanned"])
def test_layers_that_repeat_have_caches_of_their_own(config, new_model, tokens, scan_layers):
    model = new_model(dataclasses.replace(config, num_layers=5, scan_layers=scan_layers))
    generated = generate(model, tokens[:, :7], 5, key=jax.random.key(0), temperature=0)
    logits, _ = jax.jit(lambda model, tokens: model(tokens))(model, generated)
    np.testing.assert_array_equal(generated[:, 7:], jnp.argmax(logits, axis=-1)[:, 6:-1])


def test_prompts_of_different_lengths_continue_as_if_alone(greedy, forward, tokens):
    lengths = jnp.array([3, 7])
    generated = greedy(tokens[:, :7], prompt_lengths=lengths)
    np.testing.assert_array_equal(generated[1], greedy(tokens[:, :7])[1])
    np.testing.assert_array_equal(generated[0, :3], tokens[0, :3])
    likeliest = jnp.argmax(forward(generated)[0], axis=-1)
    np.testing.assert_array_equal(generated[0, 3:8], likeliest[0, 2:7])
    np.testing.assert_array_equal(generated[0, 8:], 0)


def test_generation_runs_on_a_mesh_with_explicit_axes(greedy, model, tokens):
    axis_types = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=axis_types)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, named_sharding(model, mesh))
        prompt = jax.device_put(tokens[:, :7], jax.NamedSharding(mesh, jax.P("data")))
        on_mesh = generate(sharded, prompt, num_tokens=5, key=jax.random.key(0), temperature=0)
        logits, _ = jax.jit(lambda model, tokens: model(tokens))(sharded, on_mesh)
        assert jax.typeof(logits).sharding.spec[0] == "data"
    np.testing.assert_array_equal(on_mesh, greedy(tokens[:, :7]))
    likeliest = jnp.argmax(jax.device_get(logits), axis=-1)
    np.testing.assert_array_equal(on_mesh[:, 7:], likeliest[:, 6:-1])


def test_sampling_follows_the_key_and_the_options(model, forward, tokens):
    sample = functools.partial(generate, model, tokens[:, :7], 5, temperature=50.0, top_k=2)
    first, again, other = (sample(key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    _, best_two = jax.lax.top_k(forward(first)[0][:, 6:-1], 2)  # [B, 5, 2]
    assert (best_two == first[:, 7:, None]).any(axis=-1).all()


def test_tokens_are_drawn_with_the_probabilities_that_the_options_leave():
    probability = jnp.array([0.5, 0.1, 0.3, 0.06, 0.04])
    logits = jnp.broadcast_to(jnp.log(probability), (20_000, 5))

    def frequencies(temperature=1.0, top_k=None, top_p=None):
        drawn = sample_token(logits, jax.random.key(3), temperature=temperature, top_k=top_k, top_p=top_p)
        return jnp.bincount(drawn, length=5) / len(drawn)

    def renormalized(kept, power=1.0):
        return jnp.where(jnp.array(kept), probability**power, 0) / jnp.sum(probability**power, where=jnp.array(kept))

    everything = [True] * 5
    for actual, expected in [
        (frequencies(), probability),
        (frequencies(temperature=0.5), renormalized(everything, 2)),
        (frequencies(temperature=0.0), jnp.array([1, 0, 0, 0, 0])),
        (frequencies(top_k=3), renormalized([True, True, True, False, False])),
        # 0.5 + 0.3 reaches 0.7 but not 0.85, which takes the third likeliest too.
        (frequencies(top_p=0.7), renormalized([True, False, True, False, False])),
        (frequencies(top_p=0.85), renormalized([True, True, True, False, False])),
        (frequencies(top_p=1e-6), jnp.array([1, 0, 0, 0, 0])),
        (frequencies(top_p=1.0), probability),
        # After the top two, renormalized, the first alone reaches 0.6.
        (frequencies(top_k=2, top_p=0.6), jnp.array([1, 0, 0, 0, 0])),
    ]:
        np.testing.assert_allclose(actual, expected, atol=0.015)
        np.testing.assert_array_equal(actual > 0, expected > 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"num_tokens": 13}, "max_sequence_length = 16 tokens together, got 4 \\+ 13"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
        ({"top_k": 32}, "top_k must be from 1 to vocab_size = 31, got 32"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"prompt": jnp.zeros((1, 0), jnp.int32)}, "prompt must have at least one token"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_out_of_range_raise(model, changes, message):
    arguments = {"prompt": jnp.zeros((1, 4), jnp.int32), "num_tokens": 2, "key": jax.random.key(0)} | changes
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)
