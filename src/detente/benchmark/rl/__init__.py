"""Reinforcement learning: environments, demonstrations, and agents that are trained on several tasks."""
