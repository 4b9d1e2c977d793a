"""The project's folders, one constant each, and a check that a folder can be written to."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"
DATA = ROOT / "data"
REPORTS = ROOT / "reports"


def writable(folder: Path) -> Path:
    """Make `folder` and return it.

    Raises
    ------
    PermissionError
        If it cannot be made or written to: before any work is done that would be lost.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"cannot make the folder {folder}: {error.strerror}. Choose another place or mend its "
                              "permissions.") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the folder {folder} is not writable. Mend its permissions (chmod u+w) and run again.")
    return folder
