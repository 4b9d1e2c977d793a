"""Files that a kill leaves whole."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lib.grid import saving


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    numbers, tensors = tmp_path / "numbers.json", tmp_path / "tensors.safetensors"
    saving.write_json(numbers, {"b": 1, "a": [2.5]})
    saving.write_tensors(tensors, {"x": torch.arange(6).reshape(2, 3).T})
    assert numbers.read_text() == '{\n "a": [\n  2.5\n ],\n "b": 1\n}\n', "the same bytes for the same content"
    with pytest.raises(ValueError, match="not JSON compliant"):
        saving.write_json(numbers, {"a": float("nan")})

    def killed(_, partial, __):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        saving.write_tensors(tensors, {"x": torch.zeros(1)})
    assert json.loads(numbers.read_text()) == {"a": [2.5], "b": 1}
    assert torch.equal(load_file(tensors)["x"], torch.arange(6).reshape(2, 3).T)


def test_infinity_is_written_where_it_is_allowed(tmp_path):
    saving.write_json(tmp_path / "far.json", {"a": float("inf")}, allow_nan=True)
    assert json.loads((tmp_path / "far.json").read_text()) == {"a": float("inf")}
