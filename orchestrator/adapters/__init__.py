"""The only modules that import Ray, MLflow and Optuna."""
