"""Pictures of a run or a model: charts, contact sheets, maps; `pictures.py` finds them by name.

Not here: the measurements that they show (`pipeline.evaluate`); plots of searches (`tuning`).
"""
