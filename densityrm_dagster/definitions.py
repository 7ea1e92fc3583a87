"""The code location Dagster loads: the graph of the experiment that DENSITYRM_EXPERIMENT names."""

from densityrm_core.experiment import load_experiment
from densityrm_dagster.build import build_definitions

defs = build_definitions(load_experiment())
