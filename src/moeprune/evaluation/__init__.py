"""Measuring what pruning cost: lm-eval runs, their paired comparison, teacher-forced measures and the report."""
