"""Group density: unique prompts -> embeddings -> density weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from densityrm_core import plots
from densityrm_core.experiment import Experiment
from densityrm_core.prompts import unique_prompts
from densityrm_core.tables import DENSITY_WEIGHTS, PROMPT_EMBEDDINGS, PROMPTS
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import version
from densityrm_dagster.io_managers import TABLE, ParquetIOManager
from densityrm_dagster.metadata import markdown_table, plot, same_columns, table_output
from densityrm_dagster.tracking import set_up_torch

_ESS_MISSED = 0.01
_COMMON = {
    "group_name": "density",
    "io_manager_key": "tables",
    "owners": OWNERS,
    "automation_condition": on_new_content(),
}


def density_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """The assets of this group."""
    return [_prompts(), _prompt_embeddings(experiment), _density_weights(experiment)]


def _prompts() -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        code_version=version(2),
        kinds={"polars", "parquet"},
        metadata={TABLE: PROMPTS.name},
    )
    def prompts(preference_pairs: Path, tables: dg.ResourceParam[ParquetIOManager]) -> Iterator[dg.Output[Any]]:
        """Every unique prompt, with its cluster, its split and its number of pairs."""
        with tables.stage("prompts") as folder:
            unique = unique_prompts(preference_pairs, folder / "prompts.parquet")
            lineage = same_columns("preference_pairs", "prompt_id", "prompt", "cluster", "split") | {
                "pairs": [("preference_pairs", "pair_id")],
                "sources": [("preference_pairs", "src")],
            }
            commonest = pl.scan_parquet(unique.path).select("pairs", "prompt").top_k(5, by="pairs").collect()
            card = {"most_pairs": dg.MetadataValue.md(markdown_table(commonest))}
            yield table_output(unique, PROMPTS, lineage, card)

    return prompts


def _prompt_embeddings(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        code_version=version(1, experiment.embedding),
        kinds={"sentence-transformers", "parquet"},
        metadata={TABLE: PROMPT_EMBEDDINGS.name},
    )
    def prompt_embeddings(
        context: dg.AssetExecutionContext, prompts: pl.DataFrame, experiment: dg.ResourceParam[Experiment]
    ) -> dg.Output[pl.DataFrame]:
        """A unit vector for every prompt: near in meaning, near in space."""
        from densityrm_core.embedding import embed_prompts

        def say(done: int) -> None:
            if done == prompts.height or done % (16 * experiment.embedding.batch_size) == 0:
                context.log.info(f"{done:,}/{prompts.height:,} prompts embedded")

        set_up_torch(experiment.compute)
        with clear_failures():
            embedded = embed_prompts(prompts, experiment.embedding, say)
        lineage = same_columns("prompts", "prompt_id", "split") | {"embedding": [("prompts", "prompt")]}
        card = {"model": experiment.embedding.model, "dimensions": embedded["embedding"].dtype.shape[0]}
        return table_output(embedded, PROMPT_EMBEDDINGS, lineage, card)

    return prompt_embeddings


def _density_weights(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        code_version=version(1, experiment.density),
        kinds={"faiss", "parquet"},
        metadata={TABLE: DENSITY_WEIGHTS.name},
    )
    def density_weights(
        context: dg.AssetExecutionContext,
        prompts: pl.DataFrame,
        prompt_embeddings: pl.DataFrame,
        experiment: dg.ResourceParam[Experiment],
    ) -> dg.Output[pl.DataFrame]:
        """Sampling weight of every training prompt: the rarer its neighbourhood, the heavier."""
        from densityrm_core.density import describe_weights, weigh_prompts

        with clear_failures():
            weighing = weigh_prompts(prompts, prompt_embeddings, experiment.density)
        numbers = describe_weights(weighing.table)
        ess = numbers["effective_sample_fraction"]
        context.log.info(
            f"{numbers['prompts']:,.0f} training prompts in {weighing.groups:,} groups, effective sample fraction {ess:.3f}, "
            f"heaviest {numbers['max_over_uniform']:.1f} x uniform"
        )
        if ess > experiment.density.target_ess + _ESS_MISSED:
            context.log.warning(
                f"density.target_ess {experiment.density.target_ess:g} is out of reach: {ess:.3f} is the lowest that "
                f"density.max_weight {experiment.density.max_weight:g} and the distances of these prompts allow"
            )
        vector, from_prompts = [("prompt_embeddings", "embedding")], same_columns("prompts", "prompt_id", "split", "pairs")
        measured = ("group", "log_distance", "density", "decile", "quartile", "weight")
        card = {
            **numbers,
            "exponent": weighing.exponent,
            "groups": weighing.groups,
            "histogram": plot(plots.weight_histogram(weighing.table)),
            "lorenz": plot(plots.lorenz_curve(weighing.table)),
            "heaviest_and_lightest": dg.MetadataValue.md(_extremes(weighing.table, prompts)),
        }
        return table_output(weighing.table, DENSITY_WEIGHTS, from_prompts | dict.fromkeys(measured, vector), card)

    return density_weights


def _extremes(weights: pl.DataFrame, prompts: pl.DataFrame) -> str:
    train = weights.filter(pl.col("weight").is_not_null()).join(prompts.select("prompt_id", "prompt"), on="prompt_id")
    ranked = train.sort("weight", "prompt_id", descending=[True, False]).select(
        (pl.col("weight") * pl.len()).alias("times uniform"), "prompt"
    )
    return markdown_table(pl.concat([ranked.head(5), ranked.tail(5)]))
