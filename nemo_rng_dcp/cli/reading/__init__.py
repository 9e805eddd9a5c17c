"""A checkpoint read as data: nothing in it is executed."""
