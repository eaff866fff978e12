"""Measured configurations: the tables, their look-up, and the program that makes them, without its GPU."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, tune, tuning
from pallas_kernels.grouped_matmul.mosaic_gpu import Config

TASK = tune.Task("grouped_matmul", 4096, 512, 768, 8)


@pytest.fixture
def user_table(tmp_path, monkeypatch):
    """Makes a file the user's table; `user_table(entries)` writes entries to it."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(path))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "packaged")

    def write(entries, to=path):
        tuning.write_entries(to, entries)
        return to

    yield write
    tuning.read_table.cache_clear()


def entry(task, **config):
    return {"problem": dataclasses.asdict(task.problem), "config": config}


def test_without_a_table_the_rule_decides(user_table, h100):
    with h100():
        assert tuning.choose_config(TASK.problem, Config(num_stages=3)) == Config(num_stages=3)


def test_a_measured_configuration_replaces_what_it_names_of_the_rule(user_table, h100):
    with h100():
        user_table([entry(TASK, block_n=128, band_rows=16)])
        assert tuning.choose_config(TASK.problem, Config(num_stages=3)) == Config(
            block_n=128, num_stages=3, band_rows=16
        )


@pytest.mark.parametrize(
    ("rows", "groups", "columns", "block_n"),
    [
        (8, 64, 2048, 128),  # 64 tiles of 256 columns leave half of the multiprocessors idle
        (4096, 64, 2048, 256),
        (2, 8, 28672, 64),  # 224 tiles take two turns, and so leave a seventh idle
        (2, 8, 4096, 64),
        (32, 8, 4096, 256),
        (262144, 64, 2048, 256),
        (262144, 64, 64, 128),
    ],
)
def test_where_groups_have_few_rows_tiles_are_as_wide_as_all_multiprocessors_read(rows, groups, columns, block_n, h100):
    with h100():
        rule = Config.for_shape(rows, groups, columns)
        assert rule.block_n == block_n
        assert rule.fits("bfloat16")


@pytest.mark.parametrize(
    "change",
    [{"kernel": "grouped_matmul_transposed"}, {"m": 2048}, {"k": 576}, {"num_groups": 9}, {"dtype": "float16"}],
)
def test_a_configuration_serves_no_other_problem(change, user_table, h100):
    with h100():
        user_table([entry(TASK, block_n=128)])
        assert tuning.choose_config(dataclasses.replace(TASK, **change).problem, Config()) == Config()


@pytest.mark.parametrize(("m", "bucket"), [(8, 1), (7, 1), (4096, 512), (8191, 512), (8192, 1024)])
def test_rows_of_a_group_are_looked_up_by_powers_of_two(m, bucket, h100):
    with h100():
        assert dataclasses.replace(TASK, m=m).problem.rows_per_group == bucket


def test_the_packaged_table_comes_before_the_users(user_table, tmp_path, h100):
    with h100():
        user_table([entry(TASK, num_stages=2)])
        user_table([entry(TASK, num_stages=3)], to=tmp_path / "packaged" / "h100.json")
        assert tuning.choose_config(TASK.problem, Config()).num_stages == 3


def test_kernels_lower_with_the_configuration_of_the_table(user_table, h100, lower_for_cuda):
    arrays = ((4096, 512), jnp.bfloat16), ((8, 512, 768), jnp.bfloat16), ((8,), jnp.int32)
    by_rule = lower_for_cuda(grouped_matmul, *arrays)
    with h100():
        user_table([entry(TASK, block_n=128, num_stages=3)])
    assert lower_for_cuda(lambda *arrays: grouped_matmul(*arrays), *arrays) != by_rule


@pytest.mark.parametrize("content", ["{", "[]", '{"entries": [{}]}', '{"entries": [{"problem": {}, "config": {}}]}'])
def test_a_file_that_is_no_table_is_an_error_that_names_it(content, user_table, h100):
    path = user_table([])
    path.write_text(content)
    with h100(), pytest.raises(ValueError, match=r"tuning\.json is no table of configurations .* remove it"):
        tuning.choose_config(TASK.problem, Config())


@pytest.mark.parametrize("home", ["/dev/null", "/nonexistent"])
def test_where_the_user_has_no_home_the_rule_decides(home, monkeypatch, h100):
    for variable in (tuning.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", home)
    with h100():
        assert tuning.choose_config(dataclasses.replace(TASK, k=64).problem, Config()) == Config()


def test_a_field_that_a_configuration_lacks_is_an_error_that_names_it(user_table, h100):
    with h100():
        user_table([entry(TASK, block_q=1)])
        with pytest.raises(ValueError, match=r"tuning\.json has a configuration for grouped_matmul .* 'block_q'"):
            tuning.choose_config(TASK.problem, Config())


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_what_fits_by_the_formula_lowers_and_what_does_not_fit_does_not(kernel, lower_for_cuda):
    task = dataclasses.replace(TASK, kernel=kernel)
    arrays = [(shape, jnp.bfloat16) for shape in task.operand_shapes] + [((8,), jnp.int32), ((4096,), jnp.int32)]
    largest = [dataclasses.replace(task.rule, block_n=block_n, num_stages=n) for block_n, n in ((256, 4), (128, 6))]
    for config in largest:
        assert config.fits("bfloat16")
        assert "mosaic_gpu" in lower_for_cuda(lambda *arrays, config=config: task.run(config, *arrays), *arrays)
        larger = dataclasses.replace(config, num_stages=config.num_stages + 1)
        assert not larger.fits("bfloat16")
        with pytest.raises(ValueError, match=r"(?i)shared memory|smem"):
            lower_for_cuda(lambda *arrays, larger=larger: task.run(larger, *arrays), *arrays)


def test_candidates_begin_with_the_rule_and_are_all_different():
    candidates = list(TASK.candidates())
    assert candidates[0] == TASK.rule
    assert len(set(candidates)) == len(candidates) > 5
    assert {config.block_n for config in candidates} == {64, 128, 256}
    assert all(config.fits("bfloat16") for config in candidates)


@pytest.mark.parametrize(("m", "num_groups"), [(4096, 8), (7, 16), (100000, 3)])
def test_group_sizes_sum_to_the_rows(m, num_groups):
    balanced, zipf = (tune.group_sizes(name, m, num_groups) for name in tune.DISTRIBUTIONS)
    for sizes in (balanced, zipf):
        assert sizes.shape == (num_groups,)
        assert sizes.sum() == m
        assert sizes.min() >= 0
    assert np.ptp(balanced) <= 1
    np.testing.assert_allclose(zipf.max(), m / np.sum(1 / np.arange(1, num_groups + 1)), atol=1)


def test_the_configuration_that_is_best_over_both_distributions_is_kept(h100):
    fast = dataclasses.replace(TASK.rule, num_stages=3)
    lopsided = dataclasses.replace(TASK.rule, band_rows=4)

    def measure(task, configs):
        assert {fast, lopsided, task.rule} <= set(configs)
        return {
            task.rule: {"balanced": 1.0, "zipf": 2.0},
            fast: {"balanced": 0.9, "zipf": 1.8},
            lopsided: {"balanced": 0.7, "zipf": 2.9},
        }

    with h100():
        found = tune.tune(TASK, measure)
        assert found is not None
        assert found["problem"] == dataclasses.asdict(TASK.problem)
        assert found["config"] == dataclasses.asdict(fast)
        assert (found["ms"]["zipf"], found["ms_of_rule"]["zipf"]) == (1.8, 2.0)
        assert tune.tune(TASK, lambda *_: {}) is None


@pytest.mark.parametrize(("share", "kept"), [(0.995, False), (0.98, True)])
def test_what_is_won_by_less_than_noise_is_left_to_the_rule(share, kept, h100):
    other = dataclasses.replace(TASK.rule, band_rows=4)

    def measure(task, configs):
        return {config: {"balanced": 1.0, "zipf": share**2 if config == other else 1.0} for config in configs}

    with h100():
        found = tune.tune(TASK, measure)
        assert found is not None
        assert found["config"] == dataclasses.asdict(other if kept else TASK.rule)


def test_every_candidate_that_lowers_and_runs_is_timed_with_both_distributions(monkeypatch):
    small = dataclasses.replace(TASK, m=256, k=64, n=64, num_groups=2)
    unfit = dataclasses.replace(small.rule, num_stages=3)

    def run(task, config, first, second, group_sizes, index):
        if config == unfit:
            raise ValueError("does not lower")
        return first @ second[0] + group_sizes.sum() + index[0]

    monkeypatch.setattr(tune.Task, "run", run)
    other = dataclasses.replace(small.rule, band_rows=4)
    times = tune.measure(small, [small.rule, unfit, other], rounds=1)
    assert times.keys() == {small.rule, other}
    assert all(set(ms) == {"balanced", "zipf"} and min(ms.values()) > 0 for ms in times.values())


def test_the_program_replaces_what_it_measures_anew_and_keeps_the_rest(user_table, h100, monkeypatch, capsys):
    other = dataclasses.replace(TASK, k=64)
    milliseconds = {"balanced": 1.0, "zipf": 1.0}
    monkeypatch.setattr(tune, "measure", lambda task, configs, *, rounds: {task.rule: milliseconds})
    with h100():
        path = user_table([entry(TASK, num_stages=2), entry(other, num_stages=3)])
        assert tune.main(["--shape", "4096,512,768,8", "--kernel", "grouped_matmul", "--jobs", "1"]) == 0
        assert tuning.choose_config(TASK.problem, Config(num_stages=7)) == TASK.rule
        assert tuning.choose_config(other.problem, Config()).num_stages == 3
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert str(path) in capsys.readouterr().out


def test_a_table_that_cannot_be_written_is_known_before_anything_is_measured(user_table, h100, monkeypatch, capsys):
    monkeypatch.setattr(tune, "measure", lambda *_, **__: pytest.fail("measured"))
    with h100():
        assert tune.main(["--shape", "128,64,64,1", "--out", "/dev/null/tuning.json"]) == 2
    assert "/dev/null" in capsys.readouterr().err


def test_without_a_hopper_gpu_the_program_says_so(monkeypatch, capsys):
    monkeypatch.setattr(tune, "has_hopper_gpu", lambda: False)
    assert tune.main(["--shape", "128,64,64,1"]) == 2
    assert "no Hopper GPU" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["1,2,3", "128,65,64,1", "a,b,c,d", "0,64,64,1"])
def test_a_shape_that_is_none_is_refused(shape, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--shape", shape])
    assert f"'{shape}' is not M,K,N,G" in capsys.readouterr().err


@pytest.mark.parametrize("layer", ["1,64,64,8", "512,96,64,8,2", "512,64,64,8,0"])
def test_a_layer_that_is_none_is_refused(layer, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--layer", layer])
    assert f"'{layer}' is not T,D,F,E,K" in capsys.readouterr().err


def test_nothing_to_tune_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "--layer T,D,F,E,K or --shape M,K,N,G" in capsys.readouterr().err
