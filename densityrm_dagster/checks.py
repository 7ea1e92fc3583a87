"""The validation list of the original experiment, on what is stored: run with the asset or on their own."""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from densityrm_core.experiment import Experiment

_OTHERS = ("prompts", "preference_pairs")
_SPECS = {
    "every_prompt_has_a_weight": "Every training prompt has a weight, and no other prompt has one.",
    "every_pair_has_a_weight": "Every training pair has a weight, through its prompt.",
    "one_prompt_one_weight": "Pairs with one prompt share one weight.",
    "weights_are_a_distribution": "Weights are positive, finite and sum to 1 (min, max, ratio and ESS shown).",
    "rarer_weighs_more": "Weight never falls as the distance to the neighbours grows.",
    "sampler_follows_weights": "In one epoch every pair is drawn as often as its weight says, to within one draw.",
}


def density_checks() -> dg.AssetChecksDefinition:
    """All checks of density_weights in one step."""

    @dg.multi_asset_check(
        name="density_validation",
        specs=[
            dg.AssetCheckSpec(n, asset="density_weights", blocking=True, description=d, additional_deps=_OTHERS)
            for n, d in _SPECS.items()
        ],
        ins={name: dg.AssetIn(name, input_manager_key="tables") for name in ("density_weights", *_OTHERS)},
        can_subset=True,
    )
    def density_validation(
        context: dg.AssetCheckExecutionContext,
        density_weights: pl.DataFrame,
        prompts: pl.DataFrame,
        preference_pairs: pl.LazyFrame,
        experiment: dg.ResourceParam[Experiment],
    ) -> Iterator[dg.AssetCheckResult]:
        from densityrm_core.validation import check_weights

        train = preference_pairs.filter(pl.col("split") == "train").select("prompt_id").collect()
        findings = check_weights(density_weights, prompts, train, experiment.density.mass)
        wanted = {key.name for key in context.selected_asset_check_keys}
        for name, (passed, numbers) in findings.items():
            if name in wanted:
                yield dg.AssetCheckResult(check_name=name, asset_key="density_weights", passed=passed, metadata=numbers)

    return density_validation
