"""What is learned: one file per paper, torch and timm only. No Ray, no MLflow, no files."""
