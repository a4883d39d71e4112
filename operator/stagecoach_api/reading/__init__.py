"""From a file to a run: YAML, overrides, and validation that reports all problems at once."""
