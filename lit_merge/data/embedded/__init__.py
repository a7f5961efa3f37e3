"""The embedded suite: eight image-classification tasks that are drawn, not downloaded."""
