"""What trained models and baselines do on held-out prompts: rows, no numbers yet.

Begin with `reward_models`, `policies`, `curves`, `diversity`; arms are compared by `judge.load_judge`. Imports policies,
reward_models, models, sources and the ground.
"""
