"""Time from a stage's end to the next stage's pod on a cluster: the operator against a chain driven by JobSets' status.

`make bench-operator` runs it. Pods are simulated by KWOK: they last for two seconds and use no resources. Both chains
have the same pods on the same nodes, and one watch of pods times both.
"""
