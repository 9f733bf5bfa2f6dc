"""Searches over any method's settings by Ray Tune, their report, and studies.

space.py (what is searched) -> sampling.py (the values tried) -> search.py (a sweep from beginning to end) -> tuner.py (under Ray Tune).
trainable.py is what a trial does, schedulers.py what Ray Tune chooses by, callback.py what the driver writes down, sweep.py the folder.
results.py reads a sweep back; report.py, tables.py and pictures.py show it; best.py makes its best setting something to run.
Not here: training (`pipeline.train`) and evaluation (`pipeline.evaluate`); a trial is an ordinary run.
"""
