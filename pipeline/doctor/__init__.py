"""Checks before time is spent: machine, cluster, packages, data, tracking, and what a run will take.

Not here: checks that every command makes of its settings (`pipeline.config`, `pipeline.build`).
"""
