"""Teachers: the data, the networks that are trained here or loaded from elsewhere, the one training loop.

Imports `lib.grid` alone.
"""
