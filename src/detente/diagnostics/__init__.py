"""Looking at conflicts, with or without a method that resolves them."""

from detente.diagnostics.conflicts import task_gramian
from detente.diagnostics.recon import ConflictScores
from detente.diagnostics.recorder import Observation, Recorder
from detente.diagnostics.recording import Recording

__all__ = ["ConflictScores", "Observation", "Recorder", "Recording", "task_gramian"]
