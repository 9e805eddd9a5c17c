"""What DCP stored, read as data: nothing in a checkpoint is executed."""
