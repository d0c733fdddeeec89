"""Saved activations, compressed."""

from .compress import compress

__all__ = ["compress"]
