"""Searches over any method's settings by Ray Tune.

spaces.py what can be searched -> draws.py which values are tried -> search.py, running.py, ending.py a sweep from beginning to end.
sweep.py its folder; trial.py what a trial does; schedulers.py who is next and who is cut; book.py states and MLflow."""
