import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.models.attention import attention_implementation, causal_attention, rope_rotation, rotate


def scores_at(query, key, query_position, key_position, theta=100.0):
    def at(x, position):
        return rotate(x[None, None, None], rope_rotation(jnp.full((1, 1), position), x.shape[-1], theta))

    return jnp.vdot(at(query, query_position), at(key, key_position))


def test_rope_scores_depend_on_the_distance_of_two_tokens_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    near = scores_at(query, key, 5, 2)
    np.testing.assert_allclose(scores_at(query, key, 1005, 1002), near, rtol=1e-3)
    assert abs(scores_at(query, key, 6, 2) - near) > 1e-2
    np.testing.assert_allclose(scores_at(query, key, 3, 3), jnp.vdot(query, key), rtol=1e-5)


def test_rope_turns_the_first_pair_by_one_radian_per_position():
    x = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    rotated = rotate(x, rope_rotation(jnp.array([[3]]), 4, 10_000.0))
    np.testing.assert_allclose(rotated.ravel(), [np.cos(3), 0, np.sin(3), 0], atol=1e-6)


def test_automatic_attention_is_xla_where_cudnn_cannot_run():
    assert attention_implementation("auto", jnp.float32, 6) == "xla"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs a machine that cannot run cuDNN")
def test_asking_for_cudnn_where_it_cannot_run_says_why():
    with pytest.raises(ValueError, match=r"not an NVIDIA GPU; dtype is float32.*; head_dim is 6.*Use 'auto'"):
        attention_implementation("cudnn", "float32", 6)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_attention_is_what_xla_computes_forward_and_backward(packed):
    keys = jax.random.split(jax.random.key(0), 4)
    query, out_grad = (jax.random.normal(key, (2, 256, 8, 64), jnp.bfloat16) for key in keys[:2])
    key, value = (jax.random.normal(key, (2, 256, 2, 64), jnp.bfloat16) for key in keys[2:])
    segment_ids = jnp.repeat(jnp.array([[1, 2, 2, 0], [3, 3, 3, 4]]), 64, axis=1) if packed else None

    def run(implementation):
        out, pull_back = jax.vjp(
            lambda q, k, v: causal_attention(q, k, v, segment_ids, implementation), query, key, value
        )
        return [out, *pull_back(out_grad)]

    for cudnn, xla in zip(jax.jit(run, static_argnums=0)("cudnn"), jax.jit(run, static_argnums=0)("xla"), strict=True):
        error = jnp.linalg.norm((cudnn - xla).astype(jnp.float32)) / jnp.linalg.norm(xla.astype(jnp.float32))
        assert error < 1e-2
