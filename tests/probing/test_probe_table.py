"""Tables of probes: what is written is read again, and what sums them up follows its definition."""

from dataclasses import replace

import numpy as np
import pytest

from hf_rskip.errors import UserError
from hf_rskip.probing.figure import _gain_quantities, _scale, _use_log_scale, draw_probes
from hf_rskip.probing.probe import SublayerProbe
from hf_rskip.probing.table import (
    ProbedModel,
    format_summary,
    gradient_growth,
    gradient_ratio,
    median_skip_weight,
    read_table,
    truncate_table,
    write_table,
)

ROW = SublayerProbe(
    **dict.fromkeys(["layer", "sublayer", "depth"], 0),
    **{name: 0.5 for name in SublayerProbe.__annotations__ if name.startswith(("std", "angle", "skip", "grad", "rel"))},
    **{"name": "a.skip", "stack": "encoder", "tokens": 7, "loss": 1.25, "gain_mean": (1.0, 2.5), "gain_rms": ()},
)


def stack(factor: float, size: int = 5) -> list[SublayerProbe]:
    """The gradient grows by `factor` with each sublayer on its way down."""
    norms = [3 * factor**left for left in range(size, -1, -1)]
    return [
        replace(
            ROW,
            depth=i,
            gradient_norm_x=norms[i],
            gradient_norm_y=norms[i + 1],
            relative_gradient_norm_x=norms[i] / 3,
            relative_gradient_norm_y=norms[i + 1] / 3,
        )
        for i in range(size)
    ]


def test_what_is_written_is_read_again(tmp_path):
    probed = [
        ProbedModel("a", 1, 0, [ROW, replace(ROW, skip_weight=float("inf"), angle=1 / 3)]),
        ProbedModel("b, with a comma", None, None, [ROW]),
        ProbedModel("a", 1, 10, [ROW]),
    ]
    path = tmp_path / "probe.csv"
    write_table(probed[:2], path)
    write_table(probed[2:], path, append=True)
    read = read_table(path)
    assert read[0].sublayers[1].angle == pytest.approx(1 / 3, rel=1e-8)
    assert [replace(item, sublayers=[]) for item in read] == [replace(item, sublayers=[]) for item in probed]
    assert read[1:] == probed[1:] and read[0].sublayers[0] == ROW
    assert "b, with a comma" in format_summary(read)


def test_rows_beyond_a_step_and_what_was_cut_short_go(tmp_path):
    path = tmp_path / "probe.csv"
    write_table([ProbedModel("a", 1, step, [ROW, ROW]) for step in (0, 10, 20, 30)], path)
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert [item.step for item in read_table(path)] == [0, 10, 20]
    path.write_text(whole)
    truncate_table(path, 10)
    assert [(item.step, len(item.sublayers)) for item in read_table(path)] == [(0, 2), (10, 2)]
    truncate_table(path, -1)
    assert path.read_text() == whole.splitlines()[0] + "\n"
    with pytest.raises(UserError, match="probe.csv' has no probes in it"):
        read_table(path)
    truncate_table(path, 10)  # as where a training was killed before its first probe
    assert path.read_text() == whole.splitlines()[0] + "\n"


def test_a_file_that_is_no_table(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of `hf-rskip probe`"):
        read_table(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "missing.csv")


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_ratio_and_growth(factor):
    assert gradient_ratio(stack(factor)) == pytest.approx(factor**5)
    assert gradient_growth(stack(factor)) == pytest.approx(factor)
    broken = [*stack(factor)[:-1], replace(ROW, gradient_norm_y=0.0)]
    assert gradient_growth(broken) != gradient_growth(broken)  # NaN


def test_a_sublayer_without_a_skip_weight_has_no_part_in_the_median():
    rows = [replace(ROW, skip_weight=weight) for weight in (1.0, float("nan"), 2.0, 4.0)]
    assert median_skip_weight(rows) == 2.0 and np.isnan(median_skip_weight(rows[1:2]))
    assert "| 4  " in format_summary([ProbedModel("a", 1, 0, [replace(ROW, skip_weight=4.0), rows[1]])])


def test_pictures_of_models_and_of_courses(tmp_path):
    models = [ProbedModel(name, seed, 0, stack(1.2)) for name in ("a", "b_$x$") for seed in (1, 2)]
    course = [ProbedModel("a", None, step, stack(1 + step / 100)) for step in (0, 10, 20)]
    strange = [
        ProbedModel("a", 1, 0, [replace(row, gradient_norm_x=float("nan"), skip_weight=-1.0) for row in stack(1)])
    ]
    courses = [*course, replace(course[0], model="b")]
    kinds = {"models": models, "course": course, "courses": courses, "strange": strange}
    for name, probed in kinds.items():
        (tmp_path / name).mkdir()
        paths = draw_probes(probed, tmp_path / name)
        assert {path.stem for path in paths} == {"gradients", "activations", "angle", "skip_weight"}
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("gains", [(1.0, 0.99), (1.0, 1.0), (0.2, 3.0)])
def test_gains_have_room_around_1(gains):
    from matplotlib.figure import Figure

    (quantity,) = _gain_quantities([ProbedModel("a", 1, 0, [replace(ROW, gain_rms=gains[:1])])])
    axes = Figure().subplots()
    _scale(axes, np.array(gains), quantity)
    low, high = axes.get_ylim()
    assert low < min(1, *gains) - 0.04 and high > max(1, *gains) + 0.04 and high - low < 4


def test_a_small_logarithmic_range_has_ticks_enough():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _use_log_scale(axes, np.array([1.0, 2.7]), 4)
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 4
