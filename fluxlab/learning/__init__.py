"""What gradients through the model say: arguments of programs that fit (docs/learning.md), and attribution."""

from fluxlab.learning.arguments import Learned, Template, check_smooth, has_learned, read_template
from fluxlab.learning.fit import Fit, fit
from fluxlab.learning.folder import Attribution, read_attribution
from fluxlab.learning.objectives import OBJECTIVES, Objective, read_objective

__all__ = [
    "OBJECTIVES",
    "Attribution",
    "Fit",
    "Learned",
    "Objective",
    "Template",
    "check_smooth",
    "fit",
    "has_learned",
    "read_attribution",
    "read_objective",
    "read_template",
]
