"""Draws what `python -m benchmarks.scaling --simulate` predicts."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.record import Record
from benchmarks.scaling.tables import title_of

_PARTS = {
    "experts": "#4477AA",
    "other": "#66CCEE",
    "update": "#BBBBBB",
    "exchange": "#EE6677",
    "weights": "#CCBB44",
    "gradients": "#AA3377",
}
_LABELS = {
    "other": "other layers",
    "update": "optimizer",
    "weights": "gathering weights",
    "gradients": "sum of gradients",
}


def plot_simulation(records: Sequence[Record], path: Path) -> None:
    """Draws, for each model, the speed for each expert axis, and where the time of the best mesh goes.

    Args:
        records: Of `python -m benchmarks.scaling --simulate`.
        path: The image file, replaced if it is there.
    """
    models: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "prediction":
            models.setdefault(title_of(record), []).append(record)
    figure = Figure(figsize=(11, 4.2 * len(models)), layout="constrained")
    rows = figure.subplots(len(models), 2, squeeze=False)
    for (speed, time), (title, of_model) in zip(rows, models.items(), strict=True):
        best = [record for record in of_model if record["best"]]
        numbers = [record["num_devices"] for record in best]
        experts = sorted({record["expert"] for record in of_model})
        for place, size in enumerate(experts):
            line = [record for record in of_model if record["expert"] == size and record["fits"]]
            shade = str(0.8 - 0.6 * place / max(len(experts) - 1, 1))
            label = f"expert={size}"
            speed.plot([r["num_devices"] for r in line], [r["efficiency"] for r in line], "-", color=shade, label=label)
        fitting = [record for record in best if record["fits"]]
        speed.plot(
            [record["num_devices"] for record in fitting],
            [record["efficiency"] for record in fitting],
            "o",
            color=_PARTS["experts"],
            label="best mesh",
        )
        speed.set_ylim(bottom=0)
        speed.axhline(1, linewidth=0.8, color="#333333")
        speed.set_ylabel("speed of each GPU, of one alone")
        speed.set_title(title, fontsize=10, loc="left")
        bottom = [0.0] * len(best)
        for part, colour in _PARTS.items():
            heights = [1e3 * record["parts"][part] for record in best]
            time.bar(range(len(best)), heights, 0.8, bottom, color=colour, label=_LABELS.get(part, part))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        time.set_ylabel("ms of a step, best mesh")
        time.set_xticks(range(len(best)), [str(number) for number in numbers], rotation=45)
        speed.set_xscale("log", base=2)
        speed.set_xticks(numbers, [str(number) for number in numbers], rotation=45)
        for axes in (speed, time):
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("GPUs")
    # Those of one column are those of the other rows too.
    options = {"ncols": 4, "frameon": False, "fontsize": 9}
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower left", **options)
    figure.legend(*rows[0][1].get_legend_handles_labels(), loc="outside lower right", **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
