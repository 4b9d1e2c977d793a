"""Writing files so that a kill leaves the old or the new one, never a part; several processes may write the same."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_json(path: Path, content: Any, allow_nan: bool = False) -> None:
    """Write JSON that has the same bytes for the same content; NaN and infinity are refused unless they are allowed."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=allow_nan) + "\n"
    _whole(path, lambda partial: partial.write_text(text))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _whole(path, lambda partial: save_file(contiguous, partial, metadata))


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    write(partial)
    partial.replace(path)
