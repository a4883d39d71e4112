"""The pure core: values in, values out. `plan` resolves a run into a graph, `decide` returns what to do next."""
