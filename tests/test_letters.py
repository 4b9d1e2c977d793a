"""Letters: what is drawn is what the prompt says, and the same again."""

import pytest
import torch

from lib.grid import blocks, sampling
from lib.grid.plan import Plan, trailing
from lib.study import paths
from lib.teachers import data, letters, networks


def test_a_prompt_says_its_letter_and_is_read_back():
    rows = letters.every()
    said = [letters.prompt(row) for row in rows.tolist()]
    assert letters.prompt((17, 3, 2, 5)) == "a red bold serif R on yellow"
    assert len(set(said)) == len(rows) == 36 * 6 * 8 * 7
    assert [letters.read(one) for one in said[::97]] == [tuple(row) for row in rows[::97].tolist()]


@pytest.mark.parametrize("said", ["a red bold serif r on yellow", "a red serif R on red", "a pink serif R on red", ""])
def test_a_prompt_that_asks_for_no_letter_is_refused(said):
    with pytest.raises(ValueError, match="asks for no letter: say 'a INK STYLE CHARACTER on GROUND'"):
        letters.read(said)


def test_some_combinations_are_in_no_data_set_but_each_part_of_them_is():
    rows = letters.some(20_000)
    left_out = letters.every()[letters.unseen(letters.every())]
    assert not letters.unseen(rows).any() and len(left_out) == len(letters.every()) / 12
    assert set(map(tuple, left_out[:, [0, 2]].tolist())).isdisjoint(map(tuple, rows[:, [0, 2]].tolist()))
    for place in range(4):
        assert set(left_out[:, place].tolist()) <= set(rows[:, place].tolist())


def test_more_letters_begin_alike():
    few, many = (letters.draw(letters.some(count), 32) for count in (20, 1100))
    assert torch.equal(few, many[:20]) and few.shape == (20, 3, 32, 32) and few.min() >= -1 and few.max() <= 1
    assert not torch.equal(few, letters.draw(letters.some(20), 32, seed=1))


def test_a_letter_has_the_colours_that_its_prompt_says():
    rows = letters.every()[::31]
    images = (letters.draw(rows, 32) + 1) * 127.5
    paints = torch.tensor(list(letters.COLOURS.values())).float()
    edges = images[:, :, 0].mean(dim=2)
    assert torch.equal((edges[:, None] - paints).norm(dim=2).argmin(1), rows[:, 3]), "the ground"
    far = (images - edges[:, :, None, None]).norm(dim=1).flatten(1).argmax(1)
    strokes = images.flatten(2).gather(2, far[:, None, None].expand(-1, 3, 1))[:, :, 0]
    near = (strokes[:, None] - paints).norm(dim=2).argmin(1) == rows[:, 2]
    assert near.float().mean() > 0.97, "the ink, where the strokes are not too thin"


def test_no_letter_touches_the_edge_of_its_page():
    edges = list(letters._glyphs().unbind(3))[::letters.FINE - 1]
    assert not torch.stack(edges).any()
    assert len(torch.unique(letters._glyphs().flatten(0, 1), dim=0)) == 36 * 6, "all glyphs differ"


def test_letters_are_a_data_set():
    found = data.load("letters:700", 16, 0.25, 0)
    assert found.images.shape == (700, 3, 16, 16) and found.name == "letters:700"
    assert found.prompts[3] == letters.prompt([int(own[3]) for own in found.attributes.values()])
    assert torch.equal(found.labels, found.attributes["character"])
    assert data.digest("letters") != data.digest("letters:700") and data.letters_in("letters") == data.LETTERS
    with pytest.raises(ValueError, match="no data set 'letters:0'"):
        data.load("letters:0", 16, 0.25, 0)


def test_the_teacher_that_ships_draws_the_colours_it_is_asked_for():
    folder = paths.ROOT / "data" / "shipped" / "letters"
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 10e6
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors"}
    known = letters.every()[~letters.unseen(letters.every())]
    rows = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:24]]
    model = networks.load(folder, prompts=[letters.prompt(row) for row in rows.tolist()], guidance=3.0)
    names = blocks.describe(model.network).names
    plan = Plan.full(trailing(10, 1000), model.noise_schedule, names, 2)
    noise = sampling.noise("report", 0, 0, len(rows), model.shape)
    asked = torch.tensor([letters.read(said) for said in model.said(noise)])
    images = sampling.sample(model, plan, noise)
    corners = images[:, :, ::31, ::31].mean(dim=(2, 3))
    paints = torch.tensor(list(letters.COLOURS.values())) / 127.5 - 1
    grounds = torch.cdist(corners, paints.float()).argmin(dim=1)
    assert (grounds == asked[:, 3]).float().mean() >= 0.9
