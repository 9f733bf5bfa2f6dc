"""Searches over any method's settings. So far: which settings are worth searching, and over what range (`spaces.py`)."""
