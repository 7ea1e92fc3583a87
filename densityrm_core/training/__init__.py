"""What every training shares and no model is known to: the loop, checkpoints, ranks, precision, curves.

Begin with `loop.optimize` and `loop.Watch`. Imports the ground alone: what learns is given weights and never sees densities.
"""
