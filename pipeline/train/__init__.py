"""Training: the loop, optimizers, health, progress, the start and the end of a run, and workers under Ray Train.

Not here: what is learned (`methods`), what a run is built of (`pipeline.build`), its state on disk (`pipeline.checkpoint`).
"""
