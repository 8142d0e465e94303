-- Optuna and MLflow both call their table of schema versions alembic_version, so each gets a database of its own.
CREATE DATABASE mlflow;
