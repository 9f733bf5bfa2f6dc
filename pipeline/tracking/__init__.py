"""Tracking of a run in MLflow. Metrics are first written to a local file, so none are lost if the server does not answer.

Not here: the model registry (`pipeline.export.registry`), the file (`pipeline.metrics_log`).
"""
