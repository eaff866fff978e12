"""Block-sparse matrices: the values of nonzero blocks, and where they are."""

import dataclasses
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Shaped

from pallas_kernels.block_sparse.topology import Topology
from pallas_kernels.rows import sum_rows


@no_type_check  # JAX also builds pytrees of other shapes and of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSparseMatrix:
    """A matrix of which only some blocks are stored; the others are zero.

    What `values` holds past the topology's last block is padding: it may be anything, and no operation lets it into
    a result. To differentiate with respect to a matrix, differentiate with respect to its `values`.

    Attributes:
        values: [B, block, block], in the order of the topology.
        topology: where the blocks are, not transposed.
        is_transposed: whether the matrix is the transpose of what `values` and `topology` say.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = BlockSparseMatrix.from_dense(jnp.array([[0, 0, 1, 2], [0, 0, 3, 4.0]]), block=2)
        >>> matrix.values.tolist(), matrix.shape, matrix.T.shape
        ([[[1.0, 2.0], [3.0, 4.0]]], (2, 4), (4, 2))
        >>> matrix.T.to_dense().tolist()
        [[0.0, 0.0], [0.0, 0.0], [1.0, 3.0], [2.0, 4.0]]
    """

    values: Shaped[Array, "B block block"]
    topology: Topology
    is_transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def from_mask(
        cls,
        mask: Bool[Array, "rows columns"] | Bool[np.ndarray, "rows columns"],
        *,
        block: int = 128,
        num_blocks: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "BlockSparseMatrix":
        """Makes the matrix that is one in the blocks of a mask; arguments are those of `Topology.from_mask`."""
        topology = Topology.from_mask(mask, block=block, num_blocks=num_blocks)
        ones = jnp.ones((topology.max_num_blocks, block, block), dtype)
        return cls(jnp.where(topology.is_block[:, None, None], ones, 0), topology)

    @classmethod
    def from_dense(
        cls, dense: Shaped[Array, "M N"], *, block: int = 128, num_blocks: int | None = None
    ) -> "BlockSparseMatrix":
        """Stores the blocks of a dense matrix that are not zero.

        Args:
            dense: [M, N], with M and N multiples of `block`.
            block: rows and columns of a block.
            num_blocks: as in `Topology.from_mask`.

        Raises:
            ValueError: as `Topology.from_mask`, or `dense` is no matrix of whole blocks.
        """
        if dense.ndim != 2 or block < 1 or dense.shape[0] % block or dense.shape[1] % block:
            raise ValueError(f"dense is {dense.dtype}{list(dense.shape)}; it must be a matrix of blocks of {block}.")
        blocks = _cut(dense, block)
        topology = Topology.from_mask((blocks != 0).any(axis=(2, 3)), block=block, num_blocks=num_blocks)
        return cls.select(dense, topology)

    @classmethod
    def select(cls, dense: Shaped[Array, "M N"], topology: Topology) -> "BlockSparseMatrix":
        """Takes the blocks of a topology out of a dense matrix, zero or not.

        Raises:
            ValueError: `dense` has not the shape of the topology.
        """
        if dense.shape != topology.shape:
            raise ValueError(f"dense is {list(dense.shape)}; it must have the topology's shape, {topology.shape}.")
        blocks = _cut(dense, topology.block)
        at = blocks.at[topology.row_indices, topology.column_indices]
        return cls(at.get(mode="fill", fill_value=0), topology)

    @classmethod
    def random(
        cls,
        key: Array,
        shape: tuple[int, int],
        *,
        sparsity: float,
        block: int = 128,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "BlockSparseMatrix":
        """Draws standard normal values for blocks at random places.

        Args:
            key: a PRNG key.
            shape: of the matrix, multiples of `block`.
            sparsity: the share of the blocks that are zero; rounded to a number of blocks, of which one is left.
            block: rows and columns of a block.
            dtype: of the values.

        Raises:
            ValueError: `shape` is not one of whole blocks, or `sparsity` is outside [0, 1].
        """
        if block < 1 or any(size < 1 or size % block for size in shape):
            raise ValueError(f"shape is {shape}; it must be of positive multiples of the block, {block}.")
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity is {sparsity}; it must be from 0 to 1.")
        rows, columns = shape[0] // block, shape[1] // block
        num_blocks = max(round((1 - sparsity) * rows * columns), 1)
        of_places, of_values = jax.random.split(key)
        place = jax.random.permutation(of_places, rows * columns)[:num_blocks]
        mask = jnp.zeros(rows * columns, bool).at[place].set(True).reshape(rows, columns)
        values = jax.random.normal(of_values, (num_blocks, block, block), dtype)
        return cls(values, Topology.from_mask(mask, block=block, num_blocks=num_blocks))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, in elements."""
        rows, columns = self.topology.shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def block(self) -> int:
        """Rows and columns of a block."""
        return self.topology.block

    @property
    def T(self) -> "BlockSparseMatrix":
        """The transpose, which is the same arrays: kernels read blocks transposed, in the transposed order."""
        return dataclasses.replace(self, is_transposed=not self.is_transposed)

    @property
    def row_indices(self) -> Int32[Array, " B"]:
        """The block row of each of the `values`; the number of block rows in padding."""
        return self.topology.column_indices if self.is_transposed else self.topology.row_indices

    @property
    def column_indices(self) -> Int32[Array, " B"]:
        """The block column of each of the `values`; the number of block columns in padding."""
        return self.topology.row_indices if self.is_transposed else self.topology.column_indices

    def with_values(self, values: Shaped[Array, "B block block"]) -> "BlockSparseMatrix":
        """Returns a matrix of the same blocks with other values."""
        if values.shape != self.values.shape:
            raise ValueError(f"values are {list(values.shape)}; they must be {list(self.values.shape)}.")
        return dataclasses.replace(self, values=values)

    def map(self, function: Callable[..., Array], *others: "BlockSparseMatrix") -> "BlockSparseMatrix":
        """Applies a function, element by element, to the stored blocks of matrices of one topology.

        The other blocks stay zero, even where the function is not zero at zero, as for a topology that is a mask.

        Raises:
            ValueError: `others` has a matrix of another topology. Where blocks are is seen unless it is traced; that
                traced topologies are the same is the caller's to know.
        """
        for other in others:
            if other.is_transposed != self.is_transposed or not self.topology.may_equal(other.topology):
                raise ValueError("others has a matrix of another topology; all must be of the same.")
        return self.with_values(function(self.values, *(other.values for other in others)))

    def sum(self, axis: int | None = None) -> Float[Array, "*_"]:
        """Sums all elements, or those of each column (axis 0) or row (axis 1), in float32 or better."""
        if axis not in (None, 0, 1):
            raise ValueError(f"axis is {axis}; it must be None, 0 or 1.")
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        values = jnp.where(self.topology.is_block[:, None, None], self.values.astype(dtype), 0)
        if axis is None:
            return values.sum()
        of_lines = values.sum(axis=2 if self.is_transposed == (axis == 0) else 1)  # [B, block]
        indices = self.column_indices if axis == 0 else self.row_indices
        num_elements = self.shape[1 - axis]
        return sum_rows(of_lines, indices, num_elements // self.block).reshape(num_elements)

    def to_dense(self) -> Shaped[Array, "M N"]:
        """Returns the matrix with its zeros."""
        rows, columns = (size // self.block for size in self.topology.shape)
        blocks = jnp.zeros((rows, columns, self.block, self.block), self.dtype)
        where = blocks.at[self.topology.row_indices, self.topology.column_indices]
        blocks = where.set(self.values, mode="drop")
        dense = blocks.swapaxes(1, 2).reshape(self.topology.shape)
        return dense.T if self.is_transposed else dense


def _cut(dense: Shaped[Array, "M N"], block: int) -> Shaped[Array, "rows columns block block"]:
    rows, columns = dense.shape
    return dense.reshape(rows // block, block, columns // block, block).swapaxes(1, 2)
