import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import routing
from benchmarks.seeds import joined_over_seeds


@pytest.mark.exhaustive
def test_the_program_trains_by_each_routing_and_continues_its_file(run_program, tmp_path, capsys):
    file, text = tmp_path / "results.json", tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text("some text to learn from. " * 40)
    arguments = ["--only", "dropless,capacity_1.0,rounding_up", "--steps", "4", "--batch-size", "2"]
    arguments += [
        "--sequence-length",
        "32",
        "--block-rows",
        "16",
        "--validation-batches",
        "1",
        "--data",
        str(text),
        "--out",
        str(file),
    ]
    assert "says nothing of a GPU's speed" in run_program("routing", *arguments)
    content = json.loads(file.read_text())
    assert content["hardware"]["platform"] == "cpu"
    assert "ceil(c * T * K / E)" in content["method"]
    dropless, limited, rounded = content["records"]
    assert [record["setting"] for record in content["records"]] == ["dropless", "capacity_1.0", "rounding_up"]
    assert dropless["dropped_fraction"] == 0 < limited["dropped_fraction"] < 1
    assert dropless["validation"] == pytest.approx(dropless["validation_top_k"])
    assert limited["validation"] != limited["validation_top_k"]
    assert rounded["validation"] != rounded["validation_top_k"]
    assert limited["experts_per_token"] < dropless["experts_per_token"] == 2 < rounded["experts_per_token"]
    assert rounded["padded_share"] == 0 < dropless["padded_share"] < 1
    for record in content["records"]:
        assert 0 < record["seconds_min"] <= record["seconds_median"] <= record["seconds_max"]
        assert 0 < record["cross_entropy_last"] < 10

    assert routing.main([*arguments, "--resume"]) == 0
    assert json.loads(file.read_text()) == content
    assert "already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        routing.main(["--steps", "0"])


def test_resuming_repeats_failures_and_measures_what_was_asked_otherwise(tmp_path, monkeypatch):
    asked_for = []

    def measure(setting, asked, *, seed):
        asked_for.append(asked)
        record = {"setting": setting, "seed": seed, "asked": asked, **asked}
        if len(asked_for) == 1:
            return record | {"failure": "the first one"}
        names = "seconds_median", "dropped_fraction", "padded_share", "experts_per_token"
        names += "validation", "validation_top_k", "num_experts", "top_k", "batch_size", "sequence_length"
        return record | dict.fromkeys(names, 0.5)

    monkeypatch.setattr(routing, "measure", measure)
    monkeypatch.setattr(routing, "new_process", lambda: ThreadPoolExecutor(1))
    file = tmp_path / "results.json"
    longer = ["--only", "dropless", "--steps", "4", "--batch-size", "2", "--resume", "--out", str(file)]
    assert routing.main(longer) == 1
    assert routing.main(longer) == 0
    assert routing.main(longer) == 0
    assert len(asked_for) == 2
    assert routing.main([*longer[:4], *longer[6:]]) == 0  # the preset's batch
    assert [record["asked"] for record in json.loads(file.read_text())["records"]] == asked_for[1:]
    assert len(asked_for) == 3
    assert routing.main([*longer, "--num-seeds", "3"]) == 0  # the first is there
    assert [record["seed"] for record in json.loads(file.read_text())["records"]] == [0, 0, 1, 2]


def test_a_run_that_fails_is_recorded(tmp_path):
    record = routing.measure(
        "rounding_up",
        {"preset": "tiny", "steps": 1, "sequence_length": 5000, "block_rows": 8, "validation_batches": 1},
        seed=0,
    )
    assert "sequence_length must be at most" in record["failure"]


def test_means_are_over_the_seeds_of_one_setting():
    def record(seed, loss, *, steps=4, **more):
        return {"setting": "dropless", "seed": seed, "asked": {"steps": steps}, "steps": steps, "loss": loss, **more}

    records = [record(0, 2.0), record(1, 5.0), record(2, 3.5), record(0, 1.0, steps=8), record(1, 0.0, failure="no")]
    short, long = joined_over_seeds(records, "loss")
    assert (short["loss"], short["spread"], short["seeds"], short["steps"]) == (3.5, (2.0, 5.0), 3, 4)
    assert (long["loss"], long["spread"], long["seeds"], long["steps"]) == (1.0, (1.0, 1.0), 1, 8)
