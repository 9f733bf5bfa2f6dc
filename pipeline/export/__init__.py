"""Export of models: weights with timm's names, MLflow's model registry, the served model, features as Parquet.

Not here: metrics and curves in MLflow (`pipeline.tracking`).
"""

WEIGHTS, SPEC = "backbone.safetensors", "backbone.json"  # the two files of an export
