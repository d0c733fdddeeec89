"""Low-rank factorisations of matrices and of batches of equal matrices: what the low-rank optimizers project with."""

from .lowrank import orthonormal, power_iteration, rsvd, smallest_rank

__all__ = ["orthonormal", "power_iteration", "rsvd", "smallest_rank"]
