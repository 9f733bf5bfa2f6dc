"""Training: the loop, optimizers, health, progress, the start and the end of a run, and workers under Ray Train.

Not here: the methods (`methods`), the checks before a run (`pipeline.build`), its state on disk (`pipeline.checkpoint`).
"""
