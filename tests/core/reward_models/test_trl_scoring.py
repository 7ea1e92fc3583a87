"""TRL's GRPOTrainer takes a reward model's folder as it is, and reads the rewards that we read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from densityrm_core.models.folders import (
    load_causal_lm,
    load_codec,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    save_model,
)
from densityrm_core.models.tokens import Codec
from densityrm_core.reward_models.scoring import load_scorer

from ..tiny_models import TEXTS, tiny_language_model, tiny_reward_model

# Closes the assistant's turn as Qwen's and SmolLM2's templates do: end-of-sequence, then a line break
_LINE_BREAK_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", TEXTS[0], "", TEXTS[3])]
REPLIES = [TEXTS[1], "No.", "", "  Sure,\n\noil it. ünï"]


def trl_rewards(folder: Path, output: Path) -> list[float]:
    """Rewards as TRL's own trainer computes them, on one padded batch."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    policy, few = tiny_language_model(output / "policy"), {"per_device_train_batch_size": 2, "num_generations": 2}
    trainer = trl.GRPOTrainer(
        model=load_causal_lm(policy),
        processing_class=load_tokenizer(policy),
        reward_funcs=str(folder),
        args=trl.GRPOConfig(str(output), use_cpu=True, bf16=False, report_to=[], **few),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )
    inputs: list[dict[str, Any]] = [{"prompt": prompt} for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": reply}] for reply in REPLIES]
    return trainer._calculate_rewards(inputs, PROMPTS, completions, [[0]] * len(PROMPTS))[:, 0].tolist()


def test_trl_reads_our_rewards_from_the_folder(tmp_path: Path):
    folder = tiny_reward_model(tmp_path)
    assert trl_rewards(folder, tmp_path) == pytest.approx(load_scorer(folder).score(PROMPTS, REPLIES), abs=1e-4)


def test_auto_classes_read_our_rewards_from_the_folder(tmp_path: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_reward_model(tmp_path)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    conversations = [[*p, {"role": "assistant", "content": r}] for p, r in zip(PROMPTS, REPLIES, strict=True)]
    batch = tokenizer.apply_chat_template(conversations, return_tensors="pt", padding=True, return_dict=True)
    with torch.no_grad():
        logits = model(**batch).logits
    assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    assert logits[:, 0].tolist() == pytest.approx(load_scorer(folder).score(PROMPTS, REPLIES), abs=1e-4)


def test_a_template_that_goes_on_after_end_of_sequence_has_trl_read_one_token_later(tmp_path: Path):
    folder = tiny_reward_model(tmp_path)
    (folder / "chat_template.jinja").write_text(_LINE_BREAK_TEMPLATE)
    scorer = load_scorer(folder)
    codec, (line_break,) = scorer.codec, scorer.codec._encode("\n")
    replies = [[[*codec.reply(reply), line_break]] for reply in REPLIES]
    later = [reward for (reward,) in scorer.rewards([(codec.prompt(p), r) for p, r in zip(PROMPTS, replies, strict=True)])]
    found = trl_rewards(folder, tmp_path)
    assert found == pytest.approx(later, abs=1e-4)
    assert found != pytest.approx(scorer.score(PROMPTS, REPLIES), abs=1e-4)


def test_padding_that_the_base_model_had_no_embedding_for_can_be_fed_to_the_saved_model(tmp_path: Path):
    base = tiny_language_model(tmp_path / "base")
    file = base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "pad_token": settings["eos_token"]}))  # as many base models have it
    vocabulary = load_tokenizer(base)
    vocabulary.add_special_tokens({"pad_token": "<|padding|>"})
    assert vocabulary.pad_token_id == load_causal_lm(base).config.vocab_size
    save_model(new_reward_model(base, seed=0), Codec(vocabulary, 24, 16), tmp_path / "rm", {})
    folder = tmp_path / "rm"
    pad, model = load_codec(folder).pad, load_reward_model(folder)
    assert model.get_input_embeddings().num_embeddings == pad + 1
    scores = load_scorer(folder).score(PROMPTS, REPLIES)
    rows = [load_codec(folder).prompt(p) + load_codec(folder).reply(r) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0].tolist() == pytest.approx(scores, abs=1e-4)
