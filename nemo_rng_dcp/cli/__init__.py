"""The command ``nemo-rng-dcp``: what is in a checkpoint, and what a resume makes of it."""
