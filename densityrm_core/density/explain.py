"""Why a prompt weighs what it weighs: its neighbours, its density, how often it is drawn."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from densityrm_core.arrays import Floats
from densityrm_core.density.definitions import BANDWIDTH, distances, log_density, stratum
from densityrm_core.density.tempering import group_share
from densityrm_core.experiment import Experiment
from densityrm_core.pairs.inspection import InspectionError
from densityrm_core.pairs.prompts import prompt_ids
from densityrm_core.storage import batches, key_value_metadata, read_frame

_ID = r"^[0-9a-f]{16}$"


@dataclass(frozen=True)
class Explanation:
    """What decides how often a prompt is drawn.

    row: of tables.DENSITY_WEIGHTS, with `prompt` and `sources`; None for a text that is not in the table.
    neighbors: nearest distinct training prompts: cosine, distance, prompt_id, decile, times_uniform, prompt.
    share: sampling probability of a distinct training prompt of this density; of the prompt's group, if it is one.
    """

    text: str
    row: dict[str, object] | None
    neighbors: pl.DataFrame
    log_density: float
    decile: int
    rarer_than: float
    group_size: int
    share: float
    train_prompts: int
    train_pairs: int
    epoch_draws: int


def explain(asked: str, tables: Path, experiment: Experiment) -> Explanation:
    """Explain a prompt by its id or its text; a text that is not among the prompts is embedded and measured.

    Reads the tables batch by batch; only ids and numbers of all prompts are held.

    Raises:
        InspectionError: a table is not made yet, no prompt has this id, or the text cannot be embedded.
    """
    weights_file, vectors_file = (_table(tables, name) for name in ("density_weights", "prompt_embeddings"))
    prompts_file = _table(tables, "prompts")
    weights = read_frame(weights_file)
    found = _look_up(asked, weights)
    train = weights.filter(pl.col("split") == "train")
    distinct = train.filter(pl.col("group") == pl.col("prompt_id"))
    own = str(found["group"]) if found and found["split"] == "train" else ""  # a member is measured as its representative is
    vector = _vector_of(own or str(found["prompt_id"]), vectors_file) if found else _embed(asked, experiment)
    cosines, ids = _nearest(vector, vectors_file, distinct.filter(pl.col("prompt_id") != own), experiment.density.neighbors)
    bandwidth = float(key_value_metadata(weights_file).get(BANDWIDTH, 1.0))
    measured = float(log_density(cosines[np.newaxis], experiment.density, bandwidth)[0])
    rho = float(str(found["log_density"])) if found else measured
    reference = train["log_density"].to_numpy()
    neighbors = pl.DataFrame({"prompt_id": ids, "cosine": cosines, "distance": distances(cosines)})
    texts = _texts([*ids, *([str(found["prompt_id"])] if found else [])], prompts_file)
    shown = weights.select("prompt_id", "decile", (pl.col("weight") * train.height).alias("times_uniform"))
    about = texts.filter(pl.col("prompt_id") == found["prompt_id"]).row(0, named=True) if found else {}
    return Explanation(
        text=str(about.get("prompt", asked)),
        row={**found, "sources": about["sources"]} if found else None,
        neighbors=neighbors.join(shown, on="prompt_id", maintain_order="left").join(texts, on="prompt_id", maintain_order="left"),
        log_density=rho,
        decile=int(stratum(np.array([rho]), reference, 10)[0]),
        rarer_than=float((reference > rho).mean()),
        group_size=train.filter(pl.col("group") == own).height if own else 1,
        share=_share_at(rho, train, experiment),
        train_prompts=train.height,
        train_pairs=int(train["pairs"].sum()),
        epoch_draws=max(1, round(experiment.sampling.epoch * int(train["pairs"].sum()))),
    )


def explanation_text(e: Explanation, width: int = 100) -> str:
    """The explanation as a person reads it in a terminal."""
    where = "not in the table of prompts; measured as if it were new"
    if e.row is not None:
        where = f"{e.row['prompt_id']}  {e.row['split']}  {', '.join(_strings(e.row['sources']))}"
    lines = [
        f"prompt      {where}",
        f"text        {_cut(e.text, width - 12)}",
        f"density     {np.exp(e.log_density):.4g} (log {e.log_density:.3f}), decile {e.decile} of 10, 1 the rarest: "
        f"rarer than {e.rarer_than:.0%} of the training prompts",
        *_drawn(e),
        f"neighbours  the {e.neighbors.height} nearest distinct training prompts",
        "            cosine  distance  decile  x uniform  prompt_id         text",
    ]
    for n in e.neighbors.iter_rows(named=True):
        numbers = f"{n['cosine']:6.3f}  {n['distance']:8.3f}  {n['decile']:6d}  {n['times_uniform']:9.2f}  {n['prompt_id']}"
        lines.append(f"            {numbers}  {_cut(n['prompt'], max(20, width - 66))}")
    return "\n".join(lines)


def _drawn(e: Explanation) -> list[str]:
    if e.row is None or e.row["split"] != "train":
        why = f"it is held out ({e.row['split']})" if e.row else "it is not a training prompt"
        times = e.share * e.train_prompts
        return [f"weight      none: {why} and never drawn; a training prompt of this density would weigh {times:.2f} x uniform"]
    weight, pairs = float(str(e.row["weight"])), int(str(e.row["pairs"]))
    group = f"; shared with {e.group_size - 1} near-duplicates" if e.group_size > 1 else ""
    draws = weight * e.epoch_draws
    each = f", {draws / pairs:.2f} each of its {pairs} pairs" if pairs > 1 else ""
    uniform = e.epoch_draws * pairs / e.train_pairs
    return [
        f"weight      {weight:.3g} = {weight * e.train_prompts:.2f} x uniform{group}",
        f"drawn       {draws:.2f} times in an epoch of {e.epoch_draws:,} pairs{each}; {uniform:.2f} if drawn uniformly",
    ]


def _table(tables: Path, name: str) -> Path:
    path = tables / f"{name}.parquet"
    if not path.exists():
        raise InspectionError(f"{path} is not made yet: materialize {name}, for instance with `densityrm demo`")
    return path


def _look_up(asked: str, weights: pl.DataFrame) -> dict[str, object] | None:
    """The prompt's row in the table of weights: by its id, or by its text."""
    wanted = asked if pl.Series([asked]).str.contains(_ID)[0] else prompt_ids(pl.Series("prompt", [asked]))[0]
    found = weights.filter(pl.col("prompt_id") == wanted)
    if found.is_empty() and wanted == asked:
        raise InspectionError(f"no prompt has the id {asked}; `densityrm inspect prompts` shows some, or give a text")
    if not asked.strip():
        raise InspectionError("give the id or the text of a prompt")
    return found.row(0, named=True) if found.height else None


def _vector_of(prompt_id: str, embeddings: Path) -> Floats:
    row = pl.scan_parquet(embeddings).filter(pl.col("prompt_id") == prompt_id).select("embedding").collect()
    if row.is_empty():
        raise InspectionError(f"{embeddings}: prompt {prompt_id} has no embedding; materialize prompt_embeddings again")
    return row["embedding"].to_numpy()[0]


def _embed(text: str, experiment: Experiment) -> Floats:
    from densityrm_core.vectors.encoder_files import EmbeddingError
    from densityrm_core.vectors.encoders import load_encoder

    try:
        return load_encoder(experiment.embedding).encode([text])[0][0]
    except EmbeddingError as error:
        raise InspectionError(f"the text is not among the prompts and cannot be embedded: {error}") from None


def _nearest(vector: Floats, embeddings: Path, among: pl.DataFrame, k: int) -> tuple[Floats, list[str]]:
    """Cosines (k,) and ids of the nearest of the prompts `among`, in one pass over the file."""
    if among.is_empty():
        raise InspectionError("there is no other distinct training prompt to measure a distance to")
    best = pl.DataFrame(schema={"prompt_id": pl.String, "cosine": pl.Float32})
    wanted = among.select("prompt_id")
    for batch in batches(embeddings, ["prompt_id", "embedding"]):
        part = batch.join(wanted, on="prompt_id", how="semi")
        if part.height:
            cosines = np.clip(part["embedding"].to_numpy() @ vector, -1, 1)
            scored = part.select("prompt_id", pl.Series("cosine", cosines, pl.Float32))
            best = pl.concat([best, scored]).sort("cosine", "prompt_id", descending=[True, False]).head(k)
    return best["cosine"].to_numpy(), best["prompt_id"].to_list()


def _share_at(rho: float, train: pl.DataFrame, experiment: Experiment) -> float:
    """Sampling probability of a distinct prompt of this density: between those of the training prompts on either side."""
    points = train.select("log_density", group_share(experiment.density.mass).log().alias("share")).sort("log_density")
    return float(np.exp(np.interp(rho, points["log_density"].to_numpy(), points["share"].to_numpy())))


def _texts(ids: list[str], prompts: Path) -> pl.DataFrame:
    wanted = pl.Series("prompt_id", ids).to_frame()
    found = [batch.join(wanted, on="prompt_id", how="semi") for batch in batches(prompts, ["prompt_id", "prompt", "sources"])]
    return pl.concat(found)


def _strings(values: object) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def _cut(text: str, width: int) -> str:
    return textwrap.shorten(text, max(width, 20), placeholder=" …")
