"""From a source to batches of views: sources, order, decoding, crops (CPU), augmentation (device), loader.

Not here: what a method makes of the views (`methods`), reading and writing of files and object stores (`pipeline.storage`).
"""
