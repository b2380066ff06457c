"""Pruning inside a loaded model, for training scripts."""
