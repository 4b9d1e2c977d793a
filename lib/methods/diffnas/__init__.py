"""DiffNAS (arXiv 2311.04950): smaller residual blocks, searched level by level against the teacher's features.

A residual block may have other kernels and another middle width; what it reads and gives keeps the teacher's shape. So
each level (a resolution going down or up, the middle) can be trained and judged alone: teacher features in, teacher
features out. A `Student` is a diffusers model of such blocks, and `supernet` holds all of them in one set of weights.
"""

from lib.methods.diffnas.choice import global_search, local_search, pick, random_search, smallest_tolerance, thin
from lib.methods.diffnas.levels import (
    Seen,
    candidates,
    form_macs,
    form_seconds,
    level_errors,
    level_losses,
    level_table,
    observe,
    resolutions,
    searched_macs,
)
from lib.methods.diffnas.losses import BETAS, joint_loss, retraining_loss, supernet_loss
from lib.methods.diffnas.students import (
    Architecture,
    ConditionStudent,
    Form,
    FormSpace,
    Student,
    form_of,
    forms,
    residuals,
    shape,
)
from lib.methods.diffnas.supernets import choose, draw, resized, student, supernet

__all__ = [
    "BETAS",
    "Architecture",
    "ConditionStudent",
    "Form",
    "FormSpace",
    "Seen",
    "Student",
    "candidates",
    "choose",
    "draw",
    "form_macs",
    "form_of",
    "form_seconds",
    "forms",
    "global_search",
    "joint_loss",
    "level_errors",
    "level_losses",
    "level_table",
    "local_search",
    "observe",
    "pick",
    "random_search",
    "residuals",
    "resized",
    "resolutions",
    "retraining_loss",
    "searched_macs",
    "shape",
    "smallest_tolerance",
    "student",
    "supernet",
    "supernet_loss",
    "thin",
]
