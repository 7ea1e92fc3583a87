"""One reward-model step on rows that share their prompt, beside the padded computation of every sequence on its own.

Same model, pairs, batch, precision (float32) and threads (1), interleaved; medians. Keys: `ratio` (padded seconds / shared
seconds), `shared_pairs_per_s`, `padded_pairs_per_s`, `loss_difference`.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import interleaved
from densityrm_core.experiment import Experiment
from densityrm_core.models.base_model import train_base_model
from densityrm_core.models.folders import load_codec, new_reward_model, save_model
from densityrm_core.models.packing import pack, rewards
from densityrm_core.reward_models.loss import bradley_terry_loss
from densityrm_core.reward_models.scoring import PreferenceTokens, tokenize_pairs
from densityrm_core.settings import BaseModelSettings
from densityrm_core.sources import Folders, read_source
from densityrm_core.training.loop import Watch

PAIRS, ROUNDS = 32, 15


def main() -> None:
    torch.set_num_threads(1)
    experiment = Experiment()
    with tempfile.TemporaryDirectory() as folder:
        folders = Folders(Path(folder), Path(folder, "raw"), Path(folder, "shards"))
        raw = read_source("hh_rlhf", experiment.sources.hh_rlhf, experiment.planted, folders).pairs.frame()
        model, codec, _ = train_base_model(raw, BaseModelSettings(steps=0), Watch())
        save_model(model, codec, Path(folder, "base"), {})
        model, codec = new_reward_model(Path(folder, "base"), seed=0), load_codec(Path(folder, "base"))
    batch = tokenize_pairs(raw.head(PAIRS), codec)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "shared": lambda: _shared(model, batch),
        "padded": lambda: _padded(model, batch, codec.pad),
    }
    losses = {name: float(way()) for name, way in ways.items()}
    backwards = {name: lambda way=way: way().backward() for name, way in ways.items()}
    median = interleaved(backwards, ROUNDS, after=model.zero_grad)
    result = {
        "ratio": round(median["padded"] / median["shared"], 2),
        **{f"{name}_pairs_per_s": round(PAIRS / median[name], 1) for name in ways},
        "loss_difference": abs(losses["shared"] - losses["padded"]),
    }
    print(json.dumps(result))


def _shared(model: torch.nn.Module, batch: list[PreferenceTokens]) -> torch.Tensor:
    scores = rewards(model, pack([(pair.prompt, [pair.chosen, pair.rejected]) for pair in batch])).view(-1, 2)
    return bradley_terry_loss(scores[:, 0], scores[:, 1])


def _padded(model: torch.nn.Module, batch: list[PreferenceTokens], pad: int) -> torch.Tensor:
    rows = [pair.prompt + reply for pair in batch for reply in (pair.chosen, pair.rejected)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    scores = model(input_ids=ids, attention_mask=(ids != pad).long()).logits.view(-1, 2)
    return bradley_terry_loss(scores[:, 0], scores[:, 1])


if __name__ == "__main__":
    main()
