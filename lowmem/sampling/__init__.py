"""Which rows a sampled gradient is made of."""

from .cache import GradNormCache
from .rows import budget_rows, choose, inclusion_probabilities, pick, row_norms

__all__ = ["GradNormCache", "budget_rows", "choose", "inclusion_probabilities", "pick", "row_norms"]
