"""The commands that train and evaluate, run by Lightning's command line."""
