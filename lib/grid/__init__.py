"""The grid: a model under a plan. Plans, blocks, solvers, the engine that runs them, what they cost.

Imports no other wing: everything else stands on this one.
"""
