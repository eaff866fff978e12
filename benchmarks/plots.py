"""Draws the speed of whole layers: beside others', against the number of experts, and for few tokens."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import peers
from benchmarks.experts import bounds_ms, by_number_of_experts
from benchmarks.layers import CONFIGURATIONS, EXPERT_SWEEP
from benchmarks.record import Record

# Blue for ours; the others told apart by every kind of colour vision, and in print.
_OURS = "#4477AA"
_PEERS = ("#EE7733", "#BBBBBB", "#777777", "#CCBB44", "#AA3377")

# What the layer is to reach for few tokens, of the rate of a copy.
_GOAL, _GOAL_FOR_ONE_TOKEN = 0.75, 0.6


def plot_layers(records: Sequence[Record], device: str, path: Path) -> None:
    """Draws TFLOP/s of forward, and of forward and backward, for each configuration with random routing.

    Args:
        records: Of `python -m benchmarks.layer`; those of this project that were timed are drawn.
        device: What they were measured on. Figures of others are drawn if they are from such a device too.
        path: The image file, replaced if it is there.
    """
    ours = timed_with_random_routing(records)
    names = [name for name in CONFIGURATIONS if name in ours]
    others = peers.LAYERS if device == peers.DEVICE else {}
    figure = Figure(figsize=(1.5 + 1.25 * max(len(names), 4), 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, operation, label in zip(panels, ("forward", "both"), ("forward", "forward and backward"), strict=True):
        width = 0.84 / (1 + len(others))
        left = width / 2 - 0.42
        heights = [ours[name][operation]["tflops"] for name in names]
        bars = axes.bar([place + left for place in range(len(names))], heights, width, color=_OURS, label="jmoe")
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
        for (peer, figures), colour in zip(others.items(), _PEERS, strict=False):
            left += width
            of_peer = [(place, figures[name]) for place, name in enumerate(names) if name in figures]
            heights = [getattr(tflops, operation) for _, tflops in of_peer]
            axes.bar([place + left for place, _ in of_peer], heights, width, color=colour, label=peer)
        axes.set_ylabel(f"TFLOP/s, {label}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(f"MoE layers on one {device}, bfloat16, random routing")
    panels[1].set_xticks(range(len(names)), names)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_experts(records: Sequence[Record], device: str, path: Path) -> None:
    """Draws the time of forward, and of forward and backward, against the number of experts, and its bound.

    Args:
        records: Of `python -m benchmarks.layer`; those of the sweep that were timed with random routing are drawn.
        device: What they were measured on.
        path: The image file, replaced if it is there.
    """
    implementations = by_number_of_experts(records)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    colours = dict(zip(implementations, (_OURS, *_PEERS), strict=False))
    for axes, operation, label in zip(panels, ("forward", "both"), ("forward", "forward and backward"), strict=True):
        for implementation, by_experts in implementations.items():
            times = [record[operation]["ms_median"] for record in by_experts.values()]
            colour = colours[implementation]
            axes.plot(list(by_experts), times, "o-", color=colour, label=implementation)
        if ours := implementations.get("jmoe"):
            bounds = bounds_ms(ours, operation)
            axes.plot(list(bounds), list(bounds.values()), "--", color="#333333", label="bound of jmoe")
        experts = sorted({E for by_experts in implementations.values() for E in by_experts})
        axes.set_xscale("log", base=2)
        axes.set_xticks(experts, [str(E) for E in experts])
        axes.set_xlabel("experts")
        axes.set_ylabel(f"ms, {label}")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    shape = next(iter(EXPERT_SWEEP.values()))
    figure.suptitle(f"T {shape.T}, D {shape.D}, F {shape.F}, K {shape.K} on one {device}, bfloat16, random routing")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_generation(records: Sequence[Record], device: str, path: Path) -> None:
    """Draws how near each configuration comes to the rate of a copy, against the number of tokens, and the goal.

    Args:
        records: Of `python -m benchmarks.generation`; those that were timed are drawn.
        device: What they were measured on.
        path: The image file, replaced if it is there.
    """
    timed = sorted((record for record in records if "failure" not in record), key=lambda record: record["T"])
    names = [name for name in CONFIGURATIONS if any(record["configuration"] == name for record in timed)]
    tokens = sorted({record["T"] for record in timed})
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(names, itertools.cycle((_OURS, *_PEERS))):
        of_name = [record for record in timed if record["configuration"] == name]
        shares = [100 * record["of_copy"] for record in of_name]
        axes.plot([record["T"] for record in of_name], shares, "o-", color=colour, label=name)
    axes.axhline(100 * _GOAL, linestyle="--", color="#333333", label=f"goal, {_GOAL:.0%}")
    if 1 in tokens:
        goal = f"goal for one token, {_GOAL_FOR_ONE_TOKEN:.0%}"
        axes.plot([1], [100 * _GOAL_FOR_ONE_TOKEN], "_", markersize=24, markeredgewidth=2, color="#333333", label=goal)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(T) for T in tokens])
    axes.set_xlabel("tokens")
    axes.set_ylabel("% of the rate of a copy")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Reading the chosen experts' weights on one {device}, bfloat16", fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def timed_with_random_routing(records: Sequence[Record]) -> dict[str, Record]:
    """This project's records with random routing, of those that were timed, by configuration."""
    return {
        record["configuration"]: record
        for record in records
        if record["implementation"] == "jmoe" and record["routing"] == "random" and "failure" not in record
    }
