"""Pictures of a run or a model: charts, contact sheets, maps; `pictures.py` lists them by name.

Not here: the numbers that they show (`pipeline.evaluate`); plots of searches (`tuning`).
"""
