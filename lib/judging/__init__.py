"""Judging: how good images are, against what, and with which interval.

Imports `lib.grid` and `lib.teachers`; knows no method.
"""
