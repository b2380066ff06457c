"""The parts of `train_tiny_moe.py`: drills, text, tasks, models, training and the pruning check."""
