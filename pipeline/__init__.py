"""How a run works: data, training, evaluation, export, tracking, figures, checks, and the parts of the command line.

Not here: what is learned (`methods`), searches (`tuning`), the commands (`manyviews.py`).
"""
