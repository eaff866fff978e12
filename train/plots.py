"""Pictures of a run, drawn from its metrics: loss curves, and the load of every expert over time."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.metrics import EXPERT_LOAD, TRAIN_BITS_PER_BYTE, VALIDATION_BITS_PER_BYTE, read_metrics

PLOTS_FOLDER = "plots"

# Blue, orange, grey: told apart by every kind of colour vision, and in print.
_TRAIN, _VALIDATION, _BASELINE = "#4477AA", "#EE7733", "#555555"
_BASELINE_STYLES = ("--", ":", "-.")


def plot_losses(run_dir: Path | str, baselines: Mapping[str, float] | None = None) -> Path:
    """Draws training and validation bits per byte over the steps of a run.

    Args:
        run_dir: Folder of the run, whose metrics are read.
        baselines: Bits per byte of other predictors by name, drawn as horizontal lines.

    Returns:
        Path of the PNG file, `plots/losses.png` in the run folder.

    Raises:
        ValueError: If the run has no training loss yet.
    """
    steps, losses = _series(run_dir, TRAIN_BITS_PER_BYTE)
    validation_steps, validation = _series(run_dir, VALIDATION_BITS_PER_BYTE, required=False)
    baselines = baselines or {}

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=1)
    axes.plot(steps, _smooth(losses), color=_TRAIN, linewidth=2, label="training (running mean)")
    if len(validation):
        label = f"validation ({validation[-1]:.2f} at the end)"
        axes.plot(validation_steps, validation, "o-", color=_VALIDATION, linewidth=2, markersize=4, label=label)
    for (name, value), style in zip(baselines.items(), itertools.cycle(_BASELINE_STYLES), strict=False):
        axes.axhline(value, color=_BASELINE, linestyle=style, linewidth=1.2, label=f"{name} ({value:.2f})", zorder=1)

    # The first steps fall from 8 bits: they leave the picture where they would flatten everything else.
    lines = list(baselines.values())
    settled = _finite(losses[len(losses) // 20 :], validation[1:], lines)
    if settled.size:  # A diverged run may hold no number at all.
        bottom, top = _finite(losses, validation, lines).min(), settled.max()
        margin = 0.06 * max(top - bottom, 0.1)
        axes.set_ylim(bottom - margin, top + margin)
    axes.set_xlim(0, 1.01 * max(steps[-1], 1))
    axes.xaxis.set_major_locator(_step_ticks(9))
    axes.set_xlabel("training step")
    axes.set_ylabel("bits per byte")
    axes.set_title("Training and validation loss")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return _save(figure, run_dir, "losses.png")


def plot_expert_load(run_dir: Path | str) -> Path:
    """Draws the load of every expert over the steps of a run, one panel for each MoE layer.

    The colour is the expert's share of its layer's assignments over the balanced share 1/E, on a logarithmic
    scale: 1 is balance, 2 twice as many assignments, 1/2 half as many.

    Args:
        run_dir: Folder of the run, whose metrics are read.

    Returns:
        Path of the PNG file, `plots/expert_load.png` in the run folder.

    Raises:
        ValueError: If the run has no expert loads.
    """
    steps, loads = _series(run_dir, EXPERT_LOAD)  # [N, L, E]
    _, num_layers, num_experts = loads.shape
    steps, loads = _thin(steps, loads * num_experts)
    edges = np.concatenate([[steps[0]], (steps[1:] + steps[:-1]) / 2, [steps[-1]]])
    if len(steps) == 1:
        edges = steps[0] + np.array([-0.5, 0.5])
    places = np.arange(num_experts + 1) - 0.5

    columns = min(4, math.ceil(math.sqrt(num_layers)))
    rows = math.ceil(num_layers / columns)
    figure = Figure(figsize=(2 + 3.4 * columns, 1.4 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colours = ScalarMappable(LogNorm(1 / 4, 4), "RdBu_r")
    for layer, axes in enumerate(panels.flat):
        if layer >= num_layers:
            axes.set_axis_off()
            continue
        # A dead expert has no logarithm: it takes the darkest colour.
        values = np.maximum(loads[:, layer].T, 1e-6)
        axes.pcolormesh(edges, places, values, cmap=colours.cmap, norm=colours.norm)
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.xaxis.set_major_locator(_step_ticks(5))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.label_outer()
    bar = figure.colorbar(colours, ax=panels, extend="both", aspect=30, pad=0.02)
    bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
    bar.ax.minorticks_off()
    bar.set_label("share of assignments, relative to balance (1/E)")
    figure.suptitle(f"Expert load: {num_layers} layers of {num_experts} experts")
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    return _save(figure, run_dir, "expert_load.png")


def _series(run_dir: Path | str, name: str, *, required: bool = True) -> tuple[np.ndarray, np.ndarray]:
    records = [record for record in read_metrics(run_dir) if name in record]
    if required and not records:
        raise ValueError(f"run_dir {run_dir} must hold a record of {name} to plot, found none")
    steps = np.array([record["step"] for record in records], float)
    return steps, np.array([record[name] for record in records], float)


def _step_ticks(most: int) -> MaxNLocator:
    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


def _finite(*values: np.ndarray | list[float]) -> np.ndarray:
    joined = np.concatenate(values)
    return joined[np.isfinite(joined)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the run, narrower at its ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    first = np.maximum(np.arange(len(values)) - half, 0)
    return (sums[last] - sums[first]) / (last - first)


def _thin(steps: np.ndarray, values: np.ndarray, most: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `most` equal stretches of the run."""
    parts = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    return np.array([steps[p].mean() for p in parts]), np.array([values[p].mean(0) for p in parts])


def _save(figure: Figure, run_dir: Path | str, name: str) -> Path:
    path = Path(run_dir) / PLOTS_FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
