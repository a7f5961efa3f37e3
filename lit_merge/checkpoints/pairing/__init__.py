"""Which tensor of one checkpoint is which of another, and which differences between the two are normal."""
