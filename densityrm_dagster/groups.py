"""Which assets there are, by name, said once: by source, by what a seed adds, by how far a command goes."""

from densityrm_core.experiment import Experiment

SOURCES = {  # key in the experiment file, and how a person calls it
    "hh_rlhf": "HH-RLHF",
    "ultrafeedback": "UltraFeedback",
    "stack_exchange": "Stack Exchange",
    "nanochat": "nanochat",
}
REWARD_MODELS = ("rm_uniform", "rm_density")
OF_POLICIES = ("policy_evaluation", "policy_curves", "policy_diversity")
EVALUATED = ("rm_evaluation", *OF_POLICIES)
REPORT = "hypothesis_report"


def arms(experiment: Experiment) -> list[str]:
    """The policies of the arms that the experiment turns on."""
    return [f"grpo_{arm}" for arm in experiment.arms]


def data_assets() -> frozenset[str]:
    """From raw rows to prompts."""
    tables = [f"{name}_{table}" for name in SOURCES for table in ("pairs", "rejects")]
    return frozenset([*tables, "preference_pairs", "preference_rejects", "prompts"])


def reward_model_steps() -> frozenset[str]:
    """From raw rows to the evaluation of the reward models, without policies and their judge."""
    weighing = ("prompt_embeddings", "density_weights", "pair_weights")
    return data_assets().union(weighing, ("base_model", *REWARD_MODELS, "rm_evaluation"))


def per_seed_assets(experiment: Experiment) -> list[str]:
    """What a further seed adds to an experiment whose data are prepared."""
    return [*REWARD_MODELS, *arms(experiment), *EVALUATED, REPORT]
