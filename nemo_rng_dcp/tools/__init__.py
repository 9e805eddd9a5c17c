"""What the command nemo-rng-dcp is made of: reading, judging, comparing, predicting, showing."""
