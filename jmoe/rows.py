"""What is done to each row around a grouped matmul, in float32 or better."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jmoe.dispatch import Dispatch


def take_rows(matrix: Float[Array, "_ D"], index: Int32[Array, " R"] | None) -> Float[Array, "R D"]:
    """Reads `matrix[index[m]]` for each row m. An absent row reads some row or other."""
    return matrix if index is None else matrix.at[index].get(mode="clip")


def of_expert(per_expert: Float[Array, "E N"], dispatch: Dispatch) -> Float[Array, "R N"]:
    """Reads the vector of each row's expert, such as a bias. An absent row reads some expert's."""
    return accumulator(per_expert).at[dispatch.expert_index].get(mode="clip")


def weighted(rows: Float[Array, "R N"], weight: Float[Array, "*_"], dispatch: Dispatch) -> Float[Array, "R N"]:
    """Multiplies each row with the weight of its assignment. Of absent rows nothing is promised."""
    return (dispatch.to_rows(weight)[:, None] * accumulator(rows)).astype(rows.dtype)


def accumulator_dtype(array: Float[Array, "..."]) -> jnp.dtype:
    """The dtype that sums of such values are taken in."""
    return jnp.promote_types(array.dtype, jnp.float32)


def accumulator(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """Casts an array to the dtype that sums are taken in."""
    return array.astype(accumulator_dtype(array))
