"""The subcommands, one module each, each with a click command called `command`.

At module level they import click and the standard library only, so that `--help` answers at once.
"""
