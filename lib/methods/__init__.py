"""The methods: each ends in a plan or in a model.

Imports the grid, teachers and judging, never `lib.study`; no method knows another, but `compose`, which knows all.
"""
