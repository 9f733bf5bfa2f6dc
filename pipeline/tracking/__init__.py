"""Metrics and artifacts of a run on their way to MLflow, through a file that survives a server that is down.

Not here: the model registry (`pipeline.export.registry`), the file itself (`pipeline.metrics_log`).
"""
