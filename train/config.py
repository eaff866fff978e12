"""What a run is made of: frozen dataclasses, their presets, and YAML files that hold them."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax
import yaml

from jmoe.models import PRESETS as MODEL_PRESETS
from jmoe.models import TransformerConfig
from train.mesh import batch_axes, parse_mesh

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
        name: Update rule. Adam is "adamw" with no weight decay; "muon" leaves embeddings and vectors to Adam;
            "sgd" has momentum `beta1`.
        learning_rate: Peak learning rate.
        schedule: What follows the warm-up: "cosine", "linear", "constant", or "wsd" (stable, then a linear
            decay).
        warmup_steps: Steps of linear warm-up from 0.
        final_learning_rate: Learning rate at the last step, as a share of the peak.
        decay_fraction: Share of the steps after the warm-up in which "wsd" decays.
        weight_decay: Decoupled weight decay; norm scales and biases have none.
        beta1: Decay rate of the first moment (momentum).
        beta2: Decay rate of the second moment.
        epsilon: Added to the root of the second moment.
        clip_norm: Largest global norm of the gradient; "inf" never clips.
    """

    name: Literal["adamw", "lion", "muon", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    final_learning_rate: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self):
        """Checks the ranges."""
        _require_positive(self, "learning_rate", "epsilon", "clip_norm")
        _require_not_negative(self, "warmup_steps", "weight_decay")
        _require_share(self, "final_learning_rate", "decay_fraction", "beta1", "beta2")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved, and what is kept.

    Attributes:
        every: Steps between checkpoints. Each is evaluated first, so that the best one is known; the last
            step and an interruption are always saved.
        keep_last: Newest checkpoints that are kept.
        keep_best: Checkpoints with the lowest validation loss that are kept beside them.
    """

    every: int = 500
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self):
        """Checks the ranges."""
        _require_positive(self, "every", "keep_last")
        _require_not_negative(self, "keep_best")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the model is judged on the held-out documents.

    Attributes:
        every: Steps between evaluations while training.
        num_batches: Batches of each of these; the same ones every time. The evaluation at the end takes them
            all.
        sample_prompt: What the sample at the end continues.
        sample_tokens: Tokens of that sample.
    """

    every: int = 500
    num_batches: int = 16
    sample_prompt: str = "def "
    sample_tokens: int = 300

    def __post_init__(self):
        """Checks the ranges."""
        _require_positive(self, "every", "num_batches", "sample_tokens")
        if not self.sample_prompt:
            raise ValueError("sample_prompt must hold at least one character, got an empty string")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        steps: Updates of the parameters.
        batch_size: Sequences in one update.
        sequence_length: Tokens in a sequence.
        accumulation_steps: Parts that a batch is cut into, whose gradients are summed before the update:
            divides the memory for activations, and changes the result by rounding only.
        mesh: Axes of the devices and their sizes, such as "data=2,expert=4": of data, fsdp (which also splits the
            parameters), expert and tensor. One device if empty.
        seed: Seed of the initial parameters and of the order of the data.
        log_every: Steps between records of the metrics.
        data: Text or JSON-lines files, folders or globs. None given: the standard library of the running
            Python.
        validation_fraction: Share of the documents held out for validation.
        tokenizer: JSON file of the `tokenizers` library; bytes if there is none.
        model: The transformer.
        optimizer: How gradients become updates.
        checkpoint: When the state of the run is saved, and what is kept.
        evaluation: How the model is judged on the held-out documents.
    """

    steps: int = 10_000
    batch_size: int = 16
    sequence_length: int = 1024
    accumulation_steps: int = 1
    mesh: str = ""
    seed: int = 0
    log_every: int = 10
    data: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    tokenizer: str | None = None
    model: TransformerConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        """Checks the ranges and that the fields fit together."""
        _require_positive(
            self,
            "steps",
            "batch_size",
            "sequence_length",
            "accumulation_steps",
            "log_every",
            "validation_fraction",
        )
        _require_not_negative(self, "seed")
        _require_share(self, "validation_fraction")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size must be a multiple of accumulation_steps = {self.accumulation_steps}, "
                f"got {self.batch_size}"
            )
        sizes = parse_mesh(self.mesh)
        shards = math.prod(sizes[axis] for axis in batch_axes(sizes))
        if self.batch_size % (self.accumulation_steps * shards):
            raise ValueError(
                f"batch_size must be a multiple of accumulation_steps = {self.accumulation_steps} times {shards}, the "
                f"size of the mesh axes {' x '.join(batch_axes(sizes))}, got {self.batch_size}"
            )
        if self.sequence_length > self.model.max_sequence_length:
            raise ValueError(
                "sequence_length must be at most model.max_sequence_length = "
                f"{self.model.max_sequence_length}, got {self.sequence_length}"
            )


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def _require_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def _require_share(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {getattr(config, name)}")


def preset(name: str) -> TrainConfig:
    """The training configuration that `name` stands for, with the compute dtype that suits this machine.

    Every preset of `jmoe.models` is one: bfloat16 on accelerators, float32 on a CPU, float32 parameters on
    both.

    Args:
        name: A key of `jmoe.models.PRESETS`.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in MODEL_PRESETS:
        raise ValueError(f"preset must be one of {', '.join(MODEL_PRESETS)}, got {name!r}")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = dataclasses.replace(MODEL_PRESETS[name], dtype=dtype)
    return TrainConfig(model=model, **_SETTINGS.get(name, {}))


# What a preset sets beyond the model: for the demo, what two CPU cores do in about three minutes.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "steps": 560,
        "batch_size": 16,
        "sequence_length": 128,
        "log_every": 2,
        "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=50, final_learning_rate=0.05),
        "checkpoint": CheckpointConfig(every=100),
        "evaluation": EvaluationConfig(every=100, num_batches=16),
    },
    "olmoe_1b_7b": {
        "batch_size": 128,
        "sequence_length": 4096,
        "accumulation_steps": 32,
        "optimizer": OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
    },
}


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration as YAML, which `--config` reads back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def write_config(config: TrainConfig, run_dir: Path) -> None:
    """Writes `config.yaml` in a run folder; a process that dies meanwhile leaves the file as it was."""
    draft = run_dir / f"{CONFIG_FILE}.tmp"
    draft.write_text(to_yaml(config), encoding="utf-8")
    draft.replace(run_dir / CONFIG_FILE)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def yaml_arguments(path: Path | str) -> list[str]:
    """The fields set in a YAML file, as the command-line arguments that set the same.

    Reading the file as arguments gives both one parser, one set of types and one kind of message.

    Args:
        path: A YAML file: a mapping with the fields of `TrainConfig`, nested as they are; all are optional.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a mapping, or holds a name that is not a field.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} must be YAML: {error}") from error
    return list(_arguments({} if content is None else content, TrainConfig, "", path))


def _arguments(content: Any, config_type: type, prefix: str, path: Path | str) -> Iterator[str]:
    if not isinstance(content, dict):
        what = f"field {prefix.rstrip('.')}" if prefix else "content"
        raise ValueError(f"config file {path}: {what} must be a mapping, got {content!r}")
    fields = get_type_hints(config_type)
    for name, value in content.items():
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"the fields are {', '.join(fields)}"
            raise ValueError(f"config file {path}: there is no field {prefix}{name}; {hint}")
        if dataclasses.is_dataclass(fields[name]):
            yield from _arguments(value, fields[name], f"{prefix}{name}.", path)
        else:
            flag = f"--{prefix}{name}".replace("_", "-")
            yield from [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
