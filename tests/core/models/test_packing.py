"""Packed rows compute what padded ones do: rewards, log-probabilities and gradients, for every kind of model we train."""

import copy
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Qwen2Config,
    Qwen3Config,
)

from densityrm_core.models.attention import AttentionError, attention_kernel, lay_out, packed_attention, resolve_kernel
from densityrm_core.models.likelihood import log_probs
from densityrm_core.models.nanochat_classifier import register_classifier
from densityrm_core.models.packing import (
    backbone_of,
    hidden_states,
    pack,
    rewards,
    say_if_padded,
    split_by_tokens,
    treat_alike,
    why_padded,
)
from densityrm_core.reward_models.loss import bradley_terry_loss

COMMON = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "gpt2": GPT2Config(vocab_size=120, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=0),
    "nanochat": NanoChatConfig(**COMMON),
}
MODELS = pytest.mark.parametrize("name", list(CONFIGS))


def language_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))


def reward_model(name: str) -> torch.nn.Module:
    config = copy.deepcopy(CONFIGS[name])
    config.num_labels = 1
    register_classifier()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def groups(count: int = 12, branches: int = 2) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of 1 to 90 tokens, some groups larger than a span."""
    draw = torch.Generator().manual_seed(1)

    def ids(most: int) -> list[int]:
        return torch.randint(1, 120, (int(torch.randint(1, most, (1,), generator=draw)),), generator=draw).tolist()

    return [(ids(90), [ids(120) for _ in range(branches)]) for _ in range(count)]


def rows_of(given: list) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [prompt + branch for prompt, branches in given for branch in branches]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, (ids != 0).long()


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@MODELS
def test_loss_and_gradients_equal_the_models_own_padded_forward(name: str):
    model, given = reward_model(name), groups()
    assert why_padded(model) == ""
    packed = rewards(model, pack(given)).view(-1, 2)
    ids, mask = rows_of(given)
    padded = model(input_ids=ids, attention_mask=mask).logits.view(-1, 2)
    assert packed.detach().numpy() == pytest.approx(padded.detach().numpy(), abs=1e-5)
    ours, theirs = (gradient(model, bradley_terry_loss(r[:, 0], r[:, 1])) for r in (packed, padded))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("reply", [120, 5])
@MODELS
def test_log_probs_and_gradients_equal_the_full_softmax_of_padded_rows(name: str, reply: int):
    model = language_model(name)
    given = [(prompt, [branch[:reply] for branch in branches]) for prompt, branches in groups(6, branches=3)]
    assert why_padded(model) == ""
    packed = log_probs(model, pack(given), temperature=0.7)
    ids, mask = rows_of(given)
    scores = (model(input_ids=ids, attention_mask=mask).logits / 0.7).log_softmax(-1)
    padded, row = [], 0
    for prompt, branches in given:
        for branch in branches:
            padded += [scores[row, len(prompt) - 1 + i, token] for i, token in enumerate(branch)]
            row += 1
    plain = torch.stack(padded)
    assert packed.detach().numpy() == pytest.approx(plain.detach().numpy(), abs=1e-5)
    ours, theirs = gradient(model, packed.mean()), gradient(model, plain.mean())
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@MODELS
def test_a_branch_knows_nothing_of_its_siblings_and_neighbours(name: str):
    model = language_model(name).eval()
    first = log_probs(model, pack([([5, 6, 7], [[20, 21], [9, 10, 11]]), ([8], [[3]])]))
    second = log_probs(model, pack([([8, 9], [[40]]), ([5, 6, 7], [[30], [9, 10, 11]])]))
    assert first[2:5].detach().numpy() == pytest.approx(second[2:5].detach().numpy(), abs=1e-6)


@MODELS
def test_the_order_of_pairs_in_a_batch_does_not_matter(name: str):
    model, given = reward_model(name).eval(), groups()
    forth, back = rewards(model, pack(given)), rewards(model, pack(given[::-1]))
    assert forth.view(-1, 2).detach().numpy() == pytest.approx(back.view(-1, 2).flip(0).detach().numpy(), abs=1e-6)


def test_a_model_with_sliding_windows_is_computed_on_padded_rows_and_named():
    config = MistralConfig(**COMMON, sliding_window=16, num_labels=1)
    torch.manual_seed(0)
    model, given = AutoModelForSequenceClassification.from_config(config), groups()
    assert "mistral models" in why_padded(model)
    ids, mask = rows_of(given)
    ours, theirs = rewards(model, pack(given)), model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert ours.detach().numpy() == pytest.approx(theirs.detach().numpy(), abs=1e-5)


def test_a_model_that_ignores_the_layout_is_found_out(monkeypatch: pytest.MonkeyPatch):
    model = reward_model("llama")
    whole = lambda sizes, device="cpu": lay_out([(sum(p + sum(b) for p, b in sizes), [])], device)  # noqa: E731  plain causal
    monkeypatch.setattr("densityrm_core.models.packing.lay_out", whole)
    assert "compute packed rows otherwise" in why_padded(model)


def test_padded_rows_give_every_token_of_the_packed_row():
    model, given = language_model("qwen3").eval(), groups(4)
    from densityrm_core.models.packing import _padded

    batch = pack(given)
    assert _padded(model, batch).detach().numpy() == pytest.approx(hidden_states(model, batch).detach().numpy(), abs=1e-5)


def test_spans_are_as_long_as_neighbouring_groups_allow():
    layout = lay_out([(100, [50, 50]), (20, [10, 10]), (10, [1, 1]), (400, [5]), (3, [3, 3])])
    assert layout.sizes == (200, 52, 405, 9)


def test_parts_are_filled_in_order_and_a_large_group_stands_alone():
    given = [([1] * n, [[1] * n]) for n in (10, 20, 100, 5, 5)]
    assert split_by_tokens(given, 64) == [[0, 1], [2], [3, 4]]


@MODELS
def test_the_last_layer_computes_scored_rows_only(name: str):
    model, given = reward_model(name).eval(), pack(groups())
    seen: list[int] = []
    last = (model.transformer.h if name == "gpt2" else model.model.layers)[-1]
    act = next(module for path, module in last.mlp.named_modules() if path in {"act_fn", "act", "activation_fn"})
    act.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    narrow = rewards(model, given)
    assert seen[-1] == len(given.ends)
    whole = model.score(hidden_states(model, given)[given.ends]).squeeze(-1)
    assert seen[-1] == given.ids.shape[1]
    assert narrow.detach().numpy() == pytest.approx(whole.detach().numpy(), abs=1e-5)


def test_a_last_layer_that_refuses_a_few_rows_is_computed_whole():
    class Router(torch.nn.Module):
        def __init__(self, mlp: torch.nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if tokens.shape[1] <= 4:
                raise ValueError("too few tokens to route")
            return self.mlp(tokens)

    model, given = reward_model("llama").eval(), pack(groups())
    expected = rewards(model, given).detach().numpy()
    routed = reward_model("llama").eval()
    routed.model.layers[-1].mlp = Router(routed.model.layers[-1].mlp)
    assert rewards(routed, pack(groups(2))).shape == (4,)
    assert rewards(routed, given).detach().numpy() == pytest.approx(expected, abs=1e-5)


def test_a_compiled_last_layer_is_computed_whole():
    model, given = reward_model("llama").eval(), pack(groups(3))
    expected = rewards(model, given).detach().numpy()
    model.model.layers[-1].compile(backend="eager")
    assert rewards(model, given).detach().numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.takes("attention=spans", "attention=flex_eager")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@MODELS
def test_flex_attention_computes_what_spans_do_forth_and_back(name: str):
    given, found = groups(5), []
    for kernel in ("spans", "flex_eager"):
        with attention_kernel(kernel):
            scorer, policy = reward_model(name), language_model(name)
            assert why_padded(scorer) == why_padded(policy) == ""
            batch = pack(given)
            r = rewards(scorer, batch)
            loss = bradley_terry_loss(*r.view(-1, 2).unbind(1))
            likely = log_probs(policy, batch)
            of_rewards, of_likelihood = gradient(scorer, loss), gradient(policy, likely.mean())
            found.append((r.detach(), likely.detach(), of_rewards, of_likelihood))
    (r, likely, *gradients), (flex_r, flex_likely, *flex_gradients) = found
    assert flex_r.numpy() == pytest.approx(r.numpy(), abs=1e-5)
    assert flex_likely.numpy() == pytest.approx(likely.numpy(), abs=1e-5)
    for one, other in zip(gradients, flex_gradients, strict=True):
        assert (one - other).norm() / one.norm() < 1e-5


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU with g++, which is not installed")
@pytest.mark.takes("attention=flex")
def test_compiled_flex_attention_computes_what_spans_do():
    """On a CPU it has a forward pass alone; `benchmarks.gpu_check` runs both on a GPU."""
    model, given = reward_model("llama").eval(), groups(5)
    with torch.no_grad(), attention_kernel("flex"):
        flex = rewards(model, pack(given))
    assert flex.numpy() == pytest.approx(rewards(model, pack(given)).detach().numpy(), abs=1e-5)


@pytest.mark.parametrize(("device", "expected"), [("cpu", "spans"), ("cuda", "flex"), ("cuda:1", "flex")])
def test_the_kernel_follows_from_the_device(device: str, expected: str):
    assert resolve_kernel(device) == expected
    with attention_kernel("flex_eager"):
        assert resolve_kernel(device) == "flex_eager"
    assert resolve_kernel(device) == expected


def _no_compiler(*_: object) -> torch.Tensor:
    raise RuntimeError("no compiler was found\nadvice to programmers")


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (
            lambda query, *_: torch.zeros_like(query).transpose(1, 2),
            r"computes otherwise than spans here \(by .*\); set it to spans",
        ),
        (_no_compiler, r"fails on this device \(no compiler was found\); set it to spans"),
    ],
    ids=["wrong", "failing"],
)
def test_a_kernel_that_is_not_to_be_had_is_an_error_and_no_reason_for_padding(
    attend: object, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("densityrm_core.models.attention._attend_blocks", attend)
    with attention_kernel("flex_eager"), pytest.raises(AttentionError, match=message):
        rewards(reward_model("llama"), pack(groups(2)))
    assert why_padded(reward_model("llama")) == ""


def test_training_by_compiled_flex_attention_on_a_processor_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("densityrm_core.models.packing._check_kernel", lambda model, kernel: None)  # which would compile
    with attention_kernel("flex"), pytest.raises(AttentionError, match="no backward pass on a processor"):
        rewards(reward_model("llama"), pack(groups(2)))


def test_padding_is_told():
    said: list[str] = []
    say_if_padded(reward_model("llama"), said.append)
    assert said == []
    say_if_padded(AutoModelForCausalLM.from_config(MistralConfig(**COMMON, sliding_window=16)), said.append)
    assert said == ["rows are padded, which is slower: mistral models attend within a sliding window here"]


def test_a_copy_in_a_coarser_precision_takes_packed_rows_as_its_original_does():
    model = language_model("llama").eval()
    copied = copy.deepcopy(model).bfloat16()
    treat_alike(copied, model)
    assert why_padded(copied) == ""
    sliding = AutoModelForCausalLM.from_config(MistralConfig(**COMMON, sliding_window=16))
    copied = copy.deepcopy(sliding).bfloat16()
    treat_alike(copied, sliding)
    assert "mistral models" in why_padded(copied)


@MODELS
def test_a_large_groups_branches_apart_are_the_padded_computation_too(name: str):
    """Log-probabilities and gradients, with groups of one call for each branch between groups that share one."""
    draw = torch.Generator().manual_seed(2)
    large = [
        ([5, 6, 7] * 9, [torch.randint(1, 120, (n,), generator=draw).tolist() for n in (30, 7, 41, 1, 30)]),
        ([4], [[5], [6]]),
    ]
    given = [*groups(2), *large, *groups(1, 3)]
    model = language_model(name)
    batch = pack(given)
    assert sum(prompt is not None for prompt in batch.layout.prompts) >= 4
    ids, real = rows_of(given)
    scores = model(input_ids=ids, attention_mask=real).logits.log_softmax(-1)
    starts = [(len(prompt), len(branch)) for prompt, branches in given for branch in branches]
    plain = torch.cat(
        [
            scores[row, start - 1 : start + length - 1].gather(-1, ids[row, start : start + length, None]).squeeze(-1)
            for row, (start, length) in enumerate(starts)
        ]
    )
    packed = log_probs(model, batch)
    assert packed.detach().numpy() == pytest.approx(plain.detach().numpy(), abs=1e-5)
    weight = torch.randn(len(plain), generator=draw)
    expected, shared = gradient(model, (plain * weight).sum()), gradient(model, (log_probs(model, batch) * weight).sum())
    assert (shared - expected).norm() / expected.norm() < 1e-5


def test_all_tensors_of_a_batch_stand_on_its_device():
    """`meta` holds no data, so whatever was left on the CPU fails to meet it."""
    batch = pack(groups(), "meta")
    layout = batch.layout
    tensors = [batch.ids, batch.positions, batch.ends, batch.sources, batch.targets, batch.branch]
    tensors += [layout.group, layout.branch, *layout.masks]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    for name in ("llama", "qwen2", "qwen3", "nanochat"):  # GPT-2 looks at its ids
        model = language_model(name).to("meta")
        backbone = backbone_of(model)
        with packed_attention(model, backbone):
            output = backbone(input_ids=batch.ids, position_ids=batch.positions, layout=layout, use_cache=False)
        output.last_hidden_state.sum().backward()


def test_totals_are_sums_over_branches():
    batch = pack([([1], [[2, 3], [4]]), ([1, 2], [[5, 6, 7]])])
    assert batch.totals(torch.tensor([[1.0, 2, 4, 8, 16, 32], [1, 1, 1, 1, 1, 1]])).tolist() == [[3, 4, 56], [2, 1, 3]]
