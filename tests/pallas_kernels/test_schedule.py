"""The block schedule against a plain Python construction."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import make_block_schedule
from pallas_kernels.schedule import make_tile_schedule

# (groups, rows, options): few, since each is compiled once; the sizes are data.
TABLES = [
    (1, 0, {"block_rows": 4}),
    (3, 0, {"block_rows": 4, "cover_remainder": True}),
    (1, 7, {"block_rows": 16}),
    (5, 40, {"block_rows": 1}),
    (4, 33, {"block_rows": 8}),
    (4, 33, {"block_rows": 8, "cover_remainder": True}),
    (6, 100, {"block_rows": 16, "alignment": 8}),
    (6, 101, {"block_rows": 24, "alignment": 8, "cover_remainder": True}),
    (16, 64, {"block_rows": 8, "alignment": 8, "cover_remainder": True}),
]


@functools.cache
def compiled(num_rows, make=make_block_schedule, **options):
    return jax.jit(functools.partial(make, num_rows=num_rows, **options))


def plain_schedule(sizes, num_rows, block_rows, alignment=1, cover_remainder=False):
    """The blocks with rows as (group, start, size), one after the other."""
    groups, row = [], 0
    for size in sizes:
        end = min(row + max(size, 0), num_rows)
        groups.append((row, end))
        row = end
    if cover_remainder:
        groups.append((row, num_rows))
    blocks = []
    for group, (row, end) in enumerate(groups):
        while row < end:
            block_end = min(row - row % alignment + block_rows, end)
            blocks.append((group, row, block_end - row))
            row = block_end
    return blocks


def blocks_of(schedule):
    return list(zip(schedule.group.tolist(), schedule.start.tolist(), schedule.size.tolist(), strict=True))


@st.composite
def problems(draw):
    num_groups, num_rows, options = draw(st.sampled_from(TABLES))
    average = num_rows // num_groups
    size = draw(
        st.sampled_from(
            [
                st.integers(0, max(1, average)),  # sum below the rows, mostly
                st.integers(0, 2 * average + 1),  # sum about the rows
                st.integers(-3, num_rows + 3),  # negative ones, and a sum far above the rows
                st.sampled_from([0, 0, 0, num_rows]),  # one group with everything
                st.sampled_from([0, 1, 2**31 - 1, -(2**31)]),
            ]
        )
    )
    return draw(st.lists(size, min_size=num_groups, max_size=num_groups)), num_rows, options


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(problems())
@example(([0, 0, 33, 0], 33, {"block_rows": 8}))
@example(([1, 1, 1, 30], 33, {"block_rows": 8, "cover_remainder": True}))
@example(([17, 17, 17, 17, 17, 16], 101, {"block_rows": 24, "alignment": 8, "cover_remainder": True}))
@example(([0] * 16, 64, {"block_rows": 8, "alignment": 8, "cover_remainder": True}))
def test_blocks_are_those_of_a_plain_construction_and_the_rest_is_padding(problem):
    sizes, num_rows, options = problem
    schedule = compiled(num_rows, **options)(jnp.array(sizes, jnp.int32))
    expected = plain_schedule(sizes, num_rows, **options)
    used = len(expected)
    assert schedule.num_used == used
    slots = blocks_of(schedule)
    assert slots[:used] == expected
    assert all(size == 0 for _, _, size in slots[used:])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(problems())
def test_every_row_of_every_group_is_in_exactly_one_block_of_that_group(problem):
    sizes, num_rows, options = problem
    schedule = compiled(num_rows, **options)(jnp.array(sizes, jnp.int32))
    ends = np.minimum(np.cumsum(np.maximum(np.array(sizes, np.int64), 0)), num_rows)
    remainder = len(sizes) if options.get("cover_remainder") else -1
    owner = np.full(num_rows, -1)
    for group, start, size in blocks_of(schedule):
        rows = slice(start, start + size)
        assert np.all(owner[rows] == -1), "two blocks hold one row"
        owner[rows] = group
    group_of_row = np.searchsorted(ends, np.arange(num_rows), side="right")
    np.testing.assert_array_equal(owner, np.where(group_of_row == len(sizes), remainder, group_of_row))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(problems())
def test_aligned_windows_of_block_rows_rows_contain_the_blocks(problem):
    sizes, num_rows, options = problem
    schedule = compiled(num_rows, **options)(jnp.array(sizes, jnp.int32))
    alignment, previous = options.get("alignment", 1), None
    for group, start, size in blocks_of(schedule):
        window = start // alignment * alignment
        assert start + size <= window + options["block_rows"]
        if size and group == previous:
            assert start == window
        previous = group


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(problems())
def test_tiles_are_the_blocks_times_the_columns_in_bands_of_each_group(problem):
    sizes, num_rows, options = problem
    column_blocks, band_rows = 2, 3
    blocks = plain_schedule(sizes, num_rows, **options)
    expected, last_block = [], []
    for group in range(len(sizes) + bool(options.get("cover_remainder"))):
        of_group = [block for block in blocks if block[0] == group]
        num_bands = max(1, math.floor(len(of_group) / band_rows + 0.5))
        height = max(1, math.ceil(len(of_group) / num_bands))
        for first in range(0, len(of_group), height):
            band = of_group[first : first + height]
            expected += [(*block, column) for column in range(column_blocks) for block in band]
        last_block.append(len(expected) // column_blocks)

    make = compiled(num_rows, make_tile_schedule, column_blocks=column_blocks, band_rows=band_rows, **options)
    schedule = make(jnp.array(sizes, jnp.int32))
    tiles = [
        (*block, column) for block, column in zip(blocks_of(schedule), schedule.column_block.tolist(), strict=True)
    ]
    assert tiles[: len(expected)] == expected
    assert schedule.last_block.tolist() == last_block
    assert not schedule.size[len(expected) :].any()


@pytest.mark.parametrize("num_groups", [1, 2, 7, 64])
@pytest.mark.parametrize("num_rows", [0, 1, 64, 65, 1000])
def test_the_number_of_slots_is_the_static_bound(num_groups, num_rows):
    def num_slots(**options):
        def starts(sizes):
            return make_block_schedule(sizes, num_rows=num_rows, block_rows=64, **options).start

        return jax.eval_shape(starts, jax.ShapeDtypeStruct((num_groups,), jnp.int32)).size

    assert num_slots() == -(-num_rows // 64) + num_groups - 1
    assert num_slots(cover_remainder=True) == num_slots() + 1


@pytest.mark.parametrize(("num_groups", "num_rows", "options"), TABLES)
def test_groups_that_waste_the_most_rows_of_blocks_fit_into_the_slots(num_groups, num_rows, options):
    for sizes in (
        [1] * num_groups,
        [1] * (num_groups - 1) + [num_rows],
        [options["block_rows"] + 1] * num_groups,
    ):
        schedule = compiled(num_rows, **options)(jnp.array(sizes, jnp.int32))
        covered = num_rows if options.get("cover_remainder") else min(sum(sizes), num_rows)
        assert schedule.size.sum() == covered, sizes


def test_a_batch_of_schedules_is_made_by_vmap():
    sizes = jnp.array([[3, 0, 5], [1, 6, 1]], jnp.int32)
    batch = jax.vmap(functools.partial(make_block_schedule, num_rows=8, block_rows=4))(sizes)
    for i in range(2):
        single = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        assert blocks_of(single)[: int(single.num_used)] == plain_schedule(sizes[i].tolist(), 8, 4)


def test_the_schedule_is_a_pytree_of_int32_arrays_whatever_the_integers_of_the_sizes():
    for dtype in (jnp.int32, jnp.uint32, jnp.int8, jnp.uint8, jnp.int16):
        sizes = jnp.array([100, 0, 27], dtype)  # 300 rows do not fit into eight bits
        schedule = compiled(300, block_rows=4, cover_remainder=True)(sizes)
        assert {leaf.dtype for leaf in jax.tree.leaves(schedule)} == {jnp.dtype(jnp.int32)}
        expected = plain_schedule([100, 0, 27], 300, 4, cover_remainder=True)
        assert blocks_of(schedule)[: len(expected)] == expected, dtype


def test_sizes_whose_sum_overflows_32_bits_are_clipped_like_any_others():
    sizes = jnp.full((1024,), 2**31 - 1, jnp.int32)
    schedule = compiled(2**22, block_rows=2**16)(sizes)
    assert schedule.num_used == 64
    assert schedule.group[:64].tolist() == [0] * 64
    assert schedule.size.sum() == 2**22


def test_the_schedule_is_batched_by_vmap():
    sizes = jnp.array([[3, 0, 5], [0, 8, 0], [0, 0, 0]])

    @jax.jit
    def make(sizes):
        return jax.tree.leaves(make_block_schedule(sizes, num_rows=8, block_rows=4))

    batched = jax.vmap(make)(sizes)
    for i in range(3):
        for leaf, expected in zip(batched, make(sizes[i]), strict=True):
            np.testing.assert_array_equal(leaf[i], expected)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (jnp.zeros((2, 2), int), {}, r"group_sizes is int32\[2, 2\]; it must be a vector of integers"),
        (jnp.zeros(2), {}, r"group_sizes is float32\[2\]"),
        (jnp.zeros(0, int), {}, r"group_sizes is int32\[0\]"),
        (jnp.zeros(2, int), {"num_rows": 2**30 + 1}, "num_rows is 1073741825; it must be from 0 to"),
        (jnp.zeros(2, int), {"num_rows": -1}, "num_rows is -1; it must be from 0 to 2"),
        (jnp.zeros(2, int), {"block_rows": 0}, "block_rows is 0"),
        (
            jnp.zeros(2, int),
            {"block_rows": 12, "alignment": 8},
            "block_rows is 12; .* multiple of alignment, 8",
        ),
        (jnp.zeros(2, int), {"alignment": 0}, "alignment, 0"),
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        make_block_schedule(sizes, **{"num_rows": 8, "block_rows": 4} | options)
