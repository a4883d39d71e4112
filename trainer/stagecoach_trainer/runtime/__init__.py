"""The environment of a stage's processes: context, inputs, progress, outcomes, errors, publishing, start-up.

This package may import the API's package alone.
"""
