"""Malformed plan and params files, some hundreds: each is refused with a message that names file and fault.

The messages, one a line, are left in data/smoke/refused.txt.
"""

import copy
import json

import pytest
import torch
from ruamel.yaml import YAML

from lib.grid import sampling
from lib.grid.plan import NoiseSchedule, Plan, PlanError, trailing
from lib.methods.diffnas import losses
from lib.methods.dipgo.learning import consistency
from lib.methods.dipgo.prices import Prices
from lib.methods.dipgo.pruners import Pruner
from lib.methods.search import search
from lib.study import params, paths
from lib.study.params import ParamsError
from lib.teachers import networks

WRONG = {int: [None, "many", 0.5, -1, [1], {}], float: [None, "much", [0.1], {}, float("nan")],
         str: [None, 5, ["one"], {}, "nonsense"], list: [None, 3, "all", {}, [None], [{}]]}
"""Values that no parameter of a type may have."""


def spoilt(content, place):
    """Give every way to spoil one entry of a nested dict: (what was done, the whole content, what must be named)."""
    *outer, name = place

    def changed(change):
        twin = copy.deepcopy(content)
        part = twin
        for key in outer:
            part = part[key]
        change(part)
        return twin

    value = content
    for key in place:
        value = value[key]
    where = ".".join(place)
    for wrong in WRONG.get(type(value), [None, 5, "all", [1]]):
        yield f"{where}: {wrong!r}", changed(lambda part, wrong=wrong: part.__setitem__(name, wrong)), name
    yield f"no {where}", changed(lambda part: part.pop(name)), name
    yield f"{where} misspelt", changed(lambda part: part.__setitem__(f"{name}x", part.pop(name))), name


def plans(path):
    """Give malformed plan files: (what was done, the text, what must be named)."""
    fits = NoiseSchedule.of(networks.noise_schedule())
    Plan.full(trailing(6, 1000), fits, ("a", "b", "c")).save(path)
    content, text = json.loads(path.read_text()), path.read_text()
    free = ("provenance", "grid", "version", "cache", "final_sigma", "solver", "passes", "null_holds",
            "abscissa")  # a plan without them may be one
    for place in [(name,) for name in content] + [("schedule", name) for name in content["schedule"]]:
        for what, twin, named in spoilt(content, place):
            if not (place[0] in free and what.startswith("no ")) and what != "schedule.beta_schedule: 'nonsense'":
                yield what, json.dumps(twin), "" if "misspelt" in what or what.startswith("no ") else named
    for length in range(0, len(text) - 2, len(text) // 40):
        yield f"cut after {length} characters", text[:length], "cannot be read as JSON"


def studies():
    """Give malformed params files: (what was done, the content, what must be named).

    The first parameter of each type in a section takes all wrong values, of the others each one, by turns.
    """
    text = (paths.PARAMS / "smoke.yaml").read_text()
    content = YAML(typ="safe", pure=True).load(text)
    seen = set()
    for turn, place in enumerate((section, name) for section, values in content.items() for name in values):
        *wrong, missing, misspelt = spoilt(content, place)
        kind = place[0], type(content[place[0]][place[1]])
        yield from (wrong if kind not in seen else (wrong[turn % len(wrong)],))
        yield from (missing, misspelt)
        seen.add(kind)
    for section in content:
        yield from spoilt(content, (section,))


@pytest.fixture(scope="module")
def refused():
    """Collect the messages of all tests here, and write them down."""
    messages = []
    yield messages
    listing = paths.writable(paths.DATA / "smoke") / "refused.txt"
    listing.write_text("\n".join(messages) + "\n")


def test_malformed_plans_are_refused(tmp_path, refused):
    path, count = tmp_path / "plan.json", 0
    for what, text, named in list(plans(path)):
        path.write_text(text)
        with pytest.raises(PlanError) as error:
            Plan.load(path)
            pytest.fail(what)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and named in message, what
        refused.append(f"plan.json, {what} -> {message.removeprefix(f'{path}: ')}")
        count += 1
    assert count >= 100


def test_malformed_params_are_refused(tmp_path, refused, monkeypatch):
    cases, count = list(studies()), 0
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    for what, twin, named in cases:
        (tmp_path / "mine.yaml").write_text(json.dumps(twin).replace("NaN", ".nan"))  # YAML holds JSON
        with pytest.raises(ParamsError) as error:
            params.load("mine")
            pytest.fail(what)
        message = str(error.value)
        assert message.startswith("params/mine.yaml") and named in message, what
        refused.append(f"params/mine.yaml, {what} -> {message.removeprefix('params/mine.yaml')}")
        count += 1
    assert count >= 300


@pytest.mark.parametrize(("call", "message"), [
    (lambda: sampling.autocast(torch.device("cpu"), "bfloat16"), "precision 'bfloat16': must be one of fp32, bf16"),
    (lambda: consistency(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), "mse"), "loss 'mse': must be one of ssim"),
    (lambda: Pruner("mlp", 2, 2), "pruner 'mlp': must be one of table, queries, encoder"),
    (lambda: Prices.weights(None, "dynamic", None), "weights 'dynamic': must be one of static, marginal, none"),
    (lambda: search(None, None, None, trials=1, population=2, seed=0, storage="", method="tpe"),
     "method 'tpe': must be one of nsga2, mutation, random"),
    (lambda: losses.joint_loss(None, None, None, None, None, 1.0, target="student"),
     "target 'student': must be noise or teacher")])
def test_an_unknown_word_is_refused_not_taken_for_another(call, message):
    with pytest.raises(ValueError, match=message):
        call()
