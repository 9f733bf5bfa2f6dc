"""Everything that a run needs: data, training, evaluation, export, tracking, figures, checks, and parts of the command line.

Not here: the methods (`methods`), searches (`tuning`), the commands (`manyviews.py`).
"""
