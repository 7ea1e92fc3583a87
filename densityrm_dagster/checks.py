"""The validation list of the original experiment, on what is stored: run with the asset or on their own."""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from densityrm_core.experiment import Experiment

_OF_PROMPTS = {
    "every_prompt_has_a_weight": "Every training prompt has a weight, and no other prompt has one.",
    "weights_are_a_distribution": "Weights are positive, finite and sum to 1 (min, max, ratio and ESS shown).",
    "rarer_weighs_more": "Weight never falls as density does (it does for the definition `original`: a warning then).",
}
_OF_PAIRS = {
    "every_pair_has_a_weight": "Every training pair has a weight, through its prompt, and no other pair has one.",
    "one_prompt_one_weight": "Pairs with one prompt share one weight.",
    "sampler_follows_weights": "In one epoch every pair is drawn as often as its weight says, to within one draw.",
}


def density_checks() -> list[dg.AssetChecksDefinition]:
    """The checks of density_weights in one step, those of pair_weights in another."""
    return [_density_validation(), _pair_validation()]


def _density_validation() -> dg.AssetChecksDefinition:
    @dg.multi_asset_check(
        name="density_validation",
        specs=[
            dg.AssetCheckSpec(n, asset="density_weights", blocking=True, description=d, additional_deps=["prompts"])
            for n, d in _OF_PROMPTS.items()
        ],
        ins={name: dg.AssetIn(name, input_manager_key="tables") for name in ("density_weights", "prompts")},
        can_subset=True,
    )
    def density_validation(
        context: dg.AssetCheckExecutionContext,
        density_weights: pl.DataFrame,
        prompts: pl.LazyFrame,
        experiment: dg.ResourceParam[Experiment],
    ) -> Iterator[dg.AssetCheckResult]:
        from densityrm_core.density.checks import check_weights

        findings = check_weights(density_weights, prompts.select("prompt_id", "split").collect(), experiment.density.mass)
        inverted = experiment.density.definition == "original"
        for name in _wanted(context):
            passed, numbers = findings[name]
            known = inverted and name == "rarer_weighs_more"
            yield dg.AssetCheckResult(
                check_name=name,
                asset_key="density_weights",
                passed=passed,
                metadata=numbers,
                severity=dg.AssetCheckSeverity.WARN if known else dg.AssetCheckSeverity.ERROR,
            )

    return density_validation


def _pair_validation() -> dg.AssetChecksDefinition:
    @dg.multi_asset_check(
        name="pair_validation",
        specs=[dg.AssetCheckSpec(n, asset="pair_weights", blocking=True, description=d) for n, d in _OF_PAIRS.items()],
        ins={"pair_weights": dg.AssetIn("pair_weights", input_manager_key="tables")},
        can_subset=True,
    )
    def pair_validation(context: dg.AssetCheckExecutionContext, pair_weights: pl.LazyFrame) -> Iterator[dg.AssetCheckResult]:
        from densityrm_core.density.checks import check_pair_weights

        findings = check_pair_weights(pair_weights.select("prompt_id", "split", "weight").collect())
        for name in _wanted(context):
            passed, numbers = findings[name]
            yield dg.AssetCheckResult(check_name=name, asset_key="pair_weights", passed=passed, metadata=numbers)

    return pair_validation


def _wanted(context: dg.AssetCheckExecutionContext) -> list[str]:
    return sorted(key.name for key in context.selected_asset_check_keys)
