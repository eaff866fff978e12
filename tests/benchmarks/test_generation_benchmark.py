import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from benchmarks import generation, report
from benchmarks.generation import ELSEWHERE, ON_GPU, measure, summarize_stack
from benchmarks.layers import CONFIGURATIONS, Configuration
from benchmarks.plots import plot_generation
from benchmarks.stacks import MAX_BYTES, Plain, Stack, draw_experts, draw_weights

SMALL = Configuration("small", T=3, D=16, F=8, E=6, K=2)


def _with_tokens(name, T):
    return dataclasses.replace(CONFIGURATIONS[name], T=T)


def _stack(T=3):
    configuration = dataclasses.replace(SMALL, T=T)
    weights = draw_weights(configuration, 4, seed=0)
    with ThreadPoolExecutor(1) as pool:
        experts = draw_experts(configuration, 0, seed=0)
        return Stack(configuration, weights, experts, pool, seed=0), Plain(configuration, weights[0], pool)


def test_the_program_measures_numbers_of_tokens_and_continues_its_file(run_program, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    arguments = ["--only", "tiny*", "--rounds", "2", "--out", str(file)]
    printed = run_program("generation", *arguments, "--tokens", "1,4")
    assert "says nothing of a GPU's speed" in printed
    content = json.loads(file.read_text())
    assert content["hardware"]["platform"] == "cpu"
    assert "Then 2 rounds" in content["method"]
    measured = [(record["configuration"], record["T"]) for record in content["records"]]
    assert measured == [("tiny", 1), ("tiny", 4), ("tiny-gelu", 1), ("tiny-gelu", 4)]
    for record in content["records"]:
        assert record["layers"] == 4
        of_expert = 2 * (3 * 64 * 64 if record["configuration"] == "tiny" else 2 * 64 * 128)
        assert record["bytes"] == pytest.approx(record["experts"] * of_expert)
        assert record["K"] <= record["experts"] <= record["K"] * record["T"]
        assert 0 < record["us_min"] <= record["us_median"] <= record["us_max"]
        assert record["gb_per_s"] == pytest.approx(record["bytes"] / record["us_median"] / 1e3)
        assert record["of_copy"] == pytest.approx(record["gb_per_s"] / record["copy_gb_per_s"])
        assert 0 < record["relative_error"]["y"] < 6e-3
        assert record["backend"] == "xla"
    # Numbers of tokens of a configuration share their rounds with one copy.
    assert content["records"][0]["copy_gb_per_s"] == content["records"][1]["copy_gb_per_s"]

    def measured_now(name, tokens, extent, *, rounds, seed):
        assert (name, tokens, extent, rounds, seed) == ("tiny", [2], ELSEWHERE, 2, 0)
        return [{"configuration": name, "T": 2, "failure": "ValueError: asks for much"}]

    monkeypatch.setattr(generation, "measure", measured_now)
    assert generation.main([*arguments, "--tokens", "1,4", "--resume"]) == 0
    assert json.loads(file.read_text()) == content
    assert "2 of 2 in" in capsys.readouterr().out
    assert generation.main(["--only", "tiny", *arguments[2:], "--tokens", "1,2,4", "--resume"]) == 1
    *records, failed = json.loads(file.read_text())["records"]
    assert records == content["records"]
    assert failed["T"] == 2
    assert "tiny, 2 tokens: ValueError: asks for much" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "olmo"], "there is no 'olmo'"),
        (["--tokens", "1,0"], "must be positive numbers, separated by commas, got '1,0'"),
        (["--tokens", "1,many"], "must be positive numbers"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_arguments_that_are_not_known_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        generation.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("T", ON_GPU.tokens)
@pytest.mark.parametrize("name", ON_GPU.names)
def test_as_many_layers_as_fill_more_than_any_cache_and_fit_the_device(name, T):
    configuration = _with_tokens(name, T)
    experts = draw_experts(configuration, ON_GPU.chosen_bytes, seed=0)
    of_expert = configuration.weight_bytes // configuration.E
    assert of_expert == {"olmoe": 12_582_912, "mixtral": 352_321_536}[name]
    chosen = [len(np.unique(of_layer)) * of_expert for of_layer in experts]
    assert len(experts) >= 4
    assert sum(chosen) >= ON_GPU.chosen_bytes
    assert len(experts) == 4 or sum(chosen[:-1]) < ON_GPU.chosen_bytes
    assert len(experts) * configuration.weight_bytes <= MAX_BYTES
    for of_layer in experts:
        assert of_layer.shape == (T, configuration.K)
        assert of_layer.min() >= 0
        assert of_layer.max() < configuration.E
        assert (np.diff(np.sort(of_layer, axis=1), axis=1) > 0).all()  # no token goes to an expert twice


def test_routings_are_random_and_those_of_the_seed():
    configuration = _with_tokens("olmoe", 512)
    experts, same, others = (draw_experts(configuration, 0, seed) for seed in (0, 0, 1))
    assert np.array_equal(experts, same)
    assert not np.array_equal(experts, others)
    assert all(not np.array_equal(experts[0], of_layer) for of_layer in experts[1:])
    share = np.bincount(np.ravel(experts), minlength=64) / (4 * 512)
    assert np.abs(share - 8 / 64).max() < 0.04


def test_layers_that_would_not_fit_are_refused():
    with pytest.raises(ValueError, match="more than 24 GB"):
        draw_experts(_with_tokens("E512", 1), 10**9, seed=0)
    [record] = measure("E512", [1], ON_GPU._replace(chosen_bytes=10**12), rounds=1, seed=0)
    assert record["failure"].startswith("ValueError: 3 layers have")


def test_each_layer_reads_the_output_of_the_one_before():
    configuration = dataclasses.replace(SMALL, T=3)
    weights = draw_weights(configuration, 4, seed=0)
    experts = draw_experts(configuration, 0, seed=0)
    with ThreadPoolExecutor(1) as pool:
        stack = Stack(configuration, weights, experts, pool, seed=0)
    assert len({np.asarray(w_up).tobytes() for w_up, _ in weights}) == 4
    first, last = stack.start()
    x = np.random.default_rng((0, 3)).standard_normal((3, 16), np.float32).astype(first.dtype)
    outputs = [jnp.asarray(x)]
    for (w_up, w_down), of_layer in zip(weights, experts, strict=True):
        routing = jmoe.Routing(jnp.asarray(of_layer), jnp.full((3, 2), 0.5))
        outputs.append(jmoe.moe_mlp(outputs[-1], w_up, w_down, routing))
    for actual, expected in ((first, outputs[1]), (last, outputs[-1])):
        assert np.allclose(np.float32(actual), np.float32(expected), rtol=0.05, atol=0.02 * float(abs(expected).max()))


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_outputs_are_about_as_large_as_inputs(name):
    configuration = Configuration("", T=16, D=128, F=256, E=4, K=2, activation=name)
    weights = draw_weights(configuration, 4, seed=1)
    with ThreadPoolExecutor(1) as pool:
        first, _ = Stack(configuration, weights, draw_experts(configuration, 0, seed=1), pool, seed=1).start()
    assert np.sqrt(np.mean(np.float32(first) ** 2)) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("T", [1, 3, 40])
def test_the_check_sees_a_wrong_output_of_any_of_few_tokens(T, monkeypatch):
    stack, plain = _stack(T=T)
    error, plain_error, rms = stack.check(plain)
    assert 0 < error <= 1.2 * plain_error + 5e-4 < 1e-2
    assert rms > 0
    right = jmoe.moe_mlp

    def wrong(x, *arguments, **options):
        return right(x, *arguments, **options).at[-1].multiply(1.5)

    monkeypatch.setattr(jmoe, "moe_mlp", wrong)
    stack, _ = _stack(T=T)
    assert stack.check(plain)[0] > 0.05


def test_what_is_wrong_or_fails_is_recorded_and_not_timed(monkeypatch):
    right = jmoe.moe_mlp

    def moe_mlp(x, *arguments, **options):
        if len(x) == 2:
            raise ValueError("two tokens are not supported")
        return right(x, *arguments, **options) * (1.1 if len(x) == 3 else 1)

    monkeypatch.setattr(jmoe, "moe_mlp", moe_mlp)
    fine, refused, wrong = measure("tiny", [1, 2, 3], ELSEWHERE, rounds=1, seed=0)
    assert fine["us_median"] > 0
    assert refused["failure"] == "ValueError: two tokens are not supported"
    assert wrong["failure"].startswith("ArithmeticError: relative error 0.1")
    assert "failure" not in fine
    assert "us_median" not in {**refused, **wrong}

    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(generation, "draw_weights", fail)
    assert [record["failure"] for record in measure("tiny", [1, 4], ELSEWHERE, rounds=1, seed=0)] == [
        "out of memory: RESOURCE_EXHAUSTED: no room"
    ] * 2


def test_the_speed_is_that_of_a_layer_beside_the_copy():
    summary = summarize_stack([8e-4, 4e-4, 10e-4], 4, 3e8, 2500)
    assert (summary["us_min"], summary["us_median"], summary["us_max"]) == pytest.approx((100, 200, 250))
    assert summary["spread"] == pytest.approx(0.75)
    assert summary["gb_per_s"] == pytest.approx(1500)
    assert summary["of_copy"] == pytest.approx(0.6)


def test_a_layer_is_lowered_once_however_many_there_are(monkeypatch):
    traced = []
    right = jmoe.moe_mlp

    def moe_mlp(x, *arguments, **options):
        traced.append(x.shape)
        return right(x, *arguments, **options)

    monkeypatch.setattr(jmoe, "moe_mlp", moe_mlp)
    _stack()
    assert traced == [(3, 16)]


def _record(configuration, T, of_copy, **more):
    return {
        "configuration": configuration,
        "T": T,
        "implementation": "jmoe",
        "commit": "0123abc",
        "layers": 4,
        "experts": 5.25,
        "bytes": 1.2e9,
        "us_median": 1234.56,
        "gb_per_s": 2500 * of_copy,
        "copy_gb_per_s": 2500.0,
        "of_copy": of_copy,
        **more,
    }


def test_the_report_shows_few_tokens_where_they_were_measured(tmp_path):
    failed = {"configuration": "olmoe", "T": 2, "implementation": "jmoe", "failure": "out of memory: asks for much"}
    records = [_record("mixtral", 1, 0.7), _record("olmoe", 16, 0.8), failed, _record("olmoe", 1, 0.62)]
    content = {
        "program": "python -m benchmarks.generation",
        "date": "2026-01-02T00:00:00+00:00",
        "hardware": {"device": "NVIDIA H100 80GB HBM3"},
        "versions": {"jax": "0.11.2"},
        "records": records,
    }
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    assert "few tokens" not in (docs / "performance.md").read_text()

    (results / "generation.json").write_text(json.dumps(content))
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    page = (docs / "performance.md").read_text()
    section = page.partition("## Generation: few tokens")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith(("| olmoe", "| mixtral"))] == [
        "| olmoe | 1 | 4 | 5.2 | 1,200.0 | 1,234.6 | 1,550 | 2,500 | 0.620 |",
        "| olmoe | 2 | - | - | - | - | - | - | - |",
        "| olmoe | 16 | 4 | 5.2 | 1,200.0 | 1,234.6 | 2,000 | 2,500 | 0.800 |",
        "| mixtral | 1 | 4 | 5.2 | 1,200.0 | 1,234.6 | 1,750 | 2,500 | 0.700 |",
    ]
    assert "- olmoe with T 2, jmoe: `out of memory: asks for much`" in section
    assert "(images/generation-nvidia-h100-80gb-hbm3.png)" in section
    image = docs / "images" / "generation-nvidia-h100-80gb-hbm3.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    plot_generation([_record("tiny", 4, 0.5)], "cpu", tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").exists()

    (results / "generation.json").write_text(json.dumps(content | {"records": [failed]}))
    assert "images/generation" not in report.make_page(report.newest(results))
