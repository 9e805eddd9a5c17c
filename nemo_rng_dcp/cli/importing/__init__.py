"""``nemo-rng-dcp import``: the states of each rank that a framework stored, as records.

``main`` alone imports this folder, and of it ``command`` alone.
"""
