"""Plans: constructors, files, and what is refused."""

import itertools
import json
import re

import numpy as np
import pytest
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from lib.grid.plan import SPACINGS, BetaSchedule, NoiseSchedule, Plan, PlanError, trailing
from lib.teachers import networks

SCHEDULE = BetaSchedule(train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                        prediction="epsilon")
BLOCKS = ("a", "b", "c", "d")


def full(steps: int = 12, order: int = 1) -> Plan:
    return Plan.full(trailing(steps, 1000), SCHEDULE, BLOCKS, order)


@st.composite
def plans(draw):
    timesteps = sorted(draw(st.sets(st.integers(0, 999), min_size=1, max_size=8)), reverse=True)
    blocks = draw(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True))
    cells = np.array(draw(st.lists(st.lists(st.booleans(), min_size=len(blocks), max_size=len(blocks)),
                                   min_size=len(timesteps), max_size=len(timesteps))), dtype=bool)
    cells[0] = True
    return Plan.full(timesteps, SCHEDULE, blocks, draw(st.sampled_from([1, 2]))).with_cells(cells, note="drawn")


@given(plans())
def test_a_saved_plan_comes_back_the_same(tmp_path_factory, plan):
    path = tmp_path_factory.getbasetemp() / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.load(path).key == plan.key


def test_the_key_tells_images_apart_and_ignores_provenance():
    plan = full()
    assert plan.with_cells(plan.computes, note="other").key == plan.key
    assert full(order=2).key != plan.key
    cells = plan.computes
    cells[3, 1] = False
    assert plan.with_cells(cells).key != plan.key


@given(st.integers(1, 1000), st.sampled_from(sorted(SPACINGS)))
def test_spacings_fall_strictly_from_pure_noise(steps, spacing):
    timesteps = SPACINGS[spacing](steps, 1000)
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert all(a > b for a, b in itertools.pairwise(timesteps))


def test_trailing_spacing_is_that_of_diffusers():
    for steps in (3, 7, 10, 50):
        scheduler = DDIMScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        assert tuple(scheduler.timesteps.tolist()) == trailing(steps, 1000)


@pytest.mark.parametrize("option", [{"clip_sample": True}, {"trained_betas": [0.1] * 1000},
                                    {"rescale_betas_zero_snr": True}, {"thresholding": True}])
def test_a_schedule_that_a_plan_cannot_describe_is_refused(option):
    scheduler = DDIMScheduler.from_config(networks.noise_schedule().config, **option)
    with pytest.raises(PlanError, match=f"the noise schedule has {next(iter(option))}=.* which plans do not know"):
        NoiseSchedule.of(scheduler)


def test_segments_with_all_steps_active_are_deepcache():
    shallow = np.array([False, False, True, True])
    teacher = full(12)
    assert Plan.segments([(4, shallow)] * 3, teacher).key == Plan.deepcache(4, shallow, teacher).key


def test_segments_with_one_active_step_are_fewer_steps():
    shallow = np.array([False, False, True, True])
    teacher = full(12)
    for count in (1, 2, 3, 4, 6, 12):
        assert Plan.segments([(1, shallow)] * count, teacher).key == Plan.few_steps(count, "uniform", teacher).key


def test_the_last_segment_may_be_shorter():
    shallow = np.zeros(4, dtype=bool)
    plan = Plan.segments([(3, shallow)] * 4, full(10))  # 3 + 3 + 3 + 1
    assert plan.steps == 10
    assert plan.computes.all(axis=1).tolist() == [True, False, False] * 3 + [True]


def test_a_higher_random_keep_keeps_a_superset():
    low, high = Plan.random(0.3, 5, full()).computes, Plan.random(0.7, 5, full()).computes
    assert (low <= high).all() and low.sum() < high.sum()


@pytest.mark.parametrize(("make", "fault"), [
    (lambda: Plan.deepcache(0, np.ones(4), full()), "interval: must be at least 1"),
    (lambda: Plan.from_gates(np.ones((3, 4)), full()), r"gates: shape \(3, 4\), must be \(12, 4\)"),
    (lambda: Plan.segments([(5, np.ones(4))] * 3, full()), "segment 0 has 5 active steps, must be 1..4"),
    (lambda: Plan.segments([(1, np.ones(4))] * 9, full()), "do not fit 12 steps"),
    (lambda: Plan.few_steps(0, "uniform", full()), "steps: must be 1..1000"),
    (lambda: full().with_cells(np.zeros((12, 4))), "the first step must compute every block"),
    (lambda: full().check_fits(("a", "b", "x", "d"), SCHEDULE), "another network: .* differ in c, x"),
    (lambda: full().check_fits(("a", "c", "b", "d"), SCHEDULE), "differ in their order"),
    (lambda: full().check_fits(BLOCKS, SCHEDULE.model_copy(update={"beta_end": 0.03})),
     "another noise schedule: beta_end is 0.02, the model's is 0.03"),
])
def test_what_does_not_make_a_plan_is_refused(make, fault):
    with pytest.raises(PlanError, match=fault):
        make()


def change(**values):
    return lambda content: content | values


@pytest.mark.parametrize(("spoil", "fault"), [
    (lambda c: json.dumps(c)[:100], "cannot be read as JSON"),
    (lambda c: "", "cannot be read as JSON"),
    (lambda c: json.dumps(c)[:-1] + ', "order": 1}', "'order' stands there twice"),
    (lambda c: [1, 2], "holds a list, not a plan"),
    (change(version=3), "written by a newer version .* Update the project"),
    (change(version="1"), "version"),
    (change(order=4), r"order: dpmsolver\+\+ has orders up to 3"),
    (change(order=0), "order: Input should be greater than or equal to 1"),
    (change(order="1"), "order"),
    (change(solver="ddpm"), "solver: Input should be 'ddim', 'dpmsolver"),
    (change(timesteps=[999, 999, *list(range(9, -1, -1))]), "timesteps: must fall strictly"),
    (change(timesteps=list(range(12))), "timesteps: must fall strictly"),
    (change(timesteps=[1500, *list(range(10, -1, -1))]), r"timesteps: must lie in 0\.\.999"),
    (change(timesteps=[999.5, *list(range(10, -1, -1))]), r"timesteps: must lie in 0\.\.999"),
    (change(timesteps=[float("nan"), *list(range(10, -1, -1))]), "timesteps.0: Input should be a finite number"),
    (change(timesteps=[10 ** 400, *list(range(10, -1, -1))]), "timesteps.0: Input should be a "),
    (change(passes=[1], cells={"1": ["1111"] * 12}, net={"1": "1" * 12}), "does not hold a plan"),
    (change(self=1), "self: Extra inputs are not permitted"),
    (change(version=1, compute=[], blocks=[]), "does not hold a plan"),
    (change(version=1, compute=["1" * 4] * 12, blocks=[1, 2, 3, 4]), "does not hold a plan"),
    (change(solver="learned", order=1, table={"quantity": "data", "a": [float("nan")] * 12, "b": [[1.0]] * 12}),
     "table.a"),
    (change(solver="learned", order=1, table={"quantity": "data", "a": [1.0] * 12, "b": [[]] * 12}), "table.b"),
    (change(timesteps=[]), "timesteps"),
    (change(timesteps="999"), "timesteps: Input should be a valid tuple"),
    (change(grid=[]), "grid"),
    (change(blocks=["a", "b", "c", "a"]), "blocks: a name stands twice"),
    (change(blocks=["a", "b", "c"]), "row 0 has 4 cells for 3 blocks"),
    (change(cells={"given": ["1111"] * 11}), "11 rows for 12 timesteps"),
    (change(cells={"given": ["1141"] * 12}), "each step must be a string of 0 and 1, 2 and 3"),
    (change(cells={"given": ["111-"] * 12}), "each step must be a string of 0 and 1, 2 and 3"),
    (change(cells={"given": [[True] * 4] * 12}), "each step must be a string of 0 and 1"),
    (change(cells=["1111"] * 12), "must have an entry for each of the passes"),
    (change(cells={"given": ["0111"] + ["1111"] * 11}), "the first step must compute every block"),
    (change(net={"given": "0" + "1" * 11}), "the first step must compute every block"),
    (change(net={"given": "1" * 11 + "-"}), "the given pass cannot be dropped"),
    (change(passes=["null"]), "must have an entry for each of the passes"),
    (change(abscissa="time"), "abscissa: Input should be 'log_snr', 'timestep' or 'step'"),
    (change(solver="learned"), "table: goes with solver learned"),
    (change(solver="pndm"), "pndm walks the second timestep twice"),
    (change(schedule={"train_timesteps": 1000}), r"schedule\.beta_start: Field required"),
    (change(schedule=None), "schedule"),
    (change(cache="input"), "cache: Input should be 'output' or 'residual'"),
    (change(speed=3), "speed: Extra inputs are not permitted"),
    (lambda c: {k: v for k, v in c.items() if k != "order"}, "order: Field required"),
])
def test_a_spoilt_file_is_refused_with_its_name_and_fault(tmp_path, spoil, fault):
    path = tmp_path / "plan.json"
    full().save(path)
    spoilt = spoil(json.loads(path.read_text()))
    path.write_text(spoilt if isinstance(spoilt, str) else json.dumps(spoilt))
    with pytest.raises(PlanError, match=f"{re.escape(str(path))}: .*{fault}"):
        Plan.load(path)


def test_a_plan_of_version_1_means_what_it_meant(tmp_path):
    """Its columns of nothing but reused cells called no network; where blocks cache residuals they did."""
    path, old = tmp_path / "plan.json", full().model_dump(mode="json", exclude={"states", "net", "passes", "table",
                                                                                 "null_holds", "abscissa"})
    rows = ["1111", "0111", "0000", "1110", "1000", "0001"] * 2
    for cache, net in (("output", "110101"), ("residual", "111111")):
        path.write_text(json.dumps(old | {"version": 1, "compute": rows, "cache": cache}))
        plan = Plan.load(path)
        assert ["".join("01"[cell] for cell in row) for row in plan.states[0]] == rows
        assert "".join(map(str, plan.net[0]))[:6] == net
    path.write_text(json.dumps(old | {"version": 1, "compute": ["1112"] * 12}))
    with pytest.raises(PlanError, match="each step must be a string of 0 and 1"):
        Plan.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match="no such file"):
        Plan.load(tmp_path / "none.json")
