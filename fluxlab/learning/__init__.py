"""Find numeric arguments of programs by gradients through the model (docs/learning.md)."""

from fluxlab.learning.arguments import Learned, Template, check_smooth, has_learned, read_template
from fluxlab.learning.fit import Fit, fit
from fluxlab.learning.objectives import OBJECTIVES, Objective, read_objective

__all__ = [
    "OBJECTIVES",
    "Fit",
    "Learned",
    "Objective",
    "Template",
    "check_smooth",
    "fit",
    "has_learned",
    "read_objective",
    "read_template",
]
