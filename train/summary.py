"""What a finished run amounts to: bits per byte beside simple predictors, a sample, and plots."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grain
from flax import nnx

from jmoe.models import Transformer
from train.baselines import bigram_bits_per_byte, interpolated_ngram_bits_per_byte, xz_bits_per_byte
from train.config import TrainConfig
from train.data import Corpus
from train.evaluate import EvalStep, evaluate
from train.generate import generate_text
from train.plots import plot_expert_load, plot_losses
from train.processes import is_first
from train.step import DeviceBatch, Params
from train.tokenizer import Tokenizer

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Summary:
    """The results of a run.

    Attributes:
        bits_per_byte: Of the whole validation text under the model.
        baselines: The same under each of the simple predictors, by name.
        prompt: What the sample continues.
        continuation: The sample.
        plots: Paths of the plots, by what they show.
    """

    bits_per_byte: float
    baselines: Mapping[str, float]
    prompt: str
    continuation: str
    plots: Mapping[str, Path]


def baselines_of(corpus: Corpus) -> dict[str, float]:
    """Bits per byte of the validation text under predictors that need no training by gradient descent."""
    train, validation = b"".join(corpus.train), b"".join(corpus.validation)
    return {
        "bigram": bigram_bits_per_byte(train, validation),
        "interpolated 4-gram": interpolated_ngram_bits_per_byte(train, validation, order=4),
        "xz": xz_bits_per_byte(validation),
    }


def summarize(
    config: TrainConfig,
    run_dir: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    graph: nnx.GraphDef[Transformer],
    eval_step: EvalStep,
    params: Params,
    validation: grain.IterDataset[DeviceBatch],
) -> Summary | None:
    """Evaluates on all of the validation text, draws a sample and the plots, writes `summary.json`.

    Processes but the first take part in the computation and return None.
    """
    evaluation = evaluate(eval_step, params, validation)
    prompt = config.evaluation.sample_prompt
    continuation = generate_text(
        graph, params, tokenizer, prompt, num_tokens=config.evaluation.sample_tokens, seed=config.seed
    )
    if not is_first():
        return None
    bits_per_byte = evaluation.bits_per_byte(corpus.num_validation_bytes)
    baselines = baselines_of(corpus)
    plots = {"Loss curves": plot_losses(run_dir, baselines)}
    if "moe" in config.model.layer_kinds:
        plots["Expert load"] = plot_expert_load(run_dir)
    results = {"steps": config.steps, "bits_per_byte": bits_per_byte, "baselines": baselines}
    (run_dir / SUMMARY_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return Summary(bits_per_byte, baselines, prompt, continuation, plots)
