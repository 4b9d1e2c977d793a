"""Figures draw what there is, also where scores are at the floor."""

from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from lib.grid.plan import COMPUTE, HOLD, LINE, PARABOLA, Plan
from lib.study import figures
from lib.study.figures import drawings, pruning, schedules, students


def rows(**columns):
    table = pd.DataFrame({"name": ["a", "b", "c"], "family": ["DDIM, uniform", "DDIM, uniform", "line"],
                          "macs_ratio": [1.0, 2.0, 4.0], "honest_factor": [0.5, 1.0, 2.0], **columns})
    for name in columns:
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.3, table[name] + 0.3
    return table


@pytest.mark.parametrize("ratios", [[1.0, 1.5, 2.5], [np.nan] * 3, [1.0, 1.5, np.nan]])
def test_the_front_draws_scores_where_there_are_no_ratios(ratios):
    figure = figures.front(rows(ratio=ratios, score=[-0.1, 0.1, 3.0]))
    axes, = figure.axes
    floor = np.isnan(ratios).any()
    assert ("floor" in figure.get_supylabel()) == floor
    assert axes.get_yscale() == ("symlog" if floor else "log")
    heights = [float(y) for container in axes.containers for y in container.lines[0].get_ydata()]
    assert sorted(heights) == sorted([-0.1, 0.1, 3.0] if floor else ratios)
    figure.canvas.draw()


def test_a_panel_of_the_front_holds_few_families_and_none_is_lost():
    flexiffusion = [f"Flexiffusion, {k}" for k in range(8)]
    families = ["DDIM, uniform", "DPM-Solver++, uniform", "DDIM, quadratic", "searched steps", "teacher, longer",
                "columns (one gate a step)",
                *flexiffusion, "DiP-GO", "DiffNAS", "shortest path", "shortest path (student)",
                "random cells (student)"]
    table = pd.concat([rows(ratio=[1.0, 1.5, 2.5], score=[1.0, 2.0, 3.0]).assign(family=family) for family in families])
    figure = figures.front(table)
    panels = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert panels == [flexiffusion[:6], [*flexiffusion[6:], "DiP-GO", "DiffNAS"],
                      ["searched steps", "columns (one gate a step)", "shortest path", "DDIM, quadratic",
                       "teacher, longer"], ["shortest path (student)", "random cells (student)"]]
    assert figures._panels(["Flexiffusion", "DiP-GO", "TaylorSeer"]) == [["Flexiffusion", "DiP-GO"], ["TaylorSeer"]]
    assert all(len(axes.containers) == len(panel) + 2 for axes, panel in zip(figure.axes, panels))
    figure.canvas.draw()


def test_marks_of_equal_cost_stand_side_by_side():
    table = pd.concat([rows(ratio=[1.0, 1.5, 2.0], score=[1.0, 2.0, 3.0]).assign(family=family)
                       for family in ("DDIM, uniform", "DiffNAS", "Flexiffusion", "DiP-GO")])
    axes, = figures.front(table).axes
    places = {container.get_label(): container.lines[0].get_xdata() for container in axes.containers}
    assert np.allclose(places.pop("_DDIM, uniform"), [1, 2, 4]), "lines through all panels stay"
    for place, of_three in zip((1, 2, 4), zip(*places.values())):
        assert np.allclose(sorted(np.divide(of_three, place)), [1 / 1.05, 1, 1.05])


@pytest.mark.parametrize("ratios", [[1.0, 1.5, 2.5], [np.nan] * 3, [1.0, 1.5, np.nan]])
def test_five_curves_and_what_reuse_is_worth_are_drawn_at_the_floor_too(ratios):
    table = rows(ratio=ratios, ddim_ratio=ratios, nearness=[0.8, 1.0, 1.2], score=[-0.1, 0.1, 3.0]).assign(
        order=[1, 2, 2], branch=0, reuse=["hold", "hold", "line"], calls=[5, 5, 9], macs_percent=[10, 20, 30])
    floor = np.isnan(ratios).any()
    curves = figures.curves(table)
    assert ("floor" in curves.axes[0].get_ylabel()) == floor
    reuse = figures.forecasts(table.assign(family=["hold", "hold", "line"]), "ratio")
    assert ("floor" in reuse.axes[0].get_ylabel()) == floor
    dividends = schedules.dividends(table)
    assert dividends.axes[0].get_ylabel().startswith("distance" if floor else "score")
    assert dividends.axes[0].get_xlabel() == "executed MACs (in full steps)", "of two network calls under guidance"
    for figure in (curves, reuse, dividends):
        figure.canvas.draw()


def test_a_block_s_shares_of_macs_and_of_time_are_written_above_its_bars():
    table = pd.DataFrame({"block": ["mid", "stem and head"], "macs": [3, 1], "seconds": [0.01, 0.09]})
    figure = figures.macs_and_seconds(table)
    assert [text.get_text() for text in figure.axes[0].texts] == ["75.0", "25.0", "10.0", "90.0"]
    figure.canvas.draw()


def test_a_control_s_label_says_of_which_solver_its_steps_are():
    """In the panel of DDIM, too, searched steps are of DPM-Solver++."""
    table = rows(ratio=[1.0, 1.5, 2.5], score=[1.0, 2.0, 3.0]).assign(
        family=["hold", "evenly spaced", "searched steps"], order=1, macs_percent=[10, 20, 30])
    labels = figures.forecasts(table, "ratio").legends[0].get_texts()
    assert [label.get_text() for label in labels] == ["hold", "evenly spaced (the panel's solver)",
                                                      "searched steps (DPM-Solver++)"]


def test_steps_that_a_plan_s_coarser_walk_leaves_out_are_white_in_its_map(teacher):
    """They are named in the legend; where the plan walks all of the teacher's steps, there is no such entry."""
    for plan, words in ((teacher, ["holds", "computes"]),
                        (Plan.few_steps(3, "uniform", teacher), ["left out", "holds", "computes"])):
        axes, = figures.plan_map(plan).axes
        assert [word.get_text() for word in axes.get_legend().texts] == words
        cells = np.ma.masked_invalid(axes.collections[0].get_array().reshape(len(plan.blocks), -1))
        assert (~np.ma.getmaskarray(cells)).all(axis=0).sum() == plan.steps


def test_a_step_between_the_teacher_s_is_drawn_at_the_nearest(teacher):
    """The axis says so."""
    first, second, *_ = teacher.timesteps
    plan = teacher.at([first, second + 1])
    axes, = figures.step_kinds({"plan": plan}).axes
    assert list(axes.collections[0].get_array().ravel()) == [2, 2] + [0] * (teacher.steps - 2)
    assert "others at the nearest" in axes.get_xlabel()


def test_of_each_way_the_curve_takes_the_best_at_each_cost():
    table = rows(ddim_ratio=[1.0, 3.0, 2.0]).assign(family="DDIM, uniform", macs_ratio=[1.0, 4.0, 4.04])
    axes, = figures.curves(table).axes
    line, *_ = axes.containers[0].lines
    assert list(line.get_xdata()) == [1.0, 4.04]
    assert [(bars.lines[0].get_linestyle() == "-", "steps" in bars.get_label()) for bars in axes.containers] == 3 * [
        (True, True)] + 2 * [(False, False)], "plans of methods have nothing between them"
    assert any(set(reference.get_ydata()) == {1} for reference in axes.lines), "DDIM's full run"


def test_an_axis_that_is_linear_about_0_says_where_and_its_ticks_do_not_touch():
    axes = figures.front(rows(ratio=[np.nan] * 3, score=[-0.1, 0.1, 30.0])).axes[0]
    dotted, = (line for line in axes.lines if line.get_linestyle() == ":")
    linear = dotted.get_ydata()[0]
    assert linear == pytest.approx(0.2), "the least upper end of an interval"
    ticks = [float(tick) for tick in axes.yaxis.get_major_locator()()]
    assert all(tick == 0 or abs(tick) >= linear for tick in ticks) and {0, 1, 10} <= set(ticks)


def test_the_progress_of_a_search_says_where_the_known_schedules_end():
    found = pd.DataFrame({"trial": range(4), "macs_fraction": 0.5, "error": [3.0, 2.0, 2.5, 1.0], "partial_steps": 0,
                          "start": [True, True, False, False]})
    right = schedules.search_progress(found, [0.5], "mine").axes[1]
    dotted, = (line for line in right.lines if line.get_linestyle() == ":")
    assert list(dotted.get_xdata()) == [1.5, 1.5]


def test_equal_agreements_are_not_drawn_on_each_other():
    kinds = ["rfid", "rfid, shrunk", "paired", "score"]
    table = pd.DataFrame([{"space": "mine", "kind": kind, "images": images, "tau": 1.0, "tau_low": 0.8, "tau_high": 1.0,
                           "plans": 5} for kind in kinds for images in (20, 50)])
    figure = schedules.rank_agreement(table, 100)
    lines = figure.axes[0].lines[:len(kinds)]
    assert [line.get_label() for line in lines] == [*kinds[:3], "raw"]
    assert len({float(line.get_xdata()[0]) for line in lines}) == len({line.get_linestyle() for line in lines}) == 4
    assert all(abs(line.get_xdata()[1] / 50 - 1) < 0.05 for line in lines)
    figure.canvas.draw()


def test_a_row_without_a_ratio_says_its_word():
    table = rows(ratio=[1.0, np.nan, 2.0], ratio_difference=[0.0, 0.2, 1.0]).assign(ratio_word="as good")
    figure = figures.ratios(table, "ratio")
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "no ratio (a score is at the floor): as good, difference 0.2 [-0.1, 0.5]"]
    figure.canvas.draw()


def test_a_plan_beside_its_controls_is_coloured_by_the_word_and_its_strongest_control_is_framed():
    """A pair that was not compared stays blank, and one without a ratio says so."""
    words = ["better", "as good", "undecided", "worse", "worse"]
    table = pd.DataFrame({"plan": ["mine", "mine", "mine", "yours", "yours"], "name": ["a", "b", "c", "b", "c"],
                          "plan_over_control": [0.5, 1.0, 1.0, 2.0, np.nan], "plan_over_control_word": words,
                          "strongest": [False, True, False, False, True]})
    axes = figures.beside_controls(table).axes[0]
    mesh, = axes.collections
    colours = {word: tuple(np.round(to_rgba(figures.WORDS[word][0]), 3)) for word in words}
    drawn = np.round(mesh.to_rgba(mesh.get_array()).reshape(2, 3, 4), 3)
    cells = {(0, 0): "better", (0, 1): "as good", (0, 2): "undecided", (1, 1): "worse", (1, 2): "worse"}
    assert {place: tuple(drawn[place]) for place in cells} == {place: colours[word] for place, word in cells.items()}
    assert bool(mesh.get_array().reshape(2, 3).mask[1, 0])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0.5, 0.5): "0.5", (1.5, 0.5): "1", (2.5, 0.5): "1", (1.5, 1.5): "2", (2.5, 1.5): "floor"}
    assert {patch.get_xy() for patch in axes.patches} == {(1, 0), (2, 1)}


def test_both_judges_words_are_drawn_at_the_floor_too():
    figure = figures.judges(rows(score=[-0.1, 0.2, 3.0], second_score=[0.5, 1.0, 4.0]))
    axes, = figure.axes
    points = {(float(x), float(y)) for container in axes.containers for x, y in zip(*container.lines[0].get_data())}
    assert points == {(-0.1, 0.5), (0.2, 1.0), (3.0, 4.0)}
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
    figure.canvas.draw()


def test_a_drawn_step_reads_what_computes_and_the_backups_that_computing_cells_need(teacher, described):
    """DeepCache's partial step: the last block reads its neighbour's held output, and no other is drawn."""
    states = np.array(Plan.deepcache(2, described.branch(0), teacher).computes[:2], dtype=int)
    reads = sum(len([name for name in block.reads if name in described.names]) for block in described)
    cached, supernet = (drawings.wiring(described, *given).axes[0] for given in ((states,), (None, 2)))
    assert len(cached.patches) == reads + 1 + 1
    assert len(supernet.patches) == 2 * reads + len(described)
    words = [[text.get_text() for text in axes.get_legend().texts] for axes in (cached, supernet)]
    assert words == [["reads", "held output (cache)"], ["reads", "backup"]]


def test_a_drawn_forecast_is_the_curve_through_the_last_outputs():
    places, computed = np.arange(9.0), [0, 2, 4, 6]
    values = places**2
    lines = defaultdict(list)
    for line in drawings.forecast(places, values, computed).axes[0].lines:
        lines[line.get_color()].append(line.get_ydata())
    last = {state: lines[figures.STATES[state][1]][-1] for state in (HOLD, LINE, PARABOLA)}
    assert np.allclose(last[HOLD], 36) and np.allclose(last[LINE], [36, 46, 56])
    assert np.allclose(last[PARABOLA], [36, 49, 64])
    assert len(lines[figures.STATES[COMPUTE][1]][0]) == len(computed)


def test_segments_and_an_elastic_block_are_drawn_with_their_words(teacher, described):
    axes = drawings.segments(teacher, 3, ["one", "two", "three"]).axes[0]
    places = {text.get_text(): text.xy[0] for text in axes.texts}
    length = -(-teacher.steps // 3)
    assert places["one"] == (length - 1) / 2 and places["two"] == length + (length - 1) / 2
    assert places["three"] == (2 * length + teacher.steps - 1) / 2
    axes = drawings.elastic_block([1, 3], [8, 16], (3, 1, 8)).axes[0]
    words = [text.get_text() for text in axes.texts]
    assert {"$h$", "$+ e(t)$", "kernel of $W_1$", "kernel of $W_2$"} <= set(words), "the formula's letters"
    assert words.count("1 x 1") == words.count("3 x 3") == 2 and {"8", "16"} <= set(words)
    green = {(patch.get_x(), patch.get_y(), patch.get_height()) for patch in axes.patches
             if patch.get_facecolor()[:3] == figures.COLOURS["DiffNAS"]}
    (_, low, _), (_, _, width), (_, high, _) = sorted(green)
    assert low > high, "of the first convolution the larger kernel, of the second the smaller"
    assert width == max(patch.get_height() for patch in axes.patches) / 2, "and half of the channels"



def test_a_row_a_label_and_a_row_that_lacks_images_repeats_its_first():
    images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 1, 2, 2))
    axes, = figures.by_label(images, np.array([3, 0, 3, 3, 11]), columns=2).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "3"]
    drawn = np.asarray(axes.images[0].get_array())[::3, ::3]  # each image's first pixel
    np.testing.assert_allclose(drawn, [[0.25, 0.25], [0.0, 0.5]])
    with pytest.raises(ValueError):
        figures.by_label(images, np.full(5, 11))


def test_each_level_shows_the_loss_that_its_local_choice_may_have():
    losses = {"down0": 0.02, "mid": 0.3}
    tables = {level: pd.DataFrame({"macs": [1e6, 2e6], "loss": [5 * loss, loss]}) for level, loss in losses.items()}
    picks = pd.DataFrame([{"name": name, "level": level, "macs": 1e6, "loss": loss * times}
                          for name, times in (("reference", 1), ("local 50%", 2)) for level, loss in losses.items()])
    figure = students.trade(tables, picks, 3.0)
    for axes, loss in zip(figure.axes, losses.values()):
        limit, = (line for line in axes.lines if line.get_linestyle() == "--")
        assert list(limit.get_ydata()) == pytest.approx([3 * loss] * 2)
        assert limit.get_label() == "$s$ x reference ($s$ = 3.00)"
    figure.canvas.draw()


def test_trainings_of_one_kind_share_a_colour_and_a_name():
    history = pd.DataFrame([{"name": name, "training": seed, "step": step, "loss": 1 / step + 0.1 * seed}
                            for name in ("a", "b") for seed in (0, 1) for step in (1, 2)])
    axes, = students.curves(history, "loss").axes
    first, second = axes.lines[:2], axes.lines[2:]
    assert [len({line.get_color() for line in some}) for some in (first, second, axes.lines)] == [1, 1, 2]
    assert [float(line.get_ydata()[1]) for line in axes.lines] == [0.5, 0.6, 0.5, 0.6]
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]


def test_gradients_that_agree_nearly_alike_are_drawn_apart():
    columns = ["agreement, noise loss", "agreement, output distillation", "agreement, block losses"]
    table = pd.DataFrame({"level": ["down0", "mid"], "shortest way": [2, 5], "longest way": [8, 5],
                          **{column: [0.9, 0.91] for column in columns}})
    figure = students.gradient_ways(table)
    _, alike = figure.axes
    assert len({tuple(line.get_xdata()) for line in alike.lines}) == len(columns)
    assert alike.get_ylim()[0] > 0.8
    figure.canvas.draw()


def test_held_out_losses_have_a_label_at_every_tick():
    history = pd.DataFrame([{"name": "linear", "training": seed, "way": way, "loss": loss + 0.01 * seed}
                            for seed in (0, 1) for way, loss in ((0, 0.28), (0.5, 0.12), (1, 0.08))])
    figure = students.held_out(history)
    figure.canvas.draw()
    axes, = figure.axes
    assert not len(axes.yaxis.get_minorticklocs())
    assert {"0.08", "0.1", "0.2"} <= {label.get_text() for label in axes.get_yticklabels()}


def test_a_training_is_drawn_from_its_first_update():
    history = pd.DataFrame({"pruner": "DiP-GO", "update": range(3), "consistency": 0.1, "sparsity": 1.0, "kept": 1.0})
    lines = [line for axes in pruning.training(history).axes for line in axes.lines]
    assert len(lines) == 3 and all(list(line.get_xdata()) == [1, 2, 3] for line in lines)


def test_maps_of_gates_have_a_legend_and_maps_of_scores_a_colour_bar():
    gates, scores = np.eye(3, dtype=bool), np.linspace(0, 1, 9).reshape(3, 3)
    legend = pruning.maps({"a": gates, "b": ~gates}, list("xyz"), "gate")
    assert len(legend.axes) == 2
    words, patches = legend.axes[0].get_legend().texts, legend.axes[0].get_legend().get_patches()
    assert [word.get_text() for word in words] == ["gate 0: holds", "gate 1: computes"]
    assert [patch.get_facecolor()[:3] for patch in patches] == [pruning.GATES(end)[:3] for end in (0.0, 1.0)]
    bar = pruning.maps({"a": gates, "b": scores}, list("xyz"), "gate score")
    assert len(bar.axes) == 3 and bar.axes[0].get_legend() is None
    for figure in (legend, bar):
        figure.canvas.draw()
