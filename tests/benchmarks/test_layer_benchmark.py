import json
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layer, memory, sonicmoe_layer
from benchmarks.jax_layers import CompiledLayer, JaxLayer, jmoe_layer, kept_bytes, lax_layer, plain_layer
from benchmarks.layers import (
    CONFIGURATIONS,
    EXPERT_SWEEP,
    RESULTS,
    Configuration,
    default_names,
    draw_logits,
    group_sizes,
    inclusion,
    judge,
    measure,
    sample_tokens,
    summarize_layer,
)
from benchmarks.record import chosen, make_parser
from benchmarks.timing import Variant

SMALL = Configuration("small", T=600, D=16, F=8, E=6, K=2)


def _compile(function, configuration=SMALL):
    with ThreadPoolExecutor(1) as pool:
        return CompiledLayer(configuration, function, pool)


class _Layer:
    """A layer that computes nothing."""

    def __init__(self, errors=None, plain_errors=None, run=lambda: None):
        self._errors, self._plain_errors, self._run = errors or {"y": 1e-3}, plain_errors, run

    def route(self, logits):
        assert logits.shape == (SMALL.T, SMALL.E)

    def check(self):
        return self._errors, self._plain_errors

    def facts(self):
        return {"kept_mib": 1.0}

    def variants(self):
        return dict.fromkeys(("forward", "both", "dense"), Variant(self._run, lambda _: None))


def _measure(layer):
    return measure(layer, SMALL, "random", implementation="jmoe", rounds=2, seed=0)


def test_the_program_measures_layers_and_continues_its_file(run_program, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    arguments = ["--only", "tiny", "--rounds", "2", "--out", str(file)]
    printed = run_program("layer", *arguments, "--routing", "random,zipf")
    assert "says nothing of a GPU's speed" in printed
    content = json.loads(file.read_text())
    assert content["hardware"]["platform"] == "cpu"
    assert "Then 2 rounds" in content["method"]
    flops = 6 * 256 * 2 * 64 * 64
    for record, routing in zip(content["records"], ("random", "zipf"), strict=True):
        assert (record["configuration"], record["routing"], record["implementation"]) == ("tiny", routing, "jmoe")
        assert record["relative_error"].keys() == record["plain_relative_error"].keys() == set(RESULTS)
        assert all(0 < error < 6e-3 for error in record["relative_error"].values())
        assert record["forward"]["tflops"] == pytest.approx(flops / record["forward"]["ms_median"] / 1e9)
        assert record["both"]["tflops"] == pytest.approx(3 * flops / record["both"]["ms_median"] / 1e9)
        assert record["both"]["ratio"] == pytest.approx(record["both"]["tflops"] / record["dense"]["tflops"])
        # The pre-activations, and integers and what the router keeps.
        assert 2 * 512 * 128 <= record["kept_mib"] * 2**20 < 2 * 2 * 512 * 128
        assert record["backend"] == "xla"
        assert record["copy_gb_per_s"] > 0

    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")  # the program changes it
    monkeypatch.setattr(layer, "new_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(layer, "measure", lambda *_, **__: pytest.fail("this was to be skipped"))
    resume = [*arguments, "--resume", "--peers", "sonicmoe"]
    assert layer.main(resume) == 0
    *records, peer = json.loads(file.read_text())["records"]
    assert records == content["records"]
    assert peer["implementation"] == "sonicmoe"
    assert "importable" in peer["failure"]
    assert layer.main(resume) == 0
    assert json.loads(file.read_text())["records"] == [*records, peer]
    assert "1 of 1 in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "olmo"], "there is no 'olmo'"),
        (["--routing", "random,even"], "there is no 'even'"),
        (["--peers", "tutel"], "there is no 'tutel'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_arguments_that_are_not_known_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        layer.main(arguments)
    assert message in capsys.readouterr().err


def test_configurations_that_fail_are_recorded_and_the_next_is_measured(tmp_path, monkeypatch):
    class Dying(ThreadPoolExecutor):
        def submit(self, function, *arguments, **options):
            if function is layer.measure_configuration and "tiny" in arguments:
                raise BrokenProcessPool
            return super().submit(function, *arguments, **options)

    def prepare(implementation, name, platform):
        if name == "dMoE-XS":
            raise ValueError("F must be a multiple of 64")

    def measure_none(implementation, name, routings, *_, **__):
        return [{"configuration": name, "implementation": implementation, "routing": routing} for routing in routings]

    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")  # the program changes it
    monkeypatch.setattr(layer, "new_process", lambda: Dying(1))
    monkeypatch.setattr(layer, "prepare", prepare)
    monkeypatch.setattr(layer, "measure_configuration", measure_none)
    monkeypatch.setattr(layer, "show", lambda *_: None)
    file = tmp_path / "results.json"
    assert layer.main(["--only", "tiny,dMoE-XS,tiny-gelu", "--jobs", "2", "--out", str(file)]) == 1
    dead, refused, fine = json.loads(file.read_text())["records"]
    assert (dead["configuration"], dead["failure"]) == ("tiny", "its process died")
    assert (refused["configuration"], refused["failure"]) == ("dMoE-XS", "ValueError: F must be a multiple of 64")
    assert fine["configuration"] == "tiny-gelu"
    assert "failure" not in fine


def test_a_layer_that_is_wrong_is_recorded_and_not_timed():
    calls = []
    record = _measure(_Layer({"y": 3e-3, "x": 7e-3}, {"y": 3e-3, "x": 5e-3}, lambda: calls.append(0)))
    assert record["failure"] == "ArithmeticError: relative error 0.007 of x, more than 0.0065"
    assert record["relative_error"] == {"y": 3e-3, "x": 7e-3}
    assert not calls
    assert "ms_median" not in record
    record = _measure(_Layer({"y": float("nan")}))
    assert "relative error nan" in record["failure"]
    assert record["relative_error"] == {"y": None}
    judge({"y": 0.01}, None)
    with pytest.raises(ArithmeticError, match=r"more than 0\.02"):
        judge({"y": 0.03}, None)


def test_a_layer_that_fails_while_it_is_timed_is_recorded():
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access")

    assert "illegal memory access" in _measure(_Layer(run=fail))["failure"]


def test_the_backward_takes_what_both_take_beyond_the_forward():
    seconds = {"forward": [1e-3, 2e-3, 3e-3], "both": [4e-3, 6e-3, 8e-3], "dense": [1e-3] * 3}
    summary = summarize_layer(seconds, SMALL)
    assert summary["backward"]["ms_median"] == pytest.approx(4)
    assert (summary["backward"]["ms_min"], summary["backward"]["ms_max"]) == (pytest.approx(3), pytest.approx(5))
    up = 2 * 1200 * 16 * 16
    assert summary["dense"]["tflops"] == pytest.approx(up / 1e-3 / 1e12)
    assert summary["both"]["tflops"] == pytest.approx(3 * 1.5 * up / 6e-3 / 1e12)
    assert summary["both"]["ratio"] == pytest.approx(3 * 1.5 / 6)
    assert "copy_gb_per_s" not in summary
    summary = summarize_layer(seconds | {"copy": [1e-6, 2e-6, 9e-6]}, SMALL)
    assert summary["copy_gb_per_s"] == pytest.approx(2 * (2 * 6 * 16 * 16) / 2e-6 / 1e9)


def test_operations_are_counted_as_the_papers_count_them():
    olmoe, dmoe = CONFIGURATIONS["olmoe"], CONFIGURATIONS["dMoE-XS"]
    assert olmoe.flops("forward") == 6 * 32_768 * 8 * 2048 * 1024
    assert olmoe.flops("backward") == 2 * olmoe.flops("forward")
    assert dmoe.flops("both") == 3 * 4 * 65_536 * 512 * 2048
    assert olmoe.up_flops == 2 * olmoe.num_rows * 2048 * 2048


def test_the_sweep_of_experts_changes_nothing_else_and_is_measured_on_demand_only():
    assert [sweep.E for sweep in EXPERT_SWEEP.values()] == [8, 16, 32, 64, 128, 256, 512]
    assert {sweep.flops("both") for sweep in EXPERT_SWEEP.values()} == {CONFIGURATIONS["olmoe"].flops("both")}
    assert EXPERT_SWEEP["E64"].weight_bytes == 64 * 3 * 2048 * 1024 * 2
    for platform in ("gpu", "cpu"):
        assert not EXPERT_SWEEP.keys() & set(default_names(platform))
    parser = make_parser("layer", None)
    assert chosen(parser, "--only", "E*", CONFIGURATIONS) == list(EXPERT_SWEEP)
    assert chosen(parser, "--only", "tiny,E?,t*y", CONFIGURATIONS) == ["tiny", "E8"]
    with pytest.raises(SystemExit, match="2"):
        chosen(parser, "--only", "tiny,F*", CONFIGURATIONS)


@pytest.mark.parametrize(
    "configuration", [SMALL, Configuration("", 500, 8, 8, 16, 5), Configuration("", 640, 8, 8, 4, 4)]
)
def test_routings_spread_the_assignments_as_they_are_named(configuration):
    T, E, K = configuration.T, configuration.E, configuration.K
    for routing in ("random", "balanced", "zipf"):
        logits = draw_logits(configuration, routing, seed=1)
        assert logits.dtype == np.float32
        assert np.array_equal(logits, draw_logits(configuration, routing, seed=1))
        sizes = group_sizes(configuration, logits)
        assert sizes.sum() == T * K
        assert sizes.max() <= T
        if routing == "balanced":
            assert np.abs(sizes - T * K / E).max() <= (K if T % E else 0)
        if routing == "zipf":
            expected = T * inclusion(1 / np.arange(1, E + 1), K)
            assert np.allclose(np.sort(sizes)[::-1], expected, atol=5 * np.sqrt(T) / 2)


def test_experts_are_chosen_in_proportion_to_their_popularity_but_once():
    assert inclusion(np.array([1, 8, 2, 1.0]), 2) == pytest.approx([0.25, 1, 0.5, 0.25])
    assert inclusion(np.array([8, 4, 2, 1.0]), 4) == pytest.approx([1, 1, 1, 1])
    assert inclusion(np.array([2, 1, 1.0]), 1) == pytest.approx([0.5, 0.25, 0.25])


def test_the_sample_has_the_first_and_the_last_token_and_each_once():
    for configuration in (SMALL, CONFIGURATIONS["tiny"], CONFIGURATIONS["olmoe"]):
        tokens = sample_tokens(configuration)
        assert (tokens[0], tokens[-1]) == (0, configuration.T - 1)
        assert len(set(tokens.tolist())) == len(tokens) == min(512, configuration.T)


def test_the_plain_layer_is_the_layer(relative_error):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (SMALL.T, 16), (6, 16, 16), (6, 8, 16), (SMALL.T, 6)
    operands = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    both = [jax.vjp(make(SMALL), *operands) for make in (jmoe_layer, plain_layer, lax_layer)]
    (y, gradients), *others = [(y, jax.jit(pull_back)(jnp.ones_like(y))) for y, pull_back in both]
    for other_y, other_gradients in others:
        assert relative_error(other_y, y) < 1e-5
        assert all(relative_error(*pair) < 1e-5 for pair in zip(other_gradients, gradients, strict=True))


def test_the_check_sees_a_wrong_gradient_and_a_gradient_of_a_token_that_has_none():
    right = jmoe_layer(SMALL)

    def wrong(x, w_up, w_down, logits):
        y = right(x, w_up, w_down, jax.lax.stop_gradient(logits))
        # Zero, but each token's gradient reaches the token after it.
        return y + jnp.roll(x, 1, axis=0) - jax.lax.stop_gradient(jnp.roll(x, 1, axis=0))

    layer = JaxLayer(_compile(wrong), seed=0)
    layer.route(draw_logits(SMALL, "random", 0))
    errors, plain_errors = layer.check()
    assert plain_errors is not None
    assert all(error < 6e-3 for error in plain_errors.values())
    assert errors["logits"] == 1
    assert errors["x"] > 0.5
    assert all(errors[name] < 6e-3 for name in ("y", "y_with_backward", "w_up", "w_down"))


def test_what_is_kept_does_not_count_the_operands():
    shape = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    assert kept_bytes(lambda x, w, *_: x * w, [shape] * 4) == 0
    assert kept_bytes(lambda x, w, *_: jnp.sin(x) * w, [shape] * 4) == 2 * 2 * 4 * 8  # sin(x) and cos(x)


def test_memory_is_recorded_without_running_anything(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    arguments = ["--only", "tiny", "--jobs", "1", "--out", str(file)]
    monkeypatch.setattr(memory, "new_process", lambda: ThreadPoolExecutor(1))
    assert memory.main(arguments) == 0
    [record] = json.loads(file.read_text())["records"]
    assert record["kept_mib"] * 2**20 > 2 * 512 * 128
    assert record["peak_mib"] > record["kept_mib"]
    # y and the gradients of x, the weights and the logits.
    results = 2 * 256 * 64 * 2 + 8 * 64 * 192 * 2 + 256 * 8 * 4
    assert results <= record["output_mib"] * 2**20 < results + 1000
    assert "tiny" in capsys.readouterr().out
    monkeypatch.setattr(memory, "CompiledLayer", lambda *_, **__: pytest.fail("this was to be skipped"))
    assert memory.main([*arguments, "--resume"]) == 0
    assert json.loads(file.read_text())["records"] == [record]


@pytest.mark.parametrize("implementation", ["torch_grouped_mm", "scattermoe", "sonicmoe"])
def test_layers_on_pytorch_are_right(implementation):
    platform = jax.default_backend()
    if implementation != "torch_grouped_mm" and platform != "gpu":
        pytest.skip("its kernels are for GPUs")
    if reason := layer.why_not(implementation, platform):
        pytest.skip(reason)
    for name in ("tiny", "tiny-gelu")[: 1 if implementation == "sonicmoe" else 2]:
        layer.prepare(implementation, name, platform)
        [record] = layer.measure_configuration(implementation, name, ["zipf"], rounds=1, seed=0)
        assert "failure" not in record
        assert record["relative_error"].keys() == set(RESULTS)
        assert all(error < 1e-2 for error in record["relative_error"].values())


@pytest.fixture
def invented_peers(tmp_path, monkeypatch):
    """Packages that look like ScatterMoE's and SonicMoE's from outside."""
    files = {
        "fms_acceleration_moe/__init__.py": "import a_framework_for_fine_tuning",
        "fms_acceleration_moe/utils/scattermoe_utils/khd/kernels/ops/__init__.py": "",
        "fms_acceleration_moe-1.0.dist-info/METADATA": "Name: fms-acceleration-moe\nVersion: 1.0",
        "sonicmoe/functional/__init__.py": "from . import backward, forward",
        "sonicmoe/functional/forward.py": "def gemm(tuned=True):\n    return tuned\ngemm_gated = gemm",
        "sonicmoe/functional/backward.py": "def gemm(tuned=True):\n    return tuned\ngemm_dgated = gemm",
        "sonic_moe-2.0.dist-info/METADATA": "Name: sonic-moe\nVersion: 2.0",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    there = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(layer, "load_torch", lambda platform: "torch")
    yield
    for name in [name for name in sys.modules if name not in there]:
        del sys.modules[name]


@pytest.mark.parametrize(("implementation", "version"), [("scattermoe", "1.0"), ("sonicmoe", "2.0")])
def test_peers_on_pytorch_are_chosen_by_name(implementation, version, invented_peers, monkeypatch):
    def measured(made, configuration, routing, *, implementation, **_):
        torch, of, function, seed = made
        assert (torch, of, configuration, seed) == ("torch", SMALL, SMALL, 3)
        assert function.layer.__module__ == f"benchmarks.{implementation}_layer"
        return {"routing": routing}

    monkeypatch.setitem(CONFIGURATIONS, "small", SMALL)
    monkeypatch.setattr(layer, "TorchLayer", lambda *arguments: arguments)
    monkeypatch.setattr(layer, "measure", measured)
    assert layer.why_not(implementation, "gpu") is None
    layer.prepare(implementation, "small", "gpu")
    records = layer.measure_configuration(implementation, "small", ["random", "zipf"], rounds=1, seed=3)
    assert records == [{"routing": routing, "peer_version": version} for routing in ("random", "zipf")]


@pytest.mark.parametrize("implementation", ["scattermoe", "sonicmoe"])
def test_peers_that_are_not_there_are_named(implementation, monkeypatch):
    monkeypatch.setattr(layer, "load_torch", lambda platform: "torch")
    for package in ("fms_acceleration_moe", "sonicmoe"):
        monkeypatch.setitem(sys.modules, package, None)
    reason = layer.why_not(implementation, "gpu")
    assert reason is not None
    assert reason.startswith("not importable: ModuleNotFoundError")
    assert {"scattermoe": "fms_acceleration_moe", "sonicmoe": "sonicmoe"}[implementation] in reason


def test_sonicmoe_is_not_tuned_and_says_that_it_has_no_plain_mlps(invented_peers):
    functional = sonicmoe_layer.load_sonicmoe()
    for run in (functional.forward.gemm_gated, functional.backward.gemm_dgated, functional.backward.gemm):
        assert run() is False
    with pytest.raises(NotImplementedError, match="not supported by SonicMoE, whose MLPs are gated: gelu"):
        layer.prepare("sonicmoe", "tiny-gelu", "gpu")


def test_weights_are_arranged_for_sonicmoe_and_back():
    E, D, F = 3, 4, 5
    w_up = np.arange(E * D * 2 * F).reshape(E, D, 2 * F)
    w_down = np.arange(E * F * D).reshape(E, F, D)
    up, down = sonicmoe_layer.arrange(w_up, w_down)
    for i in range(F):
        assert np.array_equal(up[:, 2 * i], w_up[:, :, i])
        assert np.array_equal(up[:, 2 * i + 1], w_up[:, :, F + i])
    assert np.array_equal(down, w_down.transpose(0, 2, 1))
    for restored, weights in zip(sonicmoe_layer.restore(up, down), (w_up, w_down), strict=True):
        assert np.array_equal(restored, weights)
