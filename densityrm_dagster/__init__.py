"""The orchestration of densityrm: a thin layer of Dagster assets over densityrm_core."""

import warnings

from dagster import BetaWarning

# Data versions on outputs are marked beta in the pinned Dagster; saying so at every step helps nobody
warnings.filterwarnings("ignore", category=BetaWarning)
