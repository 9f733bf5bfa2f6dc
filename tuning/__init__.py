"""Searches over any method's settings by Ray Tune.

space.py what can be searched -> sampling.py which values are tried -> search.py, tuner.py, finalize.py a sweep from beginning to end.
sweep.py its folder; trainable.py what a trial does; schedulers.py who is next and who is cut; callback.py states and MLflow."""
