from __future__ import annotations

import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from densityrm_core.density import plots
from densityrm_core.measurement import policies as policy_metrics
from densityrm_core.measurement.reward_models import measure, reliability
from densityrm_core.report import policy_plots, reward_model_plots
from densityrm_core.tables import (
    DENSITY_WEIGHTS,
    METRICS,
    POLICY_CURVES,
    POLICY_DIVERSITY,
    POLICY_EVALUATION,
    RM_EVALUATION,
)
from densityrm_core.training import plots as training_plots

from ..policy_rows import curves_of, diversity_of

LIMIT = 100 * 1024
NO_RM = measure(RM_EVALUATION.empty(), 1)
NO_POLICIES = policy_metrics.measure(POLICY_EVALUATION.empty(), POLICY_DIVERSITY.empty(), 1)


def weights(n: int = 5000) -> pl.DataFrame:
    w = np.random.default_rng(0).lognormal(0, 0.6, n)
    return DENSITY_WEIGHTS.check(
        DENSITY_WEIGHTS.frame(
            [
                {"prompt_id": f"{i}", "split": "train" if i else "test", "pairs": 1, "group": f"{i}", "log_density": 0.0,
                 "density": 1.0, "decile": 1, "quartile": 1, "weight": w[i] / w[1:].sum() if i else None}
                for i in range(n)
            ]
        )
    )  # fmt: skip


def metrics() -> pl.DataFrame:
    steps = range(0, 20000, 100)
    return METRICS.frame(
        [{"step": s, "metric": "loss", "value": 0.7 * 0.9999**s} for s in steps]
        + [{"step": s, "metric": "accuracy", "value": 0.8 - 0.3 * 0.9999**s} for s in steps]
    )


def rm() -> pl.DataFrame:
    rng = np.random.default_rng(1)
    accuracy = {"rm_uniform": [0.6 + 0.02 * d for d in range(11)], "rm_density": [0.68 + 0.01 * d for d in range(11)]}
    accuracy |= dict(zip(("bag_of_words", "longer_reply", "shorter_reply"), ([0.61] * 11, [0.44] * 11, [0.56] * 11), strict=True))
    rows = [
        {"seed": s, "model": m, "set": "test", "pair_id": f"{i}", "prompt_id": f"{i}", "src": f"s{i % 4}",
         "decile": i % 10 + 1, "quartile": i % 10 // 3 + 1, "reward_chosen": rng.normal(), "reward_rejected": 0.0,
         "correct": float(rng.random() < accuracy[m][i % 10 + 1]), "chars_chosen": int(rng.integers(1, 99)),
         "chars_rejected": 50, "fingerprint": "f"}
        for s in range(3) for m in accuracy for i in range(400)
    ]  # fmt: skip
    return RM_EVALUATION.check(RM_EVALUATION.frame(rows))


def policies() -> pl.DataFrame:
    rng = np.random.default_rng(2)
    gain = {"base": 0.0, "a": 0.4, "b": 0.6, "c": 0.45, "d": 0.65, "best_of_16_uniform": 0.5, "best_of_16_density": 0.55}
    rows = [
        {"seed": s, "policy": p, "prompt_id": f"{i}", "decile": i % 10 + 1, "quartile": 1, "sample": k, "completion": "",
         "judge_reward": g + 0.05 * s + rng.normal(0, 0.4), "own_reward": None if p == "base" else g, "tokens": 12,
         "rm_uniform_reward": g + rng.normal(0, 0.4), "rm_density_reward": g + rng.normal(0, 0.4), "entropy": 2.0,
         "kl": 8 * g * g + 0.2 * s if p != "base" else 0.0, "fingerprint": "f"}
        for s in range(3) for p, g in gain.items() for i in range(50) for k in range(3)
    ]  # fmt: skip
    return POLICY_EVALUATION.check(POLICY_EVALUATION.frame(rows))


def measured() -> pl.DataFrame:
    return policy_metrics.measure(policies(), diversity_of(policies()), 100)


FIGURES = {
    "weight_histogram": lambda: plots.weight_histogram(weights()),
    "lorenz_curve": lambda: plots.lorenz_curve(weights()),
    "curves": lambda: training_plots.curves(metrics(), ["loss", "accuracy", "absent"], "pairs seen"),
    "accuracy_by_decile": lambda: reward_model_plots.accuracy_by_decile(measure(rm(), 200)),
    "accuracy_by_source": lambda: reward_model_plots.accuracy_by_source(measure(rm(), 200)),
    "reliability_diagram": lambda: reward_model_plots.reliability_diagram(reliability(rm(), 200), measure(rm(), 200)),
    "policy_rewards": lambda: policy_plots.policy_rewards(measured()),
    "wins_by_decile": lambda: policy_plots.wins_by_decile(measured()),
    "reward_against_kl": lambda: policy_plots.reward_against_kl(curves_of(policies())),
    "diversity": lambda: policy_plots.diversity(measured()),
}
EMPTY = {
    "weight_histogram": lambda: plots.weight_histogram(DENSITY_WEIGHTS.empty()),
    "lorenz_curve": lambda: plots.lorenz_curve(DENSITY_WEIGHTS.empty()),
    "curves": lambda: training_plots.curves(METRICS.empty(), ["loss"], "pairs seen"),
    "accuracy_by_decile": lambda: reward_model_plots.accuracy_by_decile(NO_RM),
    "accuracy_by_source": lambda: reward_model_plots.accuracy_by_source(NO_RM),
    "reliability_diagram": lambda: reward_model_plots.reliability_diagram(reliability(RM_EVALUATION.empty(), 1), NO_RM),
    "policy_rewards": lambda: policy_plots.policy_rewards(NO_POLICIES),
    "wins_by_decile": lambda: policy_plots.wins_by_decile(NO_POLICIES),
    "reward_against_kl": lambda: policy_plots.reward_against_kl(POLICY_CURVES.empty()),
    "diversity": lambda: policy_plots.diversity(NO_POLICIES),
}


def is_small_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) < LIMIT


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_a_png_below_100_kib(name):
    assert is_small_png(FIGURES[name]())


@pytest.mark.parametrize("name", EMPTY)
def test_empty_table_gives_a_figure_that_says_so(name):
    assert is_small_png(EMPTY[name]())


def test_uniform_weights_can_be_drawn():
    uniform = weights(100).with_columns(pl.lit(0.01).alias("weight"))
    assert is_small_png(plots.weight_histogram(uniform))


def test_equal_tables_give_equal_bytes():
    assert FIGURES["policy_rewards"]() == FIGURES["policy_rewards"]()


def test_base_policy_alone_can_be_drawn():
    assert is_small_png(policy_plots.policy_rewards(measured().filter(policy="base")))


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, densityrm_core.density.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def test_drawing_leaves_pyplot_alone():
    code = (
        "import sys, densityrm_core.training.plots as p; from densityrm_core.tables import METRICS;"
        "p.curves(METRICS.empty(), ['x'], 'y'); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603
