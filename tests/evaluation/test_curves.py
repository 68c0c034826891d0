"""Curves of runs: what is drawn, and where the legend is."""

import pytest
from helpers import write

from rlhf_core.evaluation import curves as module
from rlhf_core.evaluation.curves import (
    MAIN,
    Run,
    draw_against_kl,
    draw_curves,
    draw_frontier,
    draw_policies,
    moving_average,
    read_run,
)

matplotlib = pytest.importorskip("matplotlib")


def history(steps, **metrics):
    return [{"step": i, **{name: f(i) for name, f in metrics.items()}} for i in range(1, steps + 1)]


A = Run("a", history(30, loss=lambda i: 1 / i, reward=lambda i: i / 2, lr=lambda i: 0.1))
B = Run("b", [*history(8, loss=lambda i: 2 / i), {"step": 9, "loss": 0.1, "eval_loss": 0.5}])


def curves(figure):
    """{panel's title: [(x, y) of each line]}."""
    return {
        panel.get_title(): [tuple(map(list, line.get_data())) for line in panel.lines]
        for panel in figure.axes
    }


def test_each_metric_has_a_panel_with_the_values_of_the_runs_that_log_it():
    drawn = curves(draw_curves([A, B], ["reward", "eval_loss", "loss"]))
    assert list(drawn) == ["reward", "eval_loss", "loss"]
    assert drawn["reward"] == [(list(range(1, 31)), [i / 2 for i in range(1, 31)])]
    assert drawn["eval_loss"] == [([9], [0.5])]
    assert [len(steps) for steps, _ in drawn["loss"]] == [30, 9]


def test_by_default_the_main_metrics_are_drawn_else_the_first_ones():
    assert list(curves(draw_curves([A, B]))) == ["loss", "eval_loss"]
    assert list(curves(draw_curves([Run("c", history(3, x=float, y=float))]))) == ["x", "y"]
    everything = history(3, **dict.fromkeys(MAIN, float))
    assert list(curves(draw_curves([Run("d", everything)]))) == list(MAIN[:6])


def test_the_legend_names_the_runs_outside_the_panels():
    figure = draw_curves([A, B], ["loss"])
    figure.savefig("/dev/null", format="png")  # lays the parts out
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert not any(panel.get_legend() for panel in figure.axes)
    box = legend.get_window_extent()
    assert not any(box.overlaps(panel.get_tightbbox()) for panel in figure.axes)
    assert not draw_curves([A], ["loss"]).legends


def test_smooth_draws_the_mean_of_the_last_steps_over_the_pale_values():
    assert moving_average([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0], 3) == [1.0, 2.0, 3.0, 5.0]
    assert moving_average([10, 12, 30], [1.0, 3.0, 5.0], 3) == [1.0, 2.0, 5.0]
    (raw, smooth) = curves(draw_curves([A], ["reward"], smooth=3))["reward"]
    assert raw[1][:3] == [0.5, 1.0, 1.5] and smooth[1][:4] == [0.5, 0.75, 1.0, 1.5]


def test_rounds_are_drawn_by_their_number_and_lists_are_left_out():
    rounds = Run("r", [{"round": i, "loss": 1.0 / i, "elo": [0.0, 1.0]} for i in (1, 2)])
    figure = draw_curves([rounds])
    assert curves(figure) == {"loss": [([1, 2], [1.0, 0.5])]}
    assert figure.axes[0].get_xlabel() == "round"


def test_a_metric_that_no_run_has_is_named():
    with pytest.raises(ValueError, match="no run has the metric 'los'; did you mean loss"):
        draw_curves([A, B], ["los"])
    with pytest.raises(ValueError, match="'x'; there are loss, reward, lr"):
        draw_curves([A], ["x"])


def test_a_long_curve_keeps_the_extremes_of_its_stretches(monkeypatch):
    monkeypatch.setattr(module, "POINTS", 100)
    spikes = {500: 9.0, 777: -9.0, 1001: float("nan")}
    run = Run("r", [{"step": i, "loss": spikes.get(i, 0.0)} for i in range(1, 1002)])
    (((steps, values),),) = curves(draw_curves([run])).values()
    assert len(steps) <= 100 and steps == sorted(steps)
    assert {(500, 9.0), (777, -9.0)} <= set(zip(steps, values))
    assert not any(value != value for value in values)


def test_of_a_long_history_the_ends_and_every_tenth_line_are_read(tmp_path):
    rows = [{"step": i, "loss": 1.0} for i in range(1000, 2234)]
    write(tmp_path / "metrics.jsonl", rows)
    for most, every in ((None, 1), (1234, 1), (1233, 10), (20, 100)):
        steps = [row["step"] for row in read_run(tmp_path, "a", most).history]
        numbers = [i for i in range(1, 1235) if i in (1, 1234) or i % every == 0]
        assert steps == [999 + i for i in numbers]


def test_scores_are_drawn_against_the_root_of_the_kl():
    rows = [{"step": i, "objective/scores": i / 10, "objective/kl": (i / 4) ** 2} for i in range(8)]
    (((roots, scores), _),) = curves(draw_against_kl([Run("a", rows), A])).values()
    assert roots == [i / 4 for i in range(8)] and scores == [i / 10 for i in range(8)]
    (((roots, scores),),) = curves(draw_against_kl([Run("a", rows)], parts=4)).values()
    assert scores == pytest.approx([0.05, 0.25, 0.45, 0.65])
    policy = {"score": {"mean": 2.0, "standard_error": 0.5}, "kl": {"mean": 9.0}, "name": "p"}
    start = {"score": {"mean": 1.0, "standard_error": None}, "kl": {"mean": -1e-6}, "name": "sft"}
    (panel,) = draw_policies({"gold": [start, policy]}).axes
    assert [text.get_text() for text in panel.texts] == ["p", "sft"]
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[0, 1]], [[3, 2]]]
    assert panel.collections[1].get_segments()[0].tolist() == [[3, 1.5], [3, 2.5]]


def test_the_frontier_joins_the_policies_on_it():
    points = [("a", 0.2, 0.9, True), ("b", 0.9, 0.1, True), ("c", 0.1, 0.1, False)]
    names = ("name", "harmlessness", "helpfulness", "on_frontier")
    (panel,) = draw_frontier({"points": [dict(zip(names, point)) for point in points]}).axes
    *_, step = [line.get_xydata().tolist() for line in panel.lines]
    assert step == [[0.2, 0.9], [0.9, 0.1]]
    assert [text.get_text() for text in panel.texts] == ["c", "b", "a"]
    close = [dict(zip(names, (name, x, 0.5, True))) for name, x in zip("def", (0.5, 0.501, 1))]
    assert [text.get_text() for text in draw_frontier({"points": close}).axes[0].texts] == [
        "f",
        "e",
    ]
