"""RNG state that other code stored: what it is worth, and the states of each rank in it."""
