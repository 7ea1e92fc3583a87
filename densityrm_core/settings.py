"""The sections of an experiment file: every default and every range check lives here, each beside its meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

PLANTED = "planted"
Fraction = Annotated[float, Field(ge=0, lt=1)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


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
        description="of every training: weights stay fp32, bf16 computes under autocast; auto: bf16 for models of width 384 and "
        "more where the device multiplies it in hardware, decided with the base model and kept for all that start from it",
    )
    attention: Literal["auto", "spans", "flex", "flex_eager"] = Field(
        default="auto",
        description="how packed rows attend: PyTorch's attention a span, or FlexAttention, compiled or not; auto: flex on a GPU, "
        "else spans",
    )
    search_arithmetic: Literal["auto", "int8", "bfloat16", "float32"] = Field(
        default="auto",
        description="in which the search for neighbours chooses its candidates; all find the same; auto: the fastest by the "
        "processor's instruction sets",
    )
    rollouts: Literal["transformers", "vllm"] = Field(
        default="transformers", description="what samples completions; vllm needs a GPU and the extra of that name"
    )
    compile: bool = Field(default=False, description="compile decoder layers with torch.compile; pays off in long trainings")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, a third more computation"
    )
    ranks: int = Field(default=1, ge=1, description="processes that share each step of a reward model's training, one a GPU")
    shard: bool = Field(default=False, description="shard weights over the ranks (FSDP2), for models that one GPU cannot hold")
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints of a training")
    checkpoints_kept: int = Field(default=2, ge=1, description="checkpoints of a training that are kept, the last ones")

    def arithmetic(self) -> dict[str, Any]:
        """The settings that decide in which arithmetic a model is trained: with others it comes out otherwise."""
        return self.model_dump(mode="json", include={"precision", "attention", "compile", "ranks", "rollouts"})


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
        default=250, ge=0, description="steps of supervised fine-tuning on the chosen replies; 0 leaves the model as it is"
    )
    batch_size: int = Field(default=64, ge=1, description="sequences a step")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="peak learning rate of AdamW")


class RewardModelSettings(Settings):
    steps: int = Field(default=150, ge=1, description="optimizer steps")
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
    evaluate_every: int = Field(default=50, ge=1, description="steps between evaluations on the validation split")

    @model_validator(mode="after")
    def _agrees_on_scores(self) -> RewardModelSettings:
        if self.soft_labels and (self.score_margin or self.label_smoothing):
            raise ValueError("soft_labels already say how sure a label is: set score_margin and label_smoothing to 0 with them")
        if self.lora_rank and self.frozen_layers:
            raise ValueError("frozen_layers: with LoRA all base weights are frozen already; set it to 0")
        return self


class GrpoSettings(Settings):
    steps: int = Field(default=40, ge=1, description="steps at most, each a rollout; the KL budget may end a run sooner")
    prompts_per_step: int = Field(default=8, ge=1, description="prompts a step")
    group_size: int = Field(default=8, ge=2, description="completions sampled of every prompt (G)")
    max_new_tokens: int = Field(default=24, ge=1, description="longest completion")
    temperature: float = Field(
        default=1.0, gt=0, description="sampling temperature; log-probabilities are those at the same temperature"
    )
    inner_epochs: int = Field(default=1, ge=1, description="mu: optimizer steps on one rollout [Shao et al. 2024, algorithm 1]")
    tokens_per_batch: int = Field(
        default=2048, ge=64, description="tokens computed at a time; a step of more is accumulated over several batches"
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="peak learning rate of AdamW")
    warmup: Fraction = Field(default=0.05, description="share of the steps over which the learning rate rises")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    advantage: Literal["std", "none", "batch"] = Field(
        default="std",
        description="a reward less its group's mean, divided by the group's standard deviation [Shao et al. 2024], by nothing "
        "[Dr. GRPO, Liu et al. 2025], or by the standard deviation over the step [Hu 2025]",
    )
    loss_average: Literal["completion", "token", "constant"] = Field(
        default="constant",
        description="token losses are averaged within each completion, then over completions [Shao et al. 2024, eq. 3]; over all "
        "tokens of the step [DAPO, Yu et al. 2025, eq. 8]; or summed and divided by max_new_tokens [Dr. GRPO, Liu et al. 2025]",
    )
    ratio: Literal["token", "sequence"] = Field(
        default="token", description="importance ratio of each token, or of the whole completion [GSPO, Zheng et al. 2025, eq. 7]"
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="the ratio is clipped below 1 - this")
    clip_high: float = Field(
        default=0.2, gt=0, description="the ratio is clipped above 1 + this; 0.28 is clip-higher [DAPO, Yu et al. 2025, eq. 10]"
    )
    kl_coefficient: float = Field(
        default=0.2,
        ge=0,
        description="beta: weight of the KL penalty to the base policy (k3 [Schulman 2020]); 0 is none",
    )
    kl_target: float | None = Field(
        default=None,
        gt=0,
        description="beta adapts so that KL a sequence, in nats, stays near this [Ziegler et al. 2019, 2.2]; fixed if none",
    )
    kl_budget: float | None = Field(
        default=3.0,
        gt=0,
        description="training ends once KL(policy || base) a sequence, in nats, has passed this, and the last weights evaluated "
        "inside it are kept; no limit if none",
    )
    entropy_bonus: float = Field(default=0.0, ge=0, description="weight of the mean entropy of a token, in nats")
    resample_rounds: int = Field(
        default=0,
        ge=0,
        description="how often groups without a spread of rewards are replaced by those of further prompts (dynamic sampling "
        "[DAPO, Yu et al. 2025, section 3.2]); what is left is dropped",
    )
    overlong: Literal["keep", "mask", "penalise"] = Field(
        default="keep",
        description="completions cut off at max_new_tokens count as any other, are left out, or cost up to 1 reward unit, rising "
        "over the last fifth of the length [DAPO, Yu et al. 2025, section 3.4]",
    )
    log_every: int = Field(default=10, ge=1, description="steps between points of the curves")
    evaluate_every: int = Field(
        default=10,
        ge=1,
        description="steps between answers to held-out prompts; the last weights inside the KL budget are kept",
    )
    evaluation_prompts: int = Field(default=32, ge=1, description="held-out prompts that are answered every so many steps")

    @model_validator(mode="after")
    def _has_a_penalty_to_adapt(self) -> GrpoSettings:
        if self.kl_target is not None and not self.kl_coefficient:
            raise ValueError("kl_target: beta starts at kl_coefficient, which must be above 0")
        return self


class JudgeSettings(Settings):
    kind: Literal["planted", "model"] = Field(
        default="planted", description="the planted rule (exact), or a reward model of the judge split"
    )
    steps: int = Field(default=150, ge=1, description="model: optimizer steps of the judge")


class EvaluationSettings(Settings):
    prompts: int = Field(default=150, ge=2, description="held-out prompts the policies answer")
    samples: int = Field(default=4, ge=1, description="completions sampled of each, beside the greedy one")
    top_k: int = Field(default=0, ge=0, description="sampled among the this many likeliest tokens; 0: all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sampled among the likeliest tokens of this total probability")
    best_of: int = Field(
        default=0, ge=0, description="above 1, each reward model also picks the best of this many completions of the base policy"
    )
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
