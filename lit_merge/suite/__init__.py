"""The whole experiment as a graph of stages that are run once."""
