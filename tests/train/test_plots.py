import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from train.metrics import EXPERT_LOAD, TRAIN_BITS_PER_BYTE, VALIDATION_BITS_PER_BYTE, MetricsWriter
from train.plots import plot_expert_load, plot_losses

ORANGE = to_rgb("#EE7733")
GREY = to_rgb("#555555")


def write(run_dir, records):
    writer = MetricsWriter(run_dir)
    for step, values in records:
        writer.write(step, values)
    writer.close()


def rows_of(image, color, at_least):
    """Rows of the picture, from 0 at the top to 1, where `at_least` of the pixels have `color`."""
    matches = np.abs(image[..., :3] - color).max(-1) < 0.02
    return np.flatnonzero(matches.mean(1) >= at_least) / len(image)


def falling_losses(run_dir):
    steps = range(1, 101)
    losses = 2 + 6 * np.exp(-np.arange(100) / 10)
    write(
        run_dir,
        [(s, {TRAIN_BITS_PER_BYTE: v, VALIDATION_BITS_PER_BYTE: v}) for s, v in zip(steps, losses, strict=True)],
    )


def test_losses_fall_in_the_picture_and_baselines_lie_where_they_should(tmp_path):
    falling_losses(tmp_path)
    path = plot_losses(tmp_path, {"low": 2.5, "high": 4.0})
    assert path == tmp_path / "plots" / "losses.png"
    image = matplotlib.image.imread(path)
    # Validation is flat over most of the width, at the bottom; only the dashed baselines are grey.
    flat = rows_of(image, ORANGE, 0.3)
    dashes = rows_of(image, GREY, 0.1)
    assert dashes.size
    assert dashes.min() < dashes.max() < flat.min()
    curve = np.abs(image[..., :3] - ORANGE).max(-1) < 0.02
    columns = np.flatnonzero(curve.any(0))
    early, late = (np.flatnonzero(curve[:, columns[int(q * len(columns))]]).mean() for q in (0.02, 0.5))
    assert early < late


def test_baselines_are_optional_and_a_diverged_run_still_has_a_picture(tmp_path):
    write(tmp_path, [(s, {TRAIN_BITS_PER_BYTE: v}) for s, v in [(1, 8.0), (2, float("nan")), (3, float("inf"))]])
    assert plot_losses(tmp_path).stat().st_size > 1000


@pytest.mark.parametrize(("share", "color"), [(0.25, "white"), (0.97, "red"), (0.0, "blue")])
def test_the_load_of_an_expert_sets_its_colour(tmp_path, share, color):
    load = np.full((2, 4), 0.25)
    load[1, 2] = share
    write(tmp_path, [(s, {EXPERT_LOAD: load}) for s in range(0, 50, 5)])
    path = plot_expert_load(tmp_path)
    assert path == tmp_path / "plots" / "expert_load.png"
    image = matplotlib.image.imread(path)[:, :-250, :3]  # without the colour bar
    red, blue = image[..., 0], image[..., 2]
    painted = {"red": red - blue > 0.2, "blue": blue - red > 0.2}
    for name, pixels in painted.items():
        if name == color:
            # One of the eight rows of cells, and cells fill most of the picture.
            assert 0.05 < pixels.mean() < 1 / 8
        else:
            assert not pixels.any()


@pytest.mark.parametrize(("steps", "num_layers"), [([7], 1), (range(1000), 3), (range(3), 6)])
def test_load_pictures_fit_any_number_of_steps_and_layers(tmp_path, steps, num_layers):
    write(tmp_path, [(s, {EXPERT_LOAD: np.full((num_layers, 8), 1 / 8)}) for s in steps])
    height, width, _ = matplotlib.image.imread(plot_expert_load(tmp_path)).shape
    assert 300 < height < 3000
    assert 700 < width < 3000


def test_a_run_without_metrics_has_no_picture(tmp_path):
    with pytest.raises(ValueError, match="must hold a record of train/bits_per_byte"):
        plot_losses(tmp_path)
    with pytest.raises(ValueError, match="must hold a record of train/expert_load"):
        plot_expert_load(tmp_path)
