"""Real texts, and networks for them, that are inside packages of registries: prepared as tasks, never committed."""
