"""Looking at conflicts, with or without a method that resolves them."""

from detente.diagnostics.conflicts import task_gramian
from detente.diagnostics.recon import ConflictScores

__all__ = ["ConflictScores", "task_gramian"]
