"""Pairs of all sources as one table: what is taken of each, deduplicated, split by prompt; and who looks at it.

Begin with `union.unite_pairs` and `prompts.unique_prompts`. `card`, `plots` and `inspection` show the result, `nanochat_folder`
writes and reads it in nanochat's layout. Imports `sources` and the ground.
"""
