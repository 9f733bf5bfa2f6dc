"""Files on this machine and in object stores, alike: reading, atomic writing, mirrored run folders.

Not here: what the files mean (`pipeline.run_folder`, `pipeline.checkpoint`, `pipeline.data.sources`).
"""
