"""Texts as unit vectors, kept from run to run, and the nearest of them.

Begin with `embedding.embed_prompts`, `encoders.load_encoder` and `neighbors.build_search`. Imports the ground alone.
"""
