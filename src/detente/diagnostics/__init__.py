"""Looking at conflicts, with or without a method that resolves them."""

from detente.diagnostics.conflicts import task_gramian

__all__ = ["task_gramian"]
