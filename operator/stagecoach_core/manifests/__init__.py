"""From a stage attempt to the manifests that run it on a cluster: pure functions, values in, plain JSON values out.

It lies in the core because two rooms use it: the operator, which creates the objects, and `stagecoach render`, which
prints them. `stage_attempt.py` is what goes in; `configmap.py` and `jobset.py` are what comes out.
"""
