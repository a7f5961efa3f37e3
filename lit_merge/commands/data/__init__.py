"""List, check and prepare published data sets; draw a sheet of the embedded suite."""
