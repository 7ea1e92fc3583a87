"""Group density: unique prompts -> embeddings -> density weights -> weights of pairs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from densityrm_core.choices import noted
from densityrm_core.experiment import Experiment
from densityrm_core.pairs.prompts import unique_prompts
from densityrm_core.tables import DENSITY_WEIGHTS, PAIR_WEIGHTS, PROMPT_EMBEDDINGS, PROMPTS
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content
from densityrm_dagster.cards.density import density_metadata
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import version
from densityrm_dagster.io_managers import TABLE, ParquetIOManager
from densityrm_dagster.metadata import markdown_table, plot, same_columns, table_output
from densityrm_dagster.terminal import counted
from densityrm_dagster.tracking.mirror import DENSITIES, MirroredRun, MLflowTracker
from densityrm_dagster.tracking.training import record_hardware, set_up_torch, tags_of

if TYPE_CHECKING:
    from densityrm_core.density.weighing import Points, Weighing

_COMMON = {
    "group_name": "density",
    "io_manager_key": "tables",
    "owners": OWNERS,
    "automation_condition": on_new_content(),
}


def density_assets(experiment: Experiment, vectors: Path) -> list[dg.AssetsDefinition]:
    """The assets of this group. `vectors` is the folder of embeddings made before."""
    return [_prompts(), _prompt_embeddings(experiment, vectors), _density_weights(experiment), _pair_weights()]


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


def _prompt_embeddings(experiment: Experiment, vectors: Path) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        code_version=version(2, experiment.embedding),
        kinds={"sentence-transformers", "parquet"},
        metadata={TABLE: PROMPT_EMBEDDINGS.name},
    )
    def prompt_embeddings(
        context: dg.AssetExecutionContext,
        prompts: Path,
        experiment: dg.ResourceParam[Experiment],
        tables: dg.ResourceParam[ParquetIOManager],
    ) -> Iterator[dg.Output[Any]]:
        """A unit vector for every prompt: near in meaning, near in space."""
        from densityrm_core.hardware import pick_device
        from densityrm_core.vectors.embedding import embed_prompts

        set_up_torch(experiment.compute)
        settings, compute = experiment.embedding, experiment.compute
        with tables.stage("prompt_embeddings") as folder:
            with clear_failures():
                say = counted(context.log.info, "prompts embedded")
                device = pick_device(compute.device)
                out = folder / "embeddings.parquet"
                made = embed_prompts(prompts, out, settings, vectors, compute.search_threads, device, say)
            context.log.info(f"{made.new:,} prompts embedded in {made.seconds:.1f} s ({made.dtype}), {made.cached:,} from before")
            lineage = same_columns("prompts", "prompt_id", "split") | {
                column: [("prompts", "prompt")] for column in ("truncated", "embedding")
            }
            card = {
                "model": made.model,
                "revision": made.revision,
                "precision": made.dtype,
                "dimensions": made.dimensions,
                "embedded_now": made.new,
                "embedded_before": made.cached,
                "truncated_prompts": made.truncated,
                "seconds": round(made.seconds, 1),
            }
            yield table_output(made.stored, PROMPT_EMBEDDINGS, lineage, card)

    return prompt_embeddings


def _density_weights(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        code_version=version(2, experiment.density),
        kinds={"faiss", "parquet", "mlflow"},
        metadata={TABLE: DENSITY_WEIGHTS.name},
    )
    def density_weights(
        context: dg.AssetExecutionContext,
        prompts: Path,
        prompt_embeddings: Path,
        experiment: dg.ResourceParam[Experiment],
        tables: dg.ResourceParam[ParquetIOManager],
        mlflow: MLflowTracker,
    ) -> Iterator[dg.Output[Any]]:
        """Sampling weight of every training prompt: the rarer its neighbourhood, the heavier."""
        from densityrm_core.density.card import density_card
        from densityrm_core.density.weighing import read_points, store_weights, weigh_prompts

        with tables.stage("density_weights") as folder:
            with clear_failures(), noted() as taken:
                points = read_points(prompts, prompt_embeddings, folder)
                weighing = weigh_prompts(points, experiment.density, folder, experiment.compute, context.log.info)
            stored = store_weights(weighing, folder / "weights.parquet")
            card = density_card(weighing, points, prompts, experiment.density, experiment.compute.search_threads)
            for warning in card.warnings:
                context.log.warning(warning)
            with mlflow.run(context, DENSITIES, experiment.density.model_dump(mode="json"), tags_of(experiment)) as mirror:
                picture = _map(experiment, points, weighing, prompts, folder, mirror)
                mirror.final({name: value for name, value in card.numbers.items() if not isinstance(value, str)})
                hardware = record_hardware(mirror, taken)
            shown = density_metadata(card, weighing.table, picture) | hardware | mirror.metadata()
            measured = ("group", "log_density", "density", "decile", "quartile", "weight")
            lineage = same_columns("prompts", "prompt_id", "split", "pairs") | {
                column: [("prompt_embeddings", "embedding")] for column in measured
            }
            yield table_output(stored, DENSITY_WEIGHTS, lineage, shown)

    return density_weights


def _map(
    experiment: Experiment, points: "Points", weighing: "Weighing", prompts: Path, folder: Path, mirror: MirroredRun
) -> bytes:
    """The map of the training prompts as a picture; as a page that can be moved about in it goes to MLflow."""
    from densityrm_core.density.prompt_map import lay_out, map_html, map_png
    from densityrm_core.storage import rows_at

    weights, most = weighing.table, experiment.density.map_points
    train = weights.with_row_index("row").filter(pl.col("split") == "train")["row"].cast(pl.Int64).to_numpy()
    found = lay_out(points.vectors, train[: len(train) if most else 0], most, experiment.compute.search_threads)
    if most:
        page = folder / "prompt_map.html"
        page.write_text(map_html(found, weights, rows_at(prompts, found.rows, ["prompt"])["prompt"].to_list()), encoding="utf-8")
        mirror.artifact(page)
    return map_png(found, weights)


def _pair_weights() -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        code_version=version(1),
        kinds={"polars", "parquet"},
        metadata={TABLE: PAIR_WEIGHTS.name},
    )
    def pair_weights(
        preference_pairs: Path, density_weights: pl.DataFrame, tables: dg.ResourceParam[ParquetIOManager]
    ) -> Iterator[dg.Output[Any]]:
        """Density stratum and sampling weight of every pair: those of its prompt, shared among the prompt's pairs."""
        from densityrm_core.density import plots
        from densityrm_core.density.pair_weights import draws_by_decile, weigh_pairs

        with tables.stage("pair_weights") as folder:
            with clear_failures():
                weighed = weigh_pairs(preference_pairs, density_weights, folder / "pair_weights.parquet")
            lineage = same_columns("preference_pairs", "pair_id", "prompt_id", "split") | same_columns(
                "density_weights", "decile", "quartile", "weight"
            )
            shares = draws_by_decile(weighed.frame())
            card = {
                "rarest_decile_of_pairs": shares["pairs"][0],
                "rarest_decile_of_draws": shares["draws"][0],
                "draws_by_decile": plot(plots.draws_by_decile(shares)),
            }
            yield table_output(weighed, PAIR_WEIGHTS, lineage, card)

    return pair_weights
