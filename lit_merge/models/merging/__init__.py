"""A merge before it is computed: its base, its inputs, what it takes, and what it writes."""
