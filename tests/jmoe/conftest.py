"""An MoE written from the formulas in NumPy, a token and an expert at a time, and random problems for it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe

GATES = {
    "swiglu": lambda z: z / (1 + np.exp(-z)),
    "geglu": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "reglu": lambda z: np.maximum(z, 0),
}
PLAIN = {
    "gelu": GATES["geglu"],
    "relu": GATES["reglu"],
    "relu_squared": lambda z: np.maximum(z, 0) ** 2,
    "silu": GATES["swiglu"],
}


@dataclasses.dataclass
class Problem:
    """The arrays of one call of `jmoe.moe_mlp`."""

    x: jax.Array
    w_up: jax.Array
    w_down: jax.Array
    b_up: jax.Array | None
    b_down: jax.Array | None
    weight: jax.Array
    expert_index: jax.Array
    options: dict

    @property
    def differentiable(self):
        names = ("x", "w_up", "w_down", "b_up", "b_down", "weight")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def moe_mlp(self, **changes):
        """Computes the product's answer, with some of the arrays exchanged."""
        p = dataclasses.replace(self, **changes)
        routing = jmoe.Routing(p.expert_index, p.weight)
        return jmoe.moe_mlp(p.x, p.w_up, p.w_down, routing, b_up=p.b_up, b_down=p.b_down, **p.options)

    def numpy_moe(self):
        """Computes the same from the formulas, in float64."""
        x, w_up, w_down, weight = (np.asarray(a, np.float64) for a in (self.x, self.w_up, self.w_down, self.weight))
        num_experts, hidden, features = w_down.shape
        b_up = np.zeros((num_experts, w_up.shape[2])) if self.b_up is None else np.asarray(self.b_up, np.float64)
        b_down = np.zeros((num_experts, features)) if self.b_down is None else np.asarray(self.b_down, np.float64)
        activation, weight_on = self.options["activation"], self.options.get("weight_on", "output")
        y = np.zeros_like(x)
        for t, experts in enumerate(np.asarray(self.expert_index)):
            for k, e in enumerate(experts):
                if not 0 <= e < num_experts:
                    continue
                row = x[t] * weight[t, k] if weight_on == "input" else x[t]
                h = row @ w_up[e] + b_up[e]
                a = GATES[activation](h[:hidden]) * h[hidden:] if activation in GATES else PLAIN[activation](h)
                v = a @ w_down[e] + b_down[e]
                y[t] += weight[t, k] * v if weight_on == "output" else v
        return y

    def dense_moe(self, **changes):
        """Computes the same with every token through every expert, for JAX to differentiate."""
        p = dataclasses.replace(self, **changes)
        present = (p.expert_index[:, :, None] == jnp.arange(p.w_up.shape[0])).astype(p.x.dtype)  # [T, K, E]
        weight = jnp.einsum("tk,tke->te", p.weight, present)
        chosen = present.sum(axis=1)
        on_input = p.options.get("weight_on") == "input"
        rows = p.x[:, None] * (weight if on_input else chosen)[:, :, None]
        h = jnp.einsum("ted,edh->teh", rows, p.w_up) + (0 if p.b_up is None else p.b_up)
        activation = p.options["activation"]
        functions = {
            "swiglu": jax.nn.silu,
            "geglu": jax.nn.gelu,
            "reglu": jax.nn.relu,
            "gelu": jax.nn.gelu,
            "relu": jax.nn.relu,
            "relu_squared": lambda z: jax.nn.relu(z) ** 2,
            "silu": jax.nn.silu,
        }
        if activation in GATES:
            gate, up = jnp.split(h, 2, axis=-1)
            a = functions[activation](gate) * up
        else:
            a = functions[activation](h)
        v = jnp.einsum("tef,efd->ted", a, p.w_down) + (0 if p.b_down is None else p.b_down)
        return jnp.einsum("te,ted->td", chosen if on_input else weight, v)


@pytest.fixture
def make_problem():
    def make(
        tokens,
        experts,
        top_k,
        *,
        activation="swiglu",
        bias=False,
        dtype=jnp.float32,
        features=12,
        hidden=20,
        seed=0,
        **options,
    ):
        rng = np.random.default_rng([seed, tokens, experts, top_k])
        width = 2 * hidden if activation in GATES else hidden

        def normal(*shape, scale=1.0, dtype=dtype):
            return jnp.asarray(rng.standard_normal(shape) * scale, dtype)

        expert_index = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
        return Problem(
            x=normal(tokens, features),
            w_up=normal(experts, features, width, scale=features**-0.5),
            w_down=normal(experts, hidden, features, scale=hidden**-0.5),
            b_up=normal(experts, width) if bias else None,
            b_down=normal(experts, features) if bias else None,
            weight=jnp.asarray(rng.random((tokens, top_k)), jnp.promote_types(dtype, jnp.float32)),
            expert_index=jnp.asarray(expert_index, jnp.int32),
            options={"activation": activation, **options},
        )

    return make
