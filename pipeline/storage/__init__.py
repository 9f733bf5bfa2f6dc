"""Files on this machine and in object stores: reading, atomic writing, local copies of run folders.

Not here: the content of the files (`pipeline.run_folder`, `pipeline.checkpoint`, `pipeline.data.sources`).
"""
