"""Low-rank adapters of peft: read, and turned into the changes that they make."""
