"""Vectors to density, density to weights, of prompts and of pairs; the checks of the result, its card and map.

Begin with `weighing.weigh_prompts` and `pair_weights.weigh_pairs`. The formula of each density is in `definitions`, the exponent
of the weights is solved in `tempering`; `explain` says why a prompt weighs what it weighs. Imports pairs, vectors and the ground.
"""
