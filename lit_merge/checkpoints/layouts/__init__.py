"""Names that libraries give the same parameters: recognised, and translated."""
