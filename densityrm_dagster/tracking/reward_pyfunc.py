"""A registered reward model as MLflow runs it. MLflow keeps a copy of this file beside the weights; nothing here imports it.

The columns `prompt` (one user turn) and `response` become `reward`, by the tokens and rows of training.
"""

from typing import Any

import mlflow
import pandas as pd

WEIGHTS = "reward_model"  # name of the artifact that is the Hugging Face folder


class RewardModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        from densityrm_core.hardware import pick_device
        from densityrm_core.reward_models.scoring import load_scorer

        self._scorer = load_scorer(context.artifacts[WEIGHTS], pick_device("auto"))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        contexts = [[{"role": "user", "content": prompt}] for prompt in model_input["prompt"]]
        return pd.DataFrame({"reward": self._scorer.score(contexts, list(model_input["response"]))}, index=model_input.index)


mlflow.models.set_model(RewardModel())
