"""Measuring a backbone: features, kNN, probes, clusters; online during a run and at its end.

Not here: drawing what was measured (`pipeline.figures`), measuring an exported model (`pipeline.export.evaluation`).
"""
