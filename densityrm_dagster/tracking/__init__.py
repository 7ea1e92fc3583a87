"""Trainings as Dagster and MLflow see them. Begin with `training.tracked`; `mirror` is MLflow, `registry` its models."""
