"""Weighted softmax cross-entropy as one operation; imports only jax, and jaxtyping for its annotations."""

from .api import weighted_xent as weighted_xent
