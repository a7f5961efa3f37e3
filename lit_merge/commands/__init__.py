"""What ``lit-merge`` can be told to do."""
