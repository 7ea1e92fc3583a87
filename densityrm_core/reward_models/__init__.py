"""Bradley-Terry training, and rewards under a trained model: of pairs, of conversations, of the rows of a file.

Begin with `train.train_reward_model` and `scoring.load_scorer`; the loss is in `loss`. Imports models, training, the ground, and
sources where rows are read.
"""
