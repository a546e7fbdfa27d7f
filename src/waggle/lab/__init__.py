"""A cluster of nodes on one machine: namespaces, a real agent per node, pods through the real CNI plugin.

Nothing is imported here, so that `waggle-echo`, which lives in this package, starts fast.
"""
