"""The house: four wings and two doors, and arrows that point one way (the wings' own words say which)."""

import ast

import pytest

from lib.study import paths

LIB = paths.ROOT / "lib"
MAY = {"grid": set(), "teachers": {"grid"}, "judging": {"grid", "teachers"}, "methods": {"grid", "teachers", "judging"},
       "study": {"grid", "teachers", "judging", "methods"}}
"""Whom each wing may import, beside itself."""
METHODS = {"flexiffusion", "dipgo", "diffnas", "learned"}
"""The methods that do not know each other."""
FILES = sorted(LIB.rglob("*.py"))


def imported(path):
    """The modules of lib that a file imports, inside functions too, as tuples of their parts."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            found |= {(*node.module.split("."), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names if alias.name.split(".")[0] == "lib"}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
    return {parts[1:] for parts in found}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LIB)))
def test_arrows_point_one_way(path):
    wing, *inner = path.relative_to(LIB).with_suffix("").parts
    if wing not in MAY:
        return  # the doors, for people with a pipeline of their own
    for other, *rest in imported(path):
        assert other == wing or other in MAY[wing], f"{wing} may not import lib.{other}"
        if wing == other == "methods":
            own, theirs = inner[0], rest[0]
            assert own in (theirs, "compose") or not {own, theirs} <= METHODS, f"{own} may not know {theirs}"
            assert own != "search", "search knows the grid alone"
    assert wing != "methods" or inner[0] != "search" or {other for other, *_ in imported(path)} <= {"grid"}


def test_top_level_holds_wings_and_doors():
    assert {path.name for path in LIB.iterdir() if path.name != "__pycache__"} - {"fit.py"} == {
        "README.md", "__init__.py", "_torchvision.py", "apply.py", *MAY}


@pytest.mark.parametrize("wing", MAY)
def test_a_wing_says_in_words_alone_what_lives_there(wing):
    body = ast.parse((LIB / wing / "__init__.py").read_text()).body
    assert len(body) == 1 and len(ast.get_docstring(ast.Module(body, [])).splitlines()) <= 3
