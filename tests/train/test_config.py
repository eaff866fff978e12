import dataclasses

import jax
import pytest

from jmoe.models import PRESETS
from train.arguments import load_config, parse, with_file
from train.config import OptimizerConfig, TrainConfig, preset, to_yaml, write_config
from train.failure import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_of_the_models_trains_and_survives_yaml(name, tmp_path):
    config = preset(name)
    assert dataclasses.replace(config.model, dtype=PRESETS[name].dtype) == PRESETS[name]
    write_config(config, tmp_path)
    assert load_config(tmp_path) == config


def test_every_field_of_a_configuration_survives_yaml(tmp_path):
    config = dataclasses.replace(
        preset("tiny"),
        data=("a b.txt", "c.jsonl"),
        tokenizer="tokenizer.json",
        optimizer=OptimizerConfig(clip_norm=float("inf"), learning_rate=1e-5, name="muon"),
        evaluation=dataclasses.replace(preset("tiny").evaluation, sample_prompt="-x: 'y'\n"),
    )
    write_config(config, tmp_path)
    assert load_config(tmp_path) == config


def test_compute_is_in_bfloat16_on_accelerators_and_in_float32_on_a_cpu(monkeypatch):
    assert (preset("small").model.dtype, preset("small").model.param_dtype) == ("float32", "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (preset("small").model.dtype, preset("small").model.param_dtype) == ("bfloat16", "float32")


def test_a_file_overrides_the_preset_and_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 70\nbatch_size: 2\noptimizer: {learning_rate: 1e-4, name: lion}\n")
    default = preset("tiny")
    config = parse(
        TrainConfig,
        ["--steps", "80", "--model.num-layers=3", "--optimizer.name", "sgd"],
        default=with_file(default, path),
    )
    assert config == dataclasses.replace(
        default,
        steps=80,
        batch_size=2,
        model=dataclasses.replace(default.model, num_layers=3),
        optimizer=dataclasses.replace(default.optimizer, learning_rate=1e-4, name="sgd"),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "optimizer: {lerning_rate: 1}",
            "no field optimizer.lerning_rate; did you mean optimizer.learning_rate?",
        ),
        ("stpes: 1", "there is no field stpes; did you mean steps?"),
        ("steps: soon", "Error parsing --steps: invalid literal for int() with base 10: 'soon'"),
        ("model: 7", "field model must be a mapping, got 7"),
        ("- steps", "content must be a mapping, got ['steps']"),
        ("{", "must be YAML"),
        ("batch_size: 3\naccumulation_steps: 2", "batch_size must be a multiple of accumulation_steps = 2"),
        ("model: {top_k: 99}", "top_k must be from 1 to num_experts = 8, got 99"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_name(content, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        with_file(preset("tiny"), path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"config file {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be positive, got 0"),
        ("seed", -1, "seed must not be negative, got -1"),
        ("validation_fraction", 1.5, "validation_fraction must lie between 0 and 1, got 1.5"),
        ("sequence_length", 2048, "must be at most model.max_sequence_length = 1024, got 2048"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset("tiny"), **{field: value})


def test_an_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"preset must be one of tiny, small, .*, got 'huge'"):
        preset("huge")


def test_yaml_has_the_fields_in_the_order_of_the_help():
    assert to_yaml(preset("tiny")).startswith("steps: ")
