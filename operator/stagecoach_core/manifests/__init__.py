"""From a stage attempt to the manifests that run it on a cluster: pure functions, values in, plain JSON values out.

They are in the core because two packages use them: the operator creates the objects, `stagecoach render` prints them.
`stage_attempt.py` is the input; `configmap.py` and `jobset.py` are the output.
"""
