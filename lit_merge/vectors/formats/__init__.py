"""What checkpoints of others look like: containers, layouts of names, adapters. Read as data, never run."""
