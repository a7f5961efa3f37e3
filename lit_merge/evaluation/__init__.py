"""Merged models on data: searches, soups, statistics, analyses."""
