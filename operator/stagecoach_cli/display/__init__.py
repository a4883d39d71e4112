"""What people see: the live view, the summary of a run, numbers and durations as text."""
