"""Where images come from: one file per kind of source; `base.open_source` finds out which kind a `data.path` names.

Not here: decoding and everything after it (`pipeline.data`).
"""
