import json

from benchmarks import peers, report
from benchmarks.layers import EXPERT_SWEEP
from benchmarks.plots import plot_layers
from benchmarks.record import RESULTS


def _content(program, records, *, device=peers.DEVICE, date="2026-01-02T00:00:00+00:00"):
    return {
        "program": f"python -m benchmarks.{program}",
        "date": date,
        "hardware": {"device": device},
        "versions": {"jax": "0.11.2"},
        "records": records,
    }


def _layer(configuration, tflops, **more):
    parts = {part: {"tflops": tflops, "ratio": tflops / 800} for part in ("forward", "backward", "both")}
    errors = {"y": 3e-3, "x": 5e-3, "logits": 0.0}
    return {
        "configuration": configuration,
        "routing": "random",
        "implementation": "jmoe",
        "commit": "0123abc",
        "relative_error": errors,
        "plain_relative_error": errors | {"x": 4e-3},
        **parts,
        **more,
    }


def _page(tmp_path, *contents):
    tmp_path.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    return report.make_page(report.newest(tmp_path))


def test_the_committed_page_is_that_of_the_committed_results():
    page = (report.DOCS / "performance.md").read_text(encoding="utf-8")
    expected = report.make_page(report.newest(RESULTS))
    assert page == expected, "run python -m benchmarks.report and commit docs/"


def test_a_layer_stands_beside_its_random_routing_and_beside_others(tmp_path):
    failure = {
        "configuration": "qwen3",
        "routing": "random",
        "implementation": "torch_grouped_mm",
        "failure": "out of memory: asks for much",
    }
    peer = _layer("olmoe", 400, implementation="tokamax", peer_version="0.0.17")
    del peer["plain_relative_error"]
    page = _page(
        tmp_path,
        _content(
            "layer",
            [
                failure,
                peer,
                _layer("olmoe", 540, routing="zipf"),
                _layer("olmoe", 600, kept_mib=1029.4, peak_mib=3000.0, output_mib=1024.0),
                {"implementation": "sonicmoe", "failure": "not importable: ImportError: no"},
            ],
        ),
    )
    rows = [line for line in page.splitlines() if line.startswith(("| olmoe", "| qwen3"))]
    assert rows == [
        "| olmoe | random | jmoe | 600 | 600 | 600 | 0.750 |  | 1.25 |",
        "| olmoe | zipf | jmoe | 540 | 540 | 540 | 0.675 | 0.900 | 1.25 |",
        "| olmoe | random | tokamax 0.0.17 | 400 | 400 | 400 | 0.500 |  |  |",
        "| qwen3 | random | torch_grouped_mm | - | - | - | - | - | - |",
        "| olmoe | 600 / 600 / 600 | 558 / 521 / 533 | 410 / 434 / 426 | 316 / 320 / 318 | 334 / 335 / 334 "
        "| 242 / - / 128 |",
        "| olmoe | 1,029 | 3,000 | 4,024 | 1,029 / 3,078 | 4,098 / 5,250 | 3,076 / 3,973 |",
    ]
    assert "- qwen3, random, torch_grouped_mm: `out of memory: asks for much`" in page
    assert "2026-01-02, JAX 0.11.2, commit 0123abc: [`0.json`](../benchmarks/results/0.json)" in page
    assert "(images/layer-nvidia-h100-80gb-hbm3.png)" in page


def test_only_the_newest_results_of_a_program_and_device_are_shown(tmp_path):
    page = _page(
        tmp_path,
        _content("layer", [_layer("olmoe", 222)], date="2026-01-04T00:00:00+00:00"),
        _content("layer", [_layer("olmoe", 111)], date="2026-01-03T00:00:00+00:00"),
        _content("layer", [_layer("olmoe", 333)], device="NVIDIA H200"),
    )
    assert "| 222 |" in page
    assert "| 111 |" not in page
    assert "| olmoe | random | jmoe | 333 |" in page
    # What others reached is shown for the device that they ran on.
    assert page.count("558 / 521 / 533") == 1


def _sweep(E, forward, **more):
    def timed(ms, flops):
        return {"ms_median": ms, "tflops": flops / ms / 1e9, "ratio": 0.5}

    configuration = EXPERT_SWEEP[f"E{E}"]
    parts = {"forward": forward, "backward": 2 * forward, "both": 3 * forward}
    parts = {name: timed(ms, configuration.flops(name)) for name, ms in parts.items()}
    return _layer(configuration.name, 1, E=E) | parts | more


def test_time_against_experts_stands_beside_its_bound(tmp_path):
    failure = {
        "configuration": "E256",
        "routing": "random",
        "implementation": "scattermoe",
        "failure": "its process died",
    }
    swept = [
        _sweep(512, 9.0, copy_gb_per_s=1000.0),
        _sweep(64, 5.5, copy_gb_per_s=9000.0),
        _sweep(8, 5.0),
        _sweep(8, 4.0, routing="zipf"),
        _sweep(64, 11.0, implementation="scattermoe", peer_version="0.4.6"),
        failure,
    ]
    older = _content("layer", [_layer("olmoe", 600)])
    page = _page(tmp_path, older, _content("layer", swept, date="2026-01-03T00:00:00+00:00"))
    section = page.partition("## Time against the number of experts")[2].partition("\n## ")[0]
    # Of 512 experts the weights have 6.4 GB.
    assert [line for line in section.splitlines() if line.startswith(("| 8", "| 64", "| 512"))] == [
        "| 8 | jmoe | 5.00 | 5.00 | 660 | 15.00 | 15.00 | 660 |",
        "| 64 | jmoe | 5.50 | 5.00 | 600 | 16.50 | 15.00 | 600 |",
        "| 512 | jmoe | 9.00 | 6.44 | 367 | 27.00 | 19.33 | 367 |",
        "| 64 | scattermoe 0.4.6 | 11.00 |  | 300 | 33.00 |  | 300 |",
    ]
    assert "- E256, random, scattermoe: `its process died`" in section
    assert "(images/experts-nvidia-h100-80gb-hbm3.png)" in section
    # A newer sweep takes no other layer's place.
    assert "| olmoe | random | jmoe | 600 |" in page
    assert "| E64 |" not in page
    assert "number of experts" not in _page(tmp_path / "no", older)


def test_memory_is_that_of_the_newer_program(tmp_path):
    memory = {"peak_mib": 9.0, "output_mib": 1.0}
    old = _content("memory", [{"configuration": "olmoe", "implementation": "jmoe", "kept_mib": 5.0, **memory}])
    new = _content("layer", [_layer("olmoe", 1, kept_mib=6.0, **memory)], date="2026-01-03T00:00:00+00:00")
    assert "| olmoe | 6 | 9 | 10 |" in _page(tmp_path, old, new)
    assert "| olmoe | 5 | 9 | 10 |" in _page(tmp_path, old | {"date": "2026-01-05T00:00:00+00:00"}, new)


def test_grouped_matmuls_and_steps_are_shown_with_what_failed(tmp_path):
    def matmul(implementation, **more):
        return {"configuration": "olmoe", "operation": "weight_gradient", "implementation": implementation, **more}

    step = {"setting": "bf16", "preset": "olmoe_1b_7b", "num_layers": 4, "remat": "none", "failure": "its process died"}
    unscanned = step | {"setting": "program", "scan_layers": False}
    page = _page(
        tmp_path,
        _content(
            "grouped_matmul",
            [
                matmul("pallas_kernels", tflops=750.0, ratio=0.93),
                matmul("torch_grouped_mm", tflops=500.0),
                matmul("jax_ragged_dot", failure="out of memory: asks for much"),
            ],
        ),
        _content("train_step", [step, unscanned]),
    )
    assert "| olmoe | weight gradient | 750 | 0.930 | 1.500 | out of memory |" in page
    assert "| bf16 | olmoe_1b_7b | 4 | none |  | - | - | - | - |" in page
    assert "| program | olmoe_1b_7b | 4, unscanned | none |  | - | - | - | - |" in page
    assert "- bf16: `its process died`" in page


def test_block_sparse_products_stand_beside_cublas_batched(tmp_path):
    def product(operation, implementation="pallas_kernels", **more):
        shape = {"configuration": "four_experts", "M": 8192, "K": 4096, "N": 16_384, "G": 4}
        return {**shape, "operation": operation, "implementation": implementation, **more}

    page = _page(
        tmp_path,
        _content(
            "block_sparse",
            [
                product("sdd", tflops=600.0, ratio=0.96),
                product("sdd", "jax_batched", tflops=625.0, ratio=1.0),
                product("dsd_lhs_gradient", tflops=500.0),
                product("dsd_lhs_gradient", "jax_batched", failure="out of memory: asks for much"),
                product("dsd", failure="its process died"),
            ],
        ),
    )
    section = page.partition("## Block-sparse products")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| four")] == [
        "| four_experts | 8,192, 4,096, 16,384, 4 | sdd | 600 | 625 | 0.960 |",
        "| four_experts | 8,192, 4,096, 16,384, 4 | dsd lhs gradient | 500 |  |  |",
        "| four_experts | 8,192, 4,096, 16,384, 4 | dsd | - | - | - |",
    ]
    assert "- four_experts, dsd_lhs_gradient, jax_batched: `out of memory: asks for much`" in section
    assert "- four_experts, dsd, pallas_kernels: `its process died`" in section


def test_ways_of_routing_are_means_over_their_seeds(tmp_path):
    def trained(setting, seed, loss, *, steps=300, **more):
        asked = {"preset": "tiny", "steps": steps, "block_rows": 32}
        model = {"num_experts": 8, "top_k": 2, "batch_size": 4, "sequence_length": 64}
        measured = {"seconds_median": 0.0125, "dropped_fraction": 0.0, "padded_share": 0.125, "experts_per_token": 2.0}
        losses = {"validation": loss, "validation_top_k": loss + 0.125}
        return {"setting": setting, "seed": seed, "asked": asked, **asked, **model, **measured, **losses, **more}

    records = [
        trained("dropless", 0, 2.0),
        trained("capacity_1.0", 0, 2.25, dropped_fraction=0.0625),
        trained("rounding_up", 0, 2.0, failure="its process died"),
        trained("dropless", 1, 1.0),
        trained("dropless", 0, 1.75, steps=3000),
    ]
    gpu = {"device": "some GPU", "platform": "gpu"}
    page = _page(tmp_path, _content("routing", records), _content("routing", records[:1]) | {"hardware": gpu})
    section = page.partition("## Dropless, capacities, token rounding")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith(("| dropless", "| capacity", "| rounding"))]
    assert [line.replace(" | tiny | 8, 2 | 4 x 64 | ", ": ") for line in lines] == [
        "| dropless: 300 | 32 |  | 0.0% | 12.5% | 2.000 | 1.500 | 1.625 (1.125 to 2.125) | 2 |",
        "| capacity 1.0: 300 | 32 |  | 6.2% | 12.5% | 2.000 | 2.250 | 2.375 (2.375 to 2.375) | 1 |",
        "| dropless: 3,000 | 32 |  | 0.0% | 12.5% | 2.000 | 1.750 | 1.875 (1.875 to 1.875) | 1 |",
        # Times of a CPU say nothing.
        "| dropless: 300 | 32 | 12.5 | 0.0% | 12.5% | 2.000 | 2.000 | 2.125 (2.125 to 2.125) | 1 |",
    ]
    assert "- rounding_up: `its process died`" in section


def test_without_results_the_page_says_so(tmp_path):
    page = _page(tmp_path)
    assert page.count("No results yet.") == 4
    assert "Block-sparse products" not in page
    assert "token rounding" not in page


def test_the_program_writes_the_page_and_the_images(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    records = [_layer("olmoe", 600), _layer("dMoE-XS", 300), _sweep(8, 5.0), _sweep(16, 5.1)]
    (results / "layer.json").write_text(json.dumps(_content("layer", records)))
    docs = tmp_path / "docs"
    docs.mkdir()
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    assert (docs / "performance.md").read_text() == report.make_page(report.newest(results))
    image = docs / "images" / "layer-nvidia-h100-80gb-hbm3.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    experts = docs / "images" / "experts-nvidia-h100-80gb-hbm3.png"
    assert experts.read_bytes().startswith(b"\x89PNG")
    # Others' figures are of one kind of device only.
    plot_layers([_layer("olmoe", 600)], "NVIDIA H200", tmp_path / "h200.png")
    assert (tmp_path / "h200.png").stat().st_size < image.stat().st_size
