import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import capacity


@pytest.mark.exhaustive
def test_the_program_trains_dropless_and_with_a_capacity_and_continues_its_file(run_program, tmp_path, capsys):
    file, text = tmp_path / "results.json", tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text("some text to learn from. " * 40)
    arguments = ["--only", "dropless,1.0", "--steps", "4", "--batch-size", "2", "--sequence-length", "32"]
    arguments += ["--validation-batches", "1", "--data", str(text), "--out", str(file)]
    assert "says nothing of a GPU's speed" in run_program("capacity", *arguments)
    content = json.loads(file.read_text())
    assert content["hardware"]["platform"] == "cpu"
    assert "ceil(capacity_factor * T * K / E)" in content["method"]
    dropless, limited = content["records"]
    assert (dropless["setting"], limited["setting"]) == ("dropless", "1.0")
    assert dropless["dropped_fraction"] == 0 < limited["dropped_fraction"] < 1
    assert dropless["validation"] == pytest.approx(dropless["validation_dropless"])
    assert limited["validation"] != limited["validation_dropless"]
    for record in content["records"]:
        assert 0 < record["seconds_min"] <= record["seconds_median"] <= record["seconds_max"]
        assert 0 < record["cross_entropy_last"] < 10

    assert capacity.main([*arguments, "--resume"]) == 0
    assert json.loads(file.read_text()) == content
    assert "already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        capacity.main(["--steps", "0"])


def test_resuming_repeats_failures_and_measures_what_was_asked_otherwise(tmp_path, monkeypatch):
    asked_for = []

    def measure(setting, asked, *, seed):
        asked_for.append(asked)
        record = {"setting": setting, "asked": asked, **asked}
        if len(asked_for) == 1:
            return record | {"failure": "the first one"}
        names = ("seconds_median", "dropped_fraction", "dropped_fraction_last")
        names += ("cross_entropy_last", "validation", "validation_dropless")
        return record | dict.fromkeys(names, 0.5)

    monkeypatch.setattr(capacity, "measure", measure)
    monkeypatch.setattr(capacity, "new_process", lambda: ThreadPoolExecutor(1))
    file = tmp_path / "results.json"
    longer = ["--only", "dropless", "--steps", "4", "--batch-size", "2", "--resume", "--out", str(file)]
    assert capacity.main(longer) == 1
    assert capacity.main(longer) == 0
    assert capacity.main(longer) == 0
    assert len(asked_for) == 2
    assert capacity.main([*longer[:4], *longer[6:]]) == 0  # the preset's batch
    assert [record["asked"] for record in json.loads(file.read_text())["records"]] == asked_for[1:]
    assert len(asked_for) == 3


def test_a_run_that_fails_is_recorded(tmp_path):
    record = capacity.measure(
        "1.5", {"preset": "tiny", "steps": 1, "sequence_length": 5000, "validation_batches": 1}, seed=0
    )
    assert "sequence_length must be at most" in record["failure"]
