"""The command line: verbs and their options, settings over a recipe, early answers, completion, tables and JSON.

Not here: the commands themselves (`manyviews.py`).
"""
