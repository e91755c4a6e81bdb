"""Looking at conflicts, with or without a method that resolves them."""

from detente.diagnostics.conflicts import task_gramian
from detente.diagnostics.diagnosis import Answer, Diagnosis, diagnose
from detente.diagnostics.figures import figures
from detente.diagnostics.recon import ConflictScores
from detente.diagnostics.recorder import Observation, Recorder
from detente.diagnostics.recording import Recording

__all__ = [
    "Answer",
    "ConflictScores",
    "Diagnosis",
    "Observation",
    "Recorder",
    "Recording",
    "diagnose",
    "figures",
    "task_gramian",
]
