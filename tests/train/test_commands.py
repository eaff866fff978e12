"""A run from the command line to its folder, and the commands that read that folder."""

import json
import re

import numpy as np
import pytest

from train.arguments import load_config
from train.cli import main
from train.data import load_corpus
from train.inputs import tokens_per_byte
from train.metrics import read_metrics
from train.tokenizer import ByteTokenizer, train_tokenizer


def test_a_run_leaves_its_configuration_metrics_checkpoints_plots_and_summary(finished):
    run, _ = finished
    config = load_config(run)
    assert (config.seed, config.steps) == (3, 12)
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "plots", "summary.json")
    }
    assert {path.name for path in (run / "plots").iterdir()} == {"losses.png", "expert_load.png"}
    assert list((run / "tensorboard").iterdir())


def test_metrics_hold_every_step_once_and_every_evaluation(finished):
    run, _ = finished
    records = read_metrics(run)
    training = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in training] == list(range(1, 13))
    assert [record["step"] for record in records if "validation/loss" in record] == [4, 8, 12]
    for record in training:
        np.testing.assert_allclose(
            record["train/loss"],
            record["train/cross_entropy"]
            + 0.01 * record["train/load_balancing_loss"]
            + 0.001 * record["train/router_z_loss"],
            rtol=1e-5,
        )
        assert np.shape(record["train/expert_load"]) == (1, 4)
        np.testing.assert_allclose(np.sum(record["train/expert_load"]), 1.0, rtol=1e-5)
        assert record["train/tokens_per_second"] > 0
    assert training[-1]["train/bits_per_byte"] < training[0]["train/bits_per_byte"]


def test_the_summary_compares_the_model_with_simple_predictors_shows_a_sample_and_names_the_plots(finished):
    run, output = finished
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["baselines"]) == ["bigram", "interpolated 4-gram", "xz"]
    assert re.search(rf"this model\W+{summary['bits_per_byte']:.3f}", output)
    assert re.search(rf"bigram\W+{summary['baselines']['bigram']:.3f}", output)
    assert "def " in output
    assert f"Loss curves: {run}/plots/losses.png" in output
    assert f"Expert load: {run}/plots/expert_load.png" in output


def test_without_a_terminal_progress_is_plain_lines(finished):
    _, output = finished
    assert re.search(r"^step 12/12  loss \d\.\d+  [\d,]+ tokens/s  0:00:00 left$", output, re.MULTILINE)
    assert "\x1b" not in output


def test_the_best_and_the_newest_checkpoints_are_kept(finished):
    run, _ = finished
    losses = {r["step"]: r["validation/loss"] for r in read_metrics(run) if "validation/loss" in r}
    kept = {int(path.name) for path in (run / "checkpoints").iterdir()}
    assert kept == {8, 12, min(losses, key=losses.__getitem__)}


def test_eval_gives_what_the_summary_says(finished, capsys):
    run, _ = finished
    assert main(["eval", str(run), "--checkpoint", "latest"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['bits_per_byte']:.3f}" in capsys.readouterr().out


def test_generate_continues_the_prompt_the_same_way_for_the_same_seed(finished, capsys):
    run, _ = finished
    texts = []
    for seed in ("0", "0", "1"):
        assert main(["generate", str(run), "--prompt", "abc", "--num-tokens", "20", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("abc")
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--checkpoint", "5"], "checkpoint must be best, latest or a step that has one (8, 12), got '5'"),
        (["--num-tokens", "100"], "max_sequence_length = 64"),
        (["--num-tokens", "8", "--temperature", "-1"], "temperature must not be negative, got -1.0"),
    ],
)
def test_a_mistake_in_a_generate_command_is_one_line(command, message, finished, capsys):
    run, _ = finished
    assert main(["generate", str(run), *command]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_trained_tokenizer_says_how_to_train_with_it_and_the_model_must_hold_its_ids(arguments, tmp_path, capsys):
    file = tmp_path / "tokenizer.json"
    data = arguments[: arguments.index("--steps")]
    assert main(["tokenizer", str(file), "--vocab-size", "300", *data]) == 0
    assert f"Train with it: jmoe-train --tokenizer {file} --model.vocab-size 300" in capsys.readouterr().out
    assert main([*arguments, "--tokenizer", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    assert "pass --model.vocab-size 300" in capsys.readouterr().err


def test_bits_per_byte_count_the_bytes_that_a_token_stands_for(corpus_folder, tmp_path):
    corpus = load_corpus([str(corpus_folder)], validation_fraction=0.2)
    assert tokens_per_byte([b"abc", b"abcde"], ByteTokenizer()) == (3 + 1 + 5 + 1) / 8
    trained = train_tokenizer(corpus.train, 300, str(tmp_path / "tokenizer.json"))
    assert tokens_per_byte(corpus.validation, trained) < 0.8


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ([], "--optimizer.learning-rate FLOAT"),
        (["eval"], "--checkpoint {best,latest,STEP}"),
        (["generate"], "--num-tokens INT"),
        (["tokenizer"], "--vocab-size INT"),
    ],
)
def test_every_command_explains_itself(command, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert text in capsys.readouterr().out
