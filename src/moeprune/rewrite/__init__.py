"""Executors of plans: checkpoint in, checkpoint out, without loading a model."""
