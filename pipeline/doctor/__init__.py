"""Checks before a run: machine, cluster, packages, data, tracking, and the expected duration.

Not here: checks of settings by every command (`pipeline.config`, `pipeline.build`).
"""
