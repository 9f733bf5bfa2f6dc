"""From a source to batches of views: sources, order, decoding, crops (CPU), augmentation (device), loader.

Not here: losses of views (`methods`), reading and writing of files and object stores (`pipeline.storage`).
"""
