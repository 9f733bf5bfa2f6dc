"""What the commands share: settings from the command line, tables and JSON.

Not here: the commands and their options (`manyviews.py`).
"""
