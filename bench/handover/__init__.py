"""From one stage's end to the next one's pod, on a cluster: the operator beside a chain that follows JobSets' status.

`make bench-operator` runs it. Pods are pretended (KWOK): they run for two seconds and take nothing of the machine. Both
chains have the same pods on the same nodes, and one watch of pods times both.
"""
