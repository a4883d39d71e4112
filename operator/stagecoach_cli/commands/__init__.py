"""The subcommands, one module each, each with a click command called `command`.

At module level they import only click and the standard library, so that `--help` is fast.
"""
