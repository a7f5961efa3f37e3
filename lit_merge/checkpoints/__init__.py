"""Checkpoints of other programs: opened, paired with their base, differenced. Nothing in them is run."""
