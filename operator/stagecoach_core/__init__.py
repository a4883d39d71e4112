"""The pure core: values in, values out. `plan` makes a graph of a run, `decide` says what to do next."""
