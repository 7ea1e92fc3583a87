"""Policies talk: each goes on from its own replies, within the tokens its model can read, and a seed repeats it all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from densityrm_core.models.folders import CARD, ModelError, load_causal_lm
from densityrm_core.models.tokens import CHAT_TEMPLATE
from densityrm_core.policies.chat import Conversation, Policy, load_policy
from densityrm_core.policies.decoding import Decoding
from densityrm_core.reward_models.scoring import ConversationError, load_scorer
from densityrm_core.streams import stream_seed

from ..tiny_models import MAX_PROMPT_TOKENS, MAX_REPLY_TOKENS, TEXTS, tiny_language_model, tiny_reward_model

DECODING = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def policy(folder: Path) -> Policy:
    return load_policy(folder)


def foreign(folder: Path, target: Path, template: str | None = None) -> Path:
    """The same model as others would have saved it."""
    for file in folder.iterdir():
        if file.name not in (CARD, "chat_template.jinja"):
            (target / file.name).write_bytes(file.read_bytes())
    if template:
        (target / "chat_template.jinja").write_text(template)
    return target


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_a_reply_answers_all_that_was_said_before(policy: Policy):
    conversation = Conversation([policy], [DECODING], seed=3)
    conversation.instruct("Be brief.")
    (first,), (second,) = conversation.ask(TEXTS[0]), conversation.ask(TEXTS[2])
    said = [turn("system", "Be brief."), turn("user", TEXTS[0]), turn("assistant", first.text), turn("user", TEXTS[2])]
    assert second == policy.reply(said, DECODING, stream_seed(3, "chat", 1))


def test_each_policy_goes_on_from_its_own_replies(policy: Policy):
    short = replace(DECODING, max_new_tokens=3)
    both, alone = Conversation([policy, policy], [DECODING, short], 0), Conversation([policy], [short], 0)
    replies = [both.ask(text) for text in TEXTS]
    assert [second for _, second in replies] == [alone.ask(text)[0] for text in TEXTS]
    assert all(first != second for first, second in replies)


def test_a_seed_repeats_a_conversation_and_another_does_not(policy: Policy):
    def replies(seed: int) -> list[str]:
        conversation = Conversation([policy], [DECODING], seed)
        return [conversation.ask(text)[0].text for text in TEXTS]

    assert replies(1) == replies(1)
    assert replies(1) != replies(2)


def test_a_retry_draws_anew_and_takes_the_place_of_the_former_reply(policy: Policy):
    conversation = Conversation([policy], [DECODING], seed=0)
    first, second = conversation.ask(TEXTS[0]), conversation.retry()
    (third,) = conversation.ask(TEXTS[1])
    said = [turn("user", TEXTS[0]), turn("assistant", second[0].text), turn("user", TEXTS[1])]
    assert first != second
    assert third == policy.reply(said, DECODING, stream_seed(0, "chat", 2))


def test_there_is_nothing_to_retry_at_the_beginning_or_after_a_reset(policy: Policy):
    conversation = Conversation([policy], [DECODING], seed=0)
    conversation.ask(TEXTS[0])
    conversation.reset()
    with pytest.raises(ConversationError, match="nothing was asked yet"):
        conversation.retry()


def test_a_prompt_that_fails_leaves_the_conversation_as_it_was(folder: Path, tmp_path: Path):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + CHAT_TEMPLATE
    policy = load_policy(foreign(folder, tmp_path, refusing))
    failed, untouched = (Conversation([policy], [DECODING], seed=0) for _ in range(2))
    failed.ask(TEXTS[0])
    untouched.ask(TEXTS[0])
    failed.instruct("Be brief.")
    with pytest.raises(ConversationError, match="no system turn here"):
        failed.ask(TEXTS[1])
    failed.instruct("")
    assert failed.ask(TEXTS[1]) == untouched.ask(TEXTS[1])


def test_a_reply_has_the_reward_that_the_reward_model_gives_it(policy: Policy, folder: Path, tmp_path: Path):
    scorer = load_scorer(tiny_reward_model(tmp_path, folder))
    (reply,) = Conversation([policy], [DECODING], 0, scorer).ask(TEXTS[0])
    assert reply.reward == scorer.score([[turn("user", TEXTS[0])]], [reply.text])[0]


def test_a_reply_is_finished_where_its_end_was_written_and_cut_off_elsewhere(policy: Policy):
    never, always = replace(policy, ends=(-1,)), replace(policy, ends=tuple(range(300)))
    cut, ended = (one.reply([turn("user", TEXTS[0])], DECODING, 0) for one in (never, always))
    assert (cut.finished, ended.finished, ended.text) == (False, True, "")


def test_a_conversation_longer_than_the_prompts_of_training_loses_its_beginning(policy: Policy):
    conversation = Conversation([policy], [DECODING], seed=0)
    conversation.ask(TEXTS[0])
    assert policy.codec.truncated == 0
    conversation.ask(TEXTS[0] * 10)
    assert policy.codec.truncated == 1


def test_lengths_are_those_of_training(policy: Policy):
    assert (policy.codec.max_prompt_tokens, policy.codec.max_reply_tokens) == (MAX_PROMPT_TOKENS, MAX_REPLY_TOKENS)
    assert policy.notes == ()


def test_a_longer_reply_leaves_less_room_for_the_conversation(folder: Path):
    policy = load_policy(folder, max_new_tokens=500)  # of 512 positions
    assert (policy.codec.max_prompt_tokens, policy.codec.max_reply_tokens) == (12, 500)
    assert "keeps its last 12 tokens, replies have 500 at most" in policy.notes[0]


def test_a_reply_that_the_model_has_no_room_for_is_refused(folder: Path):
    with pytest.raises(ModelError, match="reads 512 tokens, so a reply can have 511 at most, not 512"):
        load_policy(folder, max_new_tokens=512)


def test_a_model_that_others_made_reads_all_it_can_and_says_so(folder: Path, tmp_path: Path):
    policy = load_policy(foreign(folder, tmp_path))
    assert (policy.codec.max_prompt_tokens, policy.codec.max_reply_tokens) == (256, 256)
    assert "keeps its last 256 tokens" in policy.notes[0]
    assert "no chat template" in policy.notes[1]


def test_a_model_that_others_made_ends_as_its_template_and_generation_config_say(folder: Path, tmp_path: Path):
    model = foreign(folder, tmp_path, CHAT_TEMPLATE.replace("eos_token", "'<|system|>'"))
    eos, end_of_turn, other = (
        load_policy(folder).codec.tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|system|>", "a")
    )
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, end_of_turn]}))
    ends = load_policy(model).ends
    assert ends[0] == end_of_turn
    assert set(ends) == {eos, end_of_turn, other}


def test_a_reward_model_writes_nothing(folder: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="is a reward model, which writes nothing"):
        load_policy(tiny_reward_model(tmp_path, folder))


def test_an_encoder_is_refused_by_name(tmp_path: Path):
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it holds a BertForMaskedLM, not a …ForCausalLM"):
        load_policy(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"nowhere is no model: there is no config\.json"):
        load_policy(tmp_path / "nowhere")


def test_weights_that_diverged_are_named(folder: Path, tmp_path: Path):
    model = load_causal_lm(folder)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(foreign(folder, tmp_path))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is not finite"):
        load_policy(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", CARD])
def test_a_file_that_is_cut_off_is_one_message(folder: Path, tmp_path: Path, name: str):
    foreign(folder, tmp_path)
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.name == name else content)
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_policy(tmp_path)
