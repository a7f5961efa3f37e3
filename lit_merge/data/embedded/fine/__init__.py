"""The twenty tasks with 50 to 150 classes: attributes of the embedded suite's drawings, combined."""
