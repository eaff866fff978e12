"""The gather of rows as one array expression, which XLA compiles well everywhere: also its portable form."""

from jaxtyping import Array, Float, Integer


def gather_rows(x: Float[Array, "N D"], index: Integer[Array, " M"], position: Integer[Array, "N C"]) -> Array:
    """Reads the row of x that each row of the result is a copy of."""
    del position
    return x.at[index].get(mode="clip")
