"""Sources of images, one file per kind; `base.open_source` opens a `data.path`.

Not here: decoding and everything after it (`pipeline.data`).
"""
