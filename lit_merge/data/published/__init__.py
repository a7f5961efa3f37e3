"""The data sets of the literature, where they are on the disk."""
