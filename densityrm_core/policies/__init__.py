"""Completions, their rewards, GRPO, and a conversation with the result.

Begin with `grpo.train_policy` and `rollout.sample_completions`; what is asked is in `questions`, the loss in `loss`. Imports
reward_models, models, training and the ground.
"""
