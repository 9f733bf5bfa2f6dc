"""Evaluation of a backbone: features, kNN, probes, clusters; online during a run and at its end.

Not here: figures (`pipeline.figures`), evaluation of an exported model (`pipeline.export.evaluation`).
"""
