"""Token rounding: every expert gets whole blocks of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.routers import route_token_rounding
from jmoe.routing import count_assignments


def numpy_route(logits, k, block_rows, rounding, normalize):
    """{(token, expert): weight} by the paper's steps, expert by expert."""
    z = np.asarray(logits, np.float64)
    T, E = z.shape
    scores = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    chosen = [set(np.argsort(-z[t], kind="stable")[:k]) for t in range(T)]
    weight = scores.copy()
    if normalize:
        for t in range(T):
            for e in chosen[t]:
                weight[t, e] /= sum(scores[t, f] for f in chosen[t])
    taken = {}
    for e in range(E):
        own = sorted((t for t in range(T) if e in chosen[t]), key=lambda t: -weight[t, e])
        others = sorted((t for t in range(T) if e not in chosen[t]), key=lambda t: -scores[t, e])
        round_ = {"up": np.ceil, "down": np.floor, "nearest": np.round}[rounding]
        for t in (own + others)[: int(round_(len(own) / block_rows)) * block_rows]:
            taken[t, e] = weight[t, e]
    return taken


def present(routing):
    entries = zip(*(np.asarray(a).tolist() for a in jax.tree.leaves(routing)), strict=True)
    return {(t, e): w for t, e, w in entries if e >= 0}


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((61, 6)) + np.arange(6) / 3, jnp.float32)


@pytest.mark.parametrize("rounding", ["up", "down", "nearest"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("block_rows", [8, 5])
def test_experts_take_whole_blocks_as_in_the_paper(rounding, normalize, block_rows, logits):
    options = {"block_rows": block_rows, "rounding": rounding, "normalize": normalize}
    routing = jax.jit(lambda z: route_token_rounding(z, 2, **options))(logits)
    actual, expected = present(routing), numpy_route(logits, 2, block_rows, rounding, normalize)
    assert actual.keys() == expected.keys()
    for assignment, weight in expected.items():
        assert actual[assignment] == pytest.approx(weight, rel=1e-5)
    counts = np.bincount([e for _, e in actual], minlength=6)
    assert all(count % block_rows == 0 or count == 61 for count in counts)


def test_fewer_rows_are_padded_than_by_top_k(logits):
    def padded_rows(routing):
        counts = np.bincount(np.asarray(routing.expert_index)[np.asarray(routing.expert_index) >= 0])
        return (-counts % 8).sum()

    assert padded_rows(jmoe.route_top_k(logits, 2)) > 0
    assert padded_rows(route_token_rounding(logits, 2, block_rows=8)) == 0


def test_blocks_of_one_row_are_top_k(logits):
    routing, top_k = route_token_rounding(logits, 2, block_rows=1), jmoe.route_top_k(logits, 2)
    order = np.argsort(np.asarray(top_k.expert_index), axis=1)
    expected_index = np.take_along_axis(np.asarray(top_k.expert_index), order, axis=1)
    np.testing.assert_array_equal(routing.expert_index, expected_index.ravel())
    np.testing.assert_allclose(routing.weight, np.take_along_axis(np.asarray(top_k.weight), order, axis=1).ravel())


@pytest.mark.parametrize("rounding", ["up", "down", "nearest"])
def test_all_tokens_on_one_expert_and_others_empty_fit_the_bound(rounding):
    routing = route_token_rounding(jnp.tile(jnp.array([[9.0, 0.0, 0.0]]), (7, 1)), 1, block_rows=4, rounding=rounding)
    tokens = {"up": 7, "down": 4, "nearest": 7}[rounding]  # 8 would be more than there are
    assert count_assignments(routing.expert_index, 3).tolist() == [tokens, 0, 0]


def test_a_single_token_is_kept_by_rounding_up_and_lost_by_rounding_down():
    up, down = (route_token_rounding(jnp.array([[1.0, 0.0]]), 1, block_rows=4, rounding=r) for r in ("up", "down"))
    assert present(up) == {(0, 0): 1.0}
    assert not present(down)


@pytest.mark.parametrize("rounding", ["up", "nearest"])
def test_masked_tokens_neither_count_nor_fill_blocks(rounding, logits):
    mask = jnp.arange(61) % 4 > 0
    routing = route_token_rounding(
        jnp.where(mask[:, None], logits, jnp.nan), 2, block_rows=8, rounding=rounding, mask=mask
    )
    place = {int(t): i for i, t in enumerate(np.flatnonzero(mask))}
    actual = {(place[t], e): w for (t, e), w in present(routing).items()}
    expected = present(route_token_rounding(logits[mask], 2, block_rows=8, rounding=rounding))
    assert actual == pytest.approx(expected)


def test_gradients_of_the_weights_match_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        logits, direction = (rng.standard_normal((9, 3)) for _ in range(2))
        dw = rng.standard_normal(50)

        def loss(logits):
            weight = route_token_rounding(logits, 2, block_rows=4, rounding="up").weight
            return jnp.sum(weight * dw[: weight.size])

        slope = np.sum(jax.grad(loss)(jnp.asarray(logits)) * direction)
        up, down = (loss(jnp.asarray(logits + sign * 1e-6 * direction)) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_rows": 0}, "block_rows is 0; it must be at least 1"),
        ({"rounding": "even"}, "rounding is 'even'; it must be 'nearest', 'up' or 'down'"),
        ({"k": 7}, "k is 7"),
    ],
)
def test_bad_arguments_raise(options, message, logits):
    with pytest.raises(ValueError, match=message):
        route_token_rounding(logits, **{"k": 2, **options})
