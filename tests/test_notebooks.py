"""The notebooks' anatomy, and that their defaults are the smoke study."""

import ast
import re
import statistics

import nbformat
import papermill
import pytest

from lib.study import params, paths

NOTEBOOKS = [paths.NOTEBOOKS / f"{name}.ipynb" for name in params.NOTEBOOKS]
FREE = [paths.NOTEBOOKS / "08_your_pipeline.ipynb", paths.NOTEBOOKS / "plan_from_scratch.ipynb"]
"""Those that belong to no study."""


def read(path):
    return nbformat.read(path, nbformat.NO_CONVERT)


def test_there_is_one_notebook_for_each_dataclass_and_those_of_no_study():
    assert sorted(paths.NOTEBOOKS.glob("*.ipynb")) == NOTEBOOKS + FREE


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", FREE, ids=lambda path: path.stem)
def test_a_notebook_of_no_study_is_clean(path):
    cells = code(path)
    assert not any(cell.outputs for cell in cells)
    assert not any(re.search(r"(?m)^\s*[!%]|pip install|sys\.path|os\.chdir", cell.source) for cell in cells)
    assert "## Exercises" in read(path).cells[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestEach:
    def test_begins_with_title_question_reads_and_writes(self, path):
        first = read(path).cells[0].source
        assert first.startswith(f"# {path.stem[:2]} - ")
        assert "**Question:**" in first and "| Reads | Writes" in first and f"/{path.stem}/`" in first

    def test_has_one_parameters_cell_of_commented_scalars_bound_by_the_next(self, path):
        cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
        assert ["parameters" in cell.metadata.get("tags", []) for cell in cells] == [True] + [False] * (len(cells) - 1)
        assert all(re.fullmatch(r"\w+ = [^#]+  # .+", line) for line in cells[0].source.splitlines())
        assert f"p = {params.NOTEBOOKS[path.stem].__name__}.bind(globals())" in cells[1].source
        assert f'Stage("{path.stem}", p)' in cells[1].source

    def test_its_defaults_are_the_smoke_study(self, path):
        found = {name: eval(field["default"], {}) for name, field in papermill.inspect_notebook(path).items()}
        assert params.NOTEBOOKS[path.stem](**found) == params.load("smoke")[path.stem]

    def test_installs_nothing(self, path):
        for cell in code(path):
            assert not re.search(r"(?m)^\s*[!%]|pip install|sys\.path|os\.chdir", cell.source)

    def test_gives_no_parameters_name_to_another_thing(self, path):
        """Else the cell that binds them could not be run again."""
        first, *cells = code(path)
        names = {line.partition(" = ")[0] for line in first.source.splitlines()}
        for statement in (part for cell in cells for part in ast.parse(cell.source).body):
            if isinstance(statement, ast.Assign | ast.AugAssign | ast.For | ast.With):
                targets = [statement.target] if hasattr(statement, "target") else getattr(statement, "targets", [])
                stored = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
                assert not stored & names, ast.unparse(statement)[:80]

    def test_ends_its_stage_and_sets_exercises(self, path):
        cells = read(path).cells
        assert any("stage.finish(" in cell.source for cell in cells)
        assert "## Exercises" in cells[-1].source and "## Where this stops being true" in cells[-1].source

    def test_keeps_outputs_only_where_they_are_checked(self, path):
        for cell in read(path).cells:
            if cell.cell_type == "code":
                assert bool(cell.outputs) == ("NBVAL_CHECK_OUTPUT" in cell.source), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS + FREE, ids=lambda path: path.stem)
def test_cells_are_short_and_stand_in_prose(path):
    """A parameter is a line; else cells have 5 lines, 15 at most; never three in a row without a word between."""
    cells = [cell for cell in code(path) if "parameters" not in cell.metadata.get("tags", [])]
    lengths = [len(cell.source.splitlines()) for cell in cells]
    assert statistics.median(lengths) <= 5 and max(lengths) <= 15
    assert max(len(line) for cell in code(path) for line in cell.source.splitlines()) <= 120
    kinds = "".join(cell.cell_type[0] for cell in read(path).cells)
    assert "ccc" not in kinds


@pytest.mark.parametrize("path", NOTEBOOKS + FREE, ids=lambda path: path.stem)
def test_names_say_what_a_thing_is(path):
    vague = {"one", "way", "beside", "own", "whole", "made"}
    for node in (node for cell in code(path) for node in ast.walk(ast.parse(cell.source))):
        name = node.id if isinstance(node, ast.Name) else getattr(node, "arg", None) or getattr(node, "name", None)
        assert name not in vague or isinstance(node, ast.keyword), ast.unparse(node)


def test_the_table_of_notebooks_lists_all():
    table = (paths.NOTEBOOKS / "README.md").read_text()
    for path in NOTEBOOKS + FREE:
        assert f"[{path.stem}]({path.name})" in table
