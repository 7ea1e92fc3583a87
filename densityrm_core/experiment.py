"""The experiment file as one validated, frozen object. Every default and every range check lives here.

Below this module nothing reads environment variables; here three are read: `DENSITYRM_EXPERIMENT` (which file),
`DENSITYRM_HOME` (where all state lives) and whatever `${NAME}` a path in the file mentions.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PLANTED = "planted"
_NO_OUTCOME: Any = {
    "seeds": True,
    "arms": True,
    "name": True,
    "compute": {"parsers", "search_threads", "checkpoint_every", "checkpoints_kept", "gradient_checkpointing", "shard"},
    "density": {"map_points"},
    "evaluation": {"sets"},
}
Fraction = Annotated[float, Field(ge=0, lt=1)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class ExperimentError(ValueError):
    """The experiment cannot be used as written; the message names the file, the key and what to do."""


class Settings(BaseModel):
    """Base of every section: frozen, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceSettings(Settings):
    path: str = Field(
        default=PLANTED, description="'planted', or a file, folder or glob of raw rows, local or hf://datasets/<repo>/<glob>"
    )
    enabled: bool = Field(default=True, description="false leaves the source out of the experiment")
    max_rows: int | None = Field(default=None, ge=1, description="read at most this many raw rows")
    max_malformed: int = Field(
        default=0, ge=0, description="malformed rows (broken JSON, missing or mistyped fields) to tolerate as rejects"
    )
    weight: float = Field(
        default=1.0, gt=0, le=1, description="share of the source's prompts that the union takes, drawn by prompt"
    )
    min_score_gap: float = Field(
        default=0.0, ge=0, description="pairs whose scores lie closer are left out of the union; in the source's units"
    )

    def reading(self) -> dict[str, Any]:
        """The settings that decide what is read of a source; the others only decide what the union takes of it."""
        return self.model_dump(mode="json", exclude={"weight", "min_score_gap"})


class StackExchangeSettings(SourceSettings):
    max_pairs_per_question: int = Field(default=10, ge=1, description="answer pairs kept of one question, widest score gap first")


class NanochatSettings(SourceSettings):
    path: str = Field(default="", description="a folder that holds pairs_all.jsonl, or that file; no such source if empty")


class SourcesSettings(Settings):
    hh_rlhf: SourceSettings = SourceSettings()
    ultrafeedback: SourceSettings = SourceSettings()
    stack_exchange: StackExchangeSettings = StackExchangeSettings()
    nanochat: NanochatSettings = NanochatSettings()

    def enabled(self) -> dict[str, SourceSettings]:
        """The sources that are read, by name."""
        every = {name: cast(SourceSettings, getattr(self, name)) for name in type(self).model_fields}
        return {n: source for n, source in every.items() if source.enabled and (n != "nanochat" or source.path)}


class PlantedSettings(Settings):
    """A small world whose truth is known: Zipf topics, each with a reply style it prefers."""

    seed: int = Field(default=7, ge=0, description="seed of the planted world; the data are a pure function of this section")
    topics: int = Field(default=8, ge=2, le=12, description="number of topics; topic i occurs with probability ~ 1 / i^zipf")
    zipf: float = Field(default=1.3, ge=0, description="exponent of the topic frequencies; 0 makes all topics equally common")
    hh_rows: int = Field(default=2800, ge=10, description="rows written in HH-RLHF's format")
    ultrafeedback_rows: int = Field(default=2800, ge=10, description="rows written in UltraFeedback's format")
    stack_exchange_questions: int = Field(default=800, ge=10, description="questions written in Stack Exchange's format")
    label_sharpness: float = Field(
        default=3.0, gt=0, description="P(better reply is chosen) = sigmoid(label_sharpness * reward gap)"
    )
    spoilt: Fraction = Field(
        default=0.2, description="share of pairs whose rejected reply is a spoilt text: looped, cut or shuffled"
    )
    defects: Fraction = Field(
        default=0.01, description="share of rows with a defect of the real sources: empty or identical replies, ties"
    )


class PairsSettings(Settings):
    max_pairs_per_prompt: int | None = Field(
        default=None, ge=1, description="pairs the union keeps of one prompt, first come; all if not given"
    )
    max_prompt_chars: int | None = Field(
        default=None, ge=1, description="pairs with a longer prompt are left out of the union; none if not given"
    )


class SplitSettings(Settings):
    seed: int = Field(default=0, ge=0, description="changes which prompts are held out, and nothing else")
    validation: float = Field(default=0.05, gt=0, lt=1, description="share of prompts in the validation split")
    test: float = Field(default=0.15, gt=0, lt=1, description="share of prompts in the test split, touched once")
    judge: Fraction = Field(default=0.1, description="share of prompts that train the judge, seen by no arm")
    near_duplicates: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="whether near-duplicate prompts share a split; auto: up to `near_duplicate_prompts` prompts",
    )
    near_duplicate_prompts: int = Field(default=1_000_000, ge=1, description="auto: the most prompts that are compared")
    near_duplicate_jaccard: float = Field(
        default=0.8, gt=0, le=1, description="prompts are near-duplicates from this similarity of their 5-character shingles on"
    )

    @model_validator(mode="after")
    def _leaves_a_training_split(self) -> SplitSettings:
        if self.validation + self.test + self.judge >= 1:
            raise ValueError("validation + test + judge must stay below 1, or no training split is left")
        return self


class EmbeddingSettings(Settings):
    model: str = Field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        description="a sentence-transformers model (hub id or folder), lm:<model> (mean hidden state), "
        "lm-logits:<model> (mean logits), or parquet:<file> with columns prompt_id and embedding",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the encoder's weights; auto: bfloat16 where the hardware multiplies it fast"
    )
    tokens_per_batch: int = Field(default=2048, ge=16, description="tokens embedded at a time, padding included")
    max_tokens: int = Field(default=256, ge=8, description="longer prompts are cut here before they are embedded")


class DensitySettings(Settings):
    definition: Literal["mean_log_distance", "mean_distance", "kth_distance", "kde", "soft_count", "original"] = Field(
        default="mean_log_distance", description="how density is estimated from the distances; original weighs common prompts up"
    )
    neighbors: int = Field(default=10, ge=1, description="k: the density of a prompt is taken from its k nearest neighbours")
    distance_floor: float = Field(default=0.1, gt=0, description="distances below this count as this")
    near_duplicate_cosine: float = Field(default=0.95, gt=0, le=1, description="prompts at least this similar share one weight")
    near_duplicate_jaccard: float = Field(
        default=0.7, gt=0, le=1, description="if one was cut before it was embedded, their 5-character shingles must agree too"
    )
    target_ess: float = Field(
        default=0.7, gt=0, le=1, description="effective sample fraction (sum w)^2 / (n sum w^2) of distinct prompts; 1 is uniform"
    )
    max_weight: float = Field(
        default=20.0, gt=1, description="no distinct prompt is drawn more than this many times as often as the average one"
    )
    mix: Fraction = Field(default=0.0, description="share of the draws that is uniform over distinct prompts")
    mass: Literal["per_prompt", "per_pair"] = Field(
        default="per_prompt", description="whether a prompt's pairs share its weight or each carry it"
    )
    search: Literal["auto", "exact", "index"] = Field(
        default="auto", description="how neighbours are found; auto: exact while that is affordable, else a faiss index"
    )
    recall: float = Field(default=0.95, gt=0, le=1, description="index: share of the true neighbours that must be found")
    map_points: int = Field(default=20_000, ge=0, description="prompts on the map, a sample; 0 draws none")


class SamplingSettings(Settings):
    method: Literal["systematic", "iid", "without_replacement"] = Field(
        default="systematic", description="how pairs and prompts are drawn by their weights"
    )
    epoch: float = Field(default=1.0, gt=0, description="draws of an epoch as a share of the items")

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> SamplingSettings:
        if self.method == "without_replacement" and self.epoch >= 1:
            raise ValueError(
                "epoch: must be below 1 without replacement, or every item is drawn once an epoch whatever its weight; try 0.5"
            )
        return self


class ComputeSettings(Settings):
    parsers: int = Field(default=2, ge=1, description="processes that parse the raw rows of a large file")
    search_threads: int = Field(default=2, ge=1, description="threads of embedding and of the search for neighbours")
    max_memory_gib: float = Field(
        default=4.0, gt=0, description="memory that the search for neighbours may take beside the program itself"
    )
    threads: int = Field(default=1, ge=1, description="torch threads of one training process; two assets train at a time")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where models run; auto takes a GPU if there is one"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of reward-model training: weights stay fp32, bf16 computes under autocast; auto: times one step of each",
    )
    compile: bool = Field(default=False, description="compile decoder layers with torch.compile; pays off in long trainings")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, a third more computation"
    )
    ranks: int = Field(default=1, ge=1, description="processes that share each step of a reward model's training, one a GPU")
    shard: bool = Field(default=False, description="shard weights over the ranks (FSDP2), for models that one GPU cannot hold")
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints of a training")
    checkpoints_kept: int = Field(default=2, ge=1, description="checkpoints of a training that are kept, the last ones")


class BaseModelSettings(Settings):
    model: str = Field(
        default="scratch",
        description="'scratch' (a small one is built), a Hugging Face folder, a hub id, a GGUF file (*.gguf), or a folder with a "
        "nanochat checkpoint and its tokenizer.json",
    )
    vocab_size: int = Field(default=1024, ge=300, description="scratch: size of the byte-level BPE vocabulary")
    hidden_size: int = Field(default=128, ge=32, multiple_of=32, description="scratch: width of the model")
    layers: int = Field(default=3, ge=1, description="scratch: number of decoder layers")
    max_prompt_tokens: int = Field(default=96, ge=8, description="longer contexts lose their beginning")
    max_reply_tokens: int = Field(default=32, ge=4, description="longer replies lose their end")
    steps: int = Field(
        default=400, ge=0, description="steps of supervised fine-tuning on the chosen replies; 0 leaves the model as it is"
    )
    batch_size: int = Field(default=64, ge=1, description="sequences a step")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="peak learning rate of AdamW")


class RewardModelSettings(Settings):
    steps: int = Field(default=600, ge=1, description="optimizer steps")
    pairs_per_step: int = Field(default=32, ge=1, description="preference pairs a step")
    tokens_per_batch: int = Field(
        default=4096, ge=64, description="tokens computed at a time; a step of more is accumulated over several batches"
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="peak learning rate of AdamW")
    warmup: Fraction = Field(default=0.05, description="share of the steps over which the learning rate rises")
    weight_decay: float = Field(default=0.05, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    center_rewards: float = Field(
        default=0.01, ge=0, description="coefficient of mean (r_chosen + r_rejected)^2 [Eisenstein et al. 2023]"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of the labels taken to be wrong: the loss mixes in the other order by it"
    )
    score_margin: float = Field(
        default=0.0,
        ge=0,
        description="by how much chosen should win, in reward units, where its score leads by the mean lead of its source",
    )
    soft_labels: float = Field(
        default=0.0,
        ge=0,
        description="above 0, chosen is better with probability sigmoid(this x score lead / mean lead of its source)",
    )
    importance_correction: bool = Field(
        default=False,
        description="weight the loss of a drawn pair by 1/(n p): the gradient of uniform sampling whatever the weights, "
        "a control that tells variance from objective",
    )
    frozen_layers: int = Field(default=0, ge=0, description="embeddings and this many lower decoder layers keep their weights")
    lora_rank: int = Field(
        default=0, ge=0, description="above 0, decoder layers learn low-rank updates of this rank (peft), merged at the end"
    )
    lora_alpha: int = Field(default=16, ge=1, description="LoRA's updates are scaled by lora_alpha / lora_rank")
    keep: Literal["best", "last"] = Field(
        default="best", description="which weights are kept: those of the lowest validation loss, or the last"
    )
    evaluate_every: int = Field(default=100, ge=1, description="steps between evaluations on the validation split")

    @model_validator(mode="after")
    def _agrees_on_scores(self) -> RewardModelSettings:
        if self.soft_labels and (self.score_margin or self.label_smoothing):
            raise ValueError("soft_labels already say how sure a label is: set score_margin and label_smoothing to 0 with them")
        if self.lora_rank and self.frozen_layers:
            raise ValueError("frozen_layers: with LoRA all base weights are frozen already; set it to 0")
        return self


class GrpoSettings(Settings):
    steps: int = Field(default=150, ge=1, description="optimizer steps at most; the KL budget may end a run sooner")
    prompts_per_step: int = Field(default=8, ge=1, description="distinct prompts a step")
    group_size: int = Field(default=8, ge=2, description="completions sampled of every prompt (G)")
    max_new_tokens: int = Field(default=24, ge=1, description="longest completion")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature; the training log-probabilities use the same")
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="peak learning rate of AdamW")
    warmup: Fraction = Field(default=0.05, description="share of the steps over which the learning rate rises")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    kl_coefficient: float = Field(
        default=0.2, ge=0, description="beta: weight of the KL penalty to the base policy (k3 estimate)"
    )
    kl_budget: float = Field(default=3.0, gt=0, description="stop once KL(policy || base) a sequence, in nats, has passed this")
    log_every: int = Field(default=10, ge=1, description="steps between points of the curves")


class JudgeSettings(Settings):
    kind: Literal["planted", "model"] = Field(
        default="planted", description="the planted rule (exact), or a reward model of the judge split"
    )
    steps: int = Field(default=400, ge=1, description="model: optimizer steps of the judge")


class EvaluationSettings(Settings):
    prompts: int = Field(default=200, ge=2, description="held-out prompts the policies answer")
    samples: int = Field(default=4, ge=1, description="completions sampled of each, beside the greedy one")
    bootstrap: int = Field(default=2000, ge=100, description="bootstrap resamples behind every interval")
    claim: float = Field(default=0.10, ge=0, description="smallest relative gain that would confirm the claim '+10 to 30 %'")
    sets: dict[SetName, str] = Field(
        default={},
        description="further preference pairs that reward models rank, by name: a file, folder or glob of JSON lines or Parquet, "
        "local or hf://datasets/<repo>/<glob>, with the columns prompt, chosen, rejected and subset of RewardBench 1 or 2",
    )

    @model_validator(mode="after")
    def _leaves_the_test_split_its_name(self) -> EvaluationSettings:
        if "test" in self.sets:
            raise ValueError("sets: 'test' is the experiment's own test split; give the set another name")
        return self


class Experiment(Settings):
    """Everything that decides the outcome of an experiment, and nothing else."""

    name: str = Field(
        default="planted", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="folder of its tables and models under DENSITYRM_HOME"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1, description="replicates")
    arms: tuple[Literal["a", "b", "c", "d"], ...] = Field(default=("a", "b", "c"), min_length=1, description="GRPO arms to train")
    sources: SourcesSettings = SourcesSettings()
    planted: PlantedSettings = PlantedSettings()
    pairs: PairsSettings = PairsSettings()
    splits: SplitSettings = SplitSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    density: DensitySettings = DensitySettings()
    sampling: SamplingSettings = SamplingSettings()
    compute: ComputeSettings = ComputeSettings()
    base_model: BaseModelSettings = BaseModelSettings()
    reward_model: RewardModelSettings = RewardModelSettings()
    grpo: GrpoSettings = GrpoSettings()
    judge: JudgeSettings = JudgeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _is_consistent(self) -> Experiment:
        enabled = self.sources.enabled()
        if len(set(self.seeds)) != len(self.seeds) or len(set(self.arms)) != len(self.arms):
            raise ValueError("seeds and arms must not repeat")
        if not enabled:
            raise ValueError("sources: at least one source must be enabled")
        if self.judge.kind == "planted" and any(s.path != PLANTED for s in enabled.values()):
            raise ValueError("judge.kind: 'planted' knows the truth of planted sources only; real rows need 'model'")
        if self.judge.kind == "model" and self.splits.judge == 0:
            raise ValueError("splits.judge: must be above 0 when judge.kind is 'model'")
        return self

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever any setting that decides the outcome does; seeds and arms may be added freely."""
        settings = self.model_dump(mode="json", exclude=_NO_OUTCOME)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load_experiment(path: str | Path | None = None) -> Experiment:
    """Read an experiment file: `path`, else the one `DENSITYRM_EXPERIMENT` names, else the built-in planted experiment.

    Raises:
        ExperimentError: the file is missing, is not YAML, or a key is unknown, out of range or of the wrong type.
    """
    path = path or os.environ.get("DENSITYRM_EXPERIMENT")
    if not path:
        return Experiment()
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(
            f"{path}: cannot be read ({error.strerror}); DENSITYRM_EXPERIMENT names the experiment file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ExperimentError(f"{path}: must hold a mapping of settings, not {type(content).__name__}")
    try:
        return Experiment.model_validate(_expand(cast(dict[str, Any], content), path, ""))
    except ValidationError as error:
        raise ExperimentError(f"{path}: " + describe(error, Experiment)) from None


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line a fault: the key, what is wrong, the value given, and the key that was probably meant."""
    lines: list[str] = []
    for fault in error.errors():
        key = ".".join([prefix] * bool(prefix) + [str(part) for part in fault["loc"]])
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(fault["loc"][-1]), _fields(model, fault["loc"][:-1]), n=1)
            lines.append(f"{key}: unknown key" + (f"; did you mean {close[0]!r}?" if close else ""))
        else:
            message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
            given = fault["input"] if isinstance(fault["input"], (str, int, float, bool, type(None))) else "..."
            lines.append(f"{key}: {message} (got {given!r})" if key else message)
    return "\n".join(lines)


def home() -> Path:
    """The folder that holds all state: `DENSITYRM_HOME`, else `.densityrm` in the working folder."""
    return Path(os.environ.get("DENSITYRM_HOME") or ".densityrm").absolute()


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def _expand(value: Any, path: Path, key: str) -> Any:
    """Replace ${NAME} in every string by the environment variable of that name."""
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value).items()
        return {k: _expand(v, path, f"{key}.{k}" if key else str(k)) for k, v in items}
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise ExperimentError(f"{path}: {key}: needs the environment variable {name}, which is not set")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", lookup, value)
