"""The science of densityrm: density, weights, sampling, training, evaluation. Imports neither Dagster nor MLflow."""
