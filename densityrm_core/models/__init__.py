"""Language models as folders: load, save, convert; tokens, packed rows and attention to them; the base model and its tuning.

Begin with `folders`, `tokens.Codec`, `packing.pack` and `base_model.train_base_model`. Imports training and the ground.
"""
