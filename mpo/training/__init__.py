"""A run: its steps, its reference, its checkpoints and what it leaves."""
