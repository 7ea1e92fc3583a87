"""A file of conversations gets the rewards of training, row by row, and loses none of its rows."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import BertConfig, BertForSequenceClassification

from densityrm_core.models.folders import CARD, ModelError, load_reward_model
from densityrm_core.reward_models.score_file import Tally, score_rows
from densityrm_core.reward_models.scoring import Scorer, load_scorer, score_pairs, tokenize_pairs
from densityrm_core.sources.files import RawRow

from ..tiny_models import MAX_REPLY_TOKENS, TEXTS, tiny_language_model, tiny_reward_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return load_scorer(folder)


def lines(*contents: object) -> Iterator[RawRow]:
    for number, content in enumerate(contents, start=1):
        text = content if isinstance(content, str) else json.dumps(content)
        yield RawRow(f"rows.jsonl:{number}", text.encode(errors="surrogateescape"))


def scored(scorer: Scorer, *contents: object) -> list[dict[str, Any]]:
    return list(score_rows(lines(*contents), scorer, Tally()))


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"{TEXTS[0]} {i}", "chosen": f"{TEXTS[1]} {i % 7}", "rejected": f"{TEXTS[2]} {i % 5}"}


def test_pairs_get_the_rewards_of_training(scorer: Scorer):
    contents = [pair(i) for i in range(40)]
    contexts = [[{"role": "user", "content": row["prompt"]}] for row in contents]
    chosen, rejected = score_pairs(
        scorer.model, tokenize_pairs(pl.DataFrame(contents).with_columns(context=pl.Series(contexts)), scorer.codec)
    )
    rows = scored(scorer, *contents)
    assert [row["reward_chosen"] for row in rows] == pytest.approx(chosen.tolist(), abs=1e-5)
    assert [row["reward_rejected"] for row in rows] == pytest.approx(rejected.tolist(), abs=1e-5)
    assert [row["margin"] for row in rows] == pytest.approx((chosen - rejected).tolist(), abs=1e-5)


def test_a_response_gets_the_reward_it_has_in_a_pair(scorer: Scorer):
    whole, *parts = scored(
        scorer, pair(3), *({"prompt": pair(3)["prompt"], name: pair(3)["chosen"]} for name in ("response", "completion"))
    )
    assert [row["reward"] for row in parts] == pytest.approx([whole["reward_chosen"]] * 2, abs=1e-5)


def test_a_text_is_one_turn_of_the_user_and_a_reply_may_be_a_turn_of_the_assistant(scorer: Scorer):
    turns = {
        "prompt": [{"role": "user", "content": pair(1)["prompt"]}],
        "response": [{"role": "assistant", "content": pair(1)["chosen"]}],
    }
    text, listed = scored(scorer, {"prompt": pair(1)["prompt"], "response": pair(1)["chosen"]}, turns)
    assert listed["reward"] == pytest.approx(text["reward"], abs=1e-6)


def test_rows_keep_their_order_and_their_other_fields(scorer: Scorer):
    contents = [{**pair(i), "number": i, "nested": {"ünï": [i, None]}} for i in range(1200)]
    rows = scored(scorer, *contents)
    assert [{key: row[key] for key in contents[0]} for row in rows] == contents


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{broken", "broken JSON"),
        ("[1, 2]", "must be an object"),
        ('{"prompt": "\\ud800", "response": "x"}', "surrogate"),
        ('{"prompt": "\udcff", "response": "x"}', "invalid UTF-8"),
        ({"response": "x"}, "'prompt' is missing"),
        ({"prompt": 3, "response": "x"}, "'prompt' must be a text, not a number"),
        ({"prompt": "x"}, "neither 'chosen' and 'rejected', nor 'response'"),
        ({"prompt": "x", "chosen": "y"}, "'rejected' is missing"),
        ({"prompt": "x", "response": None}, "'response' must be a text, not null"),
        ({"prompt": [], "response": "x"}, "'prompt' must end with a turn that the reply answers"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "response": "x"}, "'prompt' must end with a turn"),
        ({"prompt": [{"role": "user"}], "response": "x"}, "'prompt[0].content' is missing"),
        ({"prompt": "x", "response": [{"role": "user", "content": "x"}]}, "one turn of the assistant"),
    ],
)
def test_a_row_that_cannot_be_scored_is_kept_and_says_where_and_why(scorer: Scorer, content: object, fault: str):
    tally = Tally()
    before, row, after = score_rows(lines(pair(0), content, pair(1)), scorer, tally)
    assert row["error"].startswith("rows.jsonl:2: ")
    assert fault in row["error"]
    assert not {"reward", "reward_chosen", "margin"} & set(row)
    kept = {key: value for key, value in row.items() if key != "error"}
    assert kept == content or kept["raw"] == str(content).encode(errors="surrogateescape").decode(errors="replace")
    assert "margin" in before
    assert "margin" in after
    assert (tally.rows, tally.errors, tally.pairs) == (3, 1, 2)


def test_columns_of_an_earlier_scoring_are_replaced(scorer: Scorer):
    failed = {**pair(0), "error": "rows.jsonl:9: column 'rejected' is missing"}
    (stale,) = scored(scorer, {**pair(0), "margin": 9.0, "reward": 9.0})
    assert failed.keys() - scored(scorer, failed)[0].keys() == {"error"}
    assert stale == scored(scorer, pair(0))[0]


def test_a_reply_of_a_hundred_thousand_characters_is_cut_as_in_training_and_counted(scorer: Scorer):
    before = scorer.codec.truncated
    long, cut = "Sure, oil it. " * 7200, "Sure, oil it. " * 30
    rows = scored(scorer, {"prompt": "x", "response": long}, {"prompt": "x", "response": cut}, {"prompt": "x", "response": "No."})
    assert len(scorer.codec.reply(cut)) == MAX_REPLY_TOKENS
    assert rows[0]["reward"] == pytest.approx(rows[1]["reward"], abs=1e-6)
    assert scorer.codec.truncated == before + 3  # two rows, and the line above


def test_an_empty_prompt_and_an_empty_reply_are_scored(scorer: Scorer):
    (row,) = scored(scorer, {"prompt": "", "response": ""})
    assert isinstance(row["reward"], float)


def test_a_tie_counts_as_half_a_win(scorer: Scorer):
    tally = Tally()
    list(score_rows(lines({"prompt": "x", "chosen": "same", "rejected": "same"}), scorer, tally))
    assert (tally.pairs, tally.wins) == (1, 0.5)


def test_memory_does_not_grow_with_the_number_of_rows(scorer: Scorer):
    def peak(number: int) -> int:
        row = RawRow("rows.jsonl:1", json.dumps({"prompt": "x", "response": 1, "padding": "." * 2000}).encode())
        tracemalloc.start()
        for _ in score_rows((row for _ in range(number)), scorer, Tally()):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(4096) < 1.2 * peak(1024)


def test_a_reward_that_is_no_number_is_an_error(folder: Path):
    model = load_scorer(folder)
    model.model.score.weight.data.fill_(float("nan"))
    assert scored(model, pair(0))[0]["error"] == "rows.jsonl:1: the model's reward is not finite"


def test_a_model_that_others_made_is_cut_to_half_its_positions_each_and_says_so(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        if file.name not in (CARD, "chat_template.jinja"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    foreign = load_scorer(tmp_path)
    assert (foreign.codec.max_prompt_tokens, foreign.codec.max_reply_tokens) == (256, 256)
    assert "last 256 tokens" in foreign.notes[0]
    assert "no chat template" in foreign.notes[1]
    assert scored(foreign, pair(0))[0]["margin"] == pytest.approx(scored(load_scorer(folder), pair(0))[0]["margin"], abs=1e-5)


def test_a_language_model_is_no_reward_model(tmp_path: Path):
    with pytest.raises(ModelError, match=r"it holds a Qwen3ForCausalLM, not a …ForSequenceClassification"):
        load_scorer(tiny_language_model(tmp_path))


def test_a_classifier_of_several_labels_is_no_reward_model(folder: Path, tmp_path: Path):
    model = load_reward_model(folder)
    model.config.num_labels = 3
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it has 3 labels, and a reward is one"):
        load_scorer(tmp_path)


def test_an_encoder_is_refused_by_name(tmp_path: Path):
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertForSequenceClassification has no head"):
        load_scorer(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"nowhere is no model: there is no config\.json"):
        load_scorer(tmp_path / "nowhere")
