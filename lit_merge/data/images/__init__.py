"""Images in memory and in files: found, read, augmented, batched."""
