"""The command line: `jmoe-train` trains; `jmoe-train eval`, `generate` and `tokenizer` do what they say."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from flax import nnx
from rich.console import Console

from jmoe.models import PRESETS, Transformer
from train.arguments import load_config, parse, split, with_file
from train.checkpoint import Checkpoints
from train.config import TrainConfig, preset
from train.data import load_corpus
from train.evaluate import evaluate, make_eval_step
from train.failure import UserError, describe_os_error, user_errors
from train.generate import generate_text
from train.inputs import corpus_of, tokenizer_of, validation_loader
from train.loop import train
from train.mesh import Placement
from train.processes import ProcessOptions, join
from train.step import Params, graph_of, init_params
from train.summary import baselines_of
from train.terminal import show_bits_per_byte
from train.tokenizer import train_tokenizer

_DESCRIPTION = """Train a Mixture-of-Experts language model.

A field has the value of the preset, unless --config sets it, unless the command line does.

Other commands, each with its own --help: "eval RUN" gives the bits per byte of a run, "generate RUN" text
from it, and "tokenizer FILE" trains a tokenizer.

Exit codes: 0 done; 2 a mistake or a failure, which one line on stderr explains; 130 stopped by Ctrl-C and 143
by
SIGTERM, after a last checkpoint."""

Checkpoint = Annotated[str, tyro.conf.arg(metavar="{best,latest,STEP}")]


@dataclass(frozen=True, kw_only=True)
class RunOptions(ProcessOptions):
    """What a run starts from.

    Attributes:
        preset: Configuration to start from; tiny by default.
        config: YAML file with fields to set, such as the config.yaml of another run.
        run_dir: Folder of the run; runs/PRESET-TIME by default.
        resume: Folder of a run to continue at its newest checkpoint, with its own configuration.
    """

    preset: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")] = None
    config: Path | None = None
    run_dir: Path | None = None
    resume: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunOptions):
    """What a run starts from, and its fields."""

    fields: Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Bits per byte of a run's validation text, beside simple predictors.

    Attributes:
        run: Folder of the run.
        checkpoint: Which checkpoint: the one with the lowest validation loss, the newest, or that of a step.
        mesh: Axes of the devices and their sizes, as in training; they need not be the same. One device if empty.
    """

    run: tyro.conf.Positional[Path]
    checkpoint: Checkpoint = "best"
    mesh: str = ""


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Text from the model of a run.

    Attributes:
        run: Folder of the run.
        prompt: Text to continue.
        num_tokens: Most tokens to draw; the end of a document ends the text.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_k: Draw from the likeliest k tokens only.
        top_p: Draw from the likeliest tokens that together have this probability only.
        seed: Seed of the draws.
        checkpoint: Which checkpoint: the one with the lowest validation loss, the newest, or that of a step.
        mesh: Axes of the devices and their sizes, as in training; they need not be the same. One device if empty.
    """

    run: tyro.conf.Positional[Path]
    prompt: str = ""
    num_tokens: int = 300
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    checkpoint: Checkpoint = "best"
    mesh: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenizerCommand:
    """Train a byte-level BPE tokenizer, for `jmoe-train --tokenizer`.

    Attributes:
        file: JSON file to write, in the format of the `tokenizers` library.
        data: Text or JSON-lines files, folders or globs. None given: the standard library of the running
            Python.
        vocab_size: Number of tokens, the 256 bytes and the end of text among them.
        validation_fraction: Share of the documents that training will hold out, which the tokenizer does not
            see.
    """

    file: tyro.conf.Positional[Path]
    data: tuple[str, ...] = ()
    vocab_size: int = 4096
    validation_fraction: float = 0.05


def run_train(arguments: Sequence[str]) -> int:
    """Trains, as `jmoe-train` without a command does; returns the exit code."""
    options, _ = split(RunOptions, arguments)
    with user_errors():
        join(options)
    if jax.process_count() > 1 and not (options.run_dir or options.resume):
        raise UserError("--run-dir must be given to a run of several processes, and be the same folder for all")
    if options.resume:
        if options.preset or options.run_dir:
            raise UserError("--resume takes configuration and folder from the run: leave out --preset and --run-dir")
        config, run_dir = load_config(options.resume), options.resume
    else:
        name = options.preset or "tiny"
        with user_errors():
            config = preset(name)
        run_dir = options.run_dir or Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if options.config:
        config = with_file(config, options.config)
    command = parse(TrainCommand, arguments, default=TrainCommand(fields=config), description=_DESCRIPTION)
    return train(command.fields, run_dir, resume=options.resume is not None)


def run_eval(arguments: Sequence[str]) -> int:
    """Evaluates a run, as `jmoe-train eval` does; returns the exit code."""
    command = parse(EvalCommand, arguments, prog="jmoe-train eval")
    config, placement = _config_of(command)
    with placement.active():
        graph, params = _open(config, command, placement)
        with user_errors():
            tokenizer, corpus = tokenizer_of(config), corpus_of(config)
        validation = validation_loader(config, corpus, tokenizer, placement)
        evaluation = evaluate(make_eval_step(graph), params, validation)
    show_bits_per_byte(Console(), evaluation.bits_per_byte(corpus.num_validation_bytes), baselines_of(corpus))
    return 0


def run_generate(arguments: Sequence[str]) -> int:
    """Generates text from a run, as `jmoe-train generate` does; returns the exit code."""
    command = parse(GenerateCommand, arguments, prog="jmoe-train generate")
    config, placement = _config_of(command)
    with placement.active(), user_errors():
        graph, params = _open(config, command, placement)
        continuation = generate_text(
            graph,
            params,
            tokenizer_of(config),
            command.prompt,
            num_tokens=command.num_tokens,
            seed=command.seed,
            temperature=command.temperature,
            top_k=command.top_k,
            top_p=command.top_p,
        )
    print(command.prompt + continuation)
    return 0


def run_tokenizer(arguments: Sequence[str]) -> int:
    """Trains a tokenizer, as `jmoe-train tokenizer` does; returns the exit code."""
    command = parse(TokenizerCommand, arguments, prog="jmoe-train tokenizer")
    with user_errors():
        corpus = load_corpus(command.data, validation_fraction=command.validation_fraction)
        tokenizer = train_tokenizer(corpus.train, command.vocab_size, str(command.file))
    print(f"{command.file}: {tokenizer.vocab_size} tokens, from {corpus.description}")
    print(f"Train with it: jmoe-train --tokenizer {command.file} --model.vocab-size {tokenizer.vocab_size}")
    return 0


def _config_of(command: EvalCommand | GenerateCommand) -> tuple[TrainConfig, Placement]:
    """The configuration of a run on the mesh of a command, and that mesh."""
    with user_errors():
        config = dataclasses.replace(load_config(command.run), mesh=command.mesh)
        return config, Placement(config.mesh)


def _open(
    config: TrainConfig, command: EvalCommand | GenerateCommand, placement: Placement
) -> tuple[nnx.GraphDef[Transformer], Params]:
    """The model of a run, and the parameters in one of its checkpoints."""
    checkpoint = command.checkpoint
    with contextlib.closing(Checkpoints(command.run, read_only=True)) as checkpoints:
        match checkpoint:
            case "best":
                step = checkpoints.best_step()
            case "latest":
                step = checkpoints.latest_step()
            case _ if checkpoint.isdecimal() and int(checkpoint) in checkpoints.steps:
                step = int(checkpoint)
            case _:
                steps = ", ".join(map(str, checkpoints.steps)) or "none"
                raise UserError(f"checkpoint must be best, latest or a step that has one ({steps}), got {checkpoint!r}")
        params = checkpoints.restore_params(step, placement.shapes(lambda: init_params(config.model, 0)))
    return graph_of(config.model), params


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "eval": run_eval,
    "generate": run_generate,
    "tokenizer": run_tokenizer,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line without the program's name; that of the process if None.

    Returns:
        The exit code: 0; 2 after a mistake or a failure, which one line on stderr explains; 130 after Ctrl-C
        and 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    run = _COMMANDS.get(arguments[0]) if arguments else None
    try:
        return run(arguments[1:]) if run else run_train(arguments)
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = describe_os_error(error)
    except KeyboardInterrupt:
        print("jmoe-train: interrupted", file=sys.stderr)
        return 130
    print(f"jmoe-train: error: {message}", file=sys.stderr)
    return 2
