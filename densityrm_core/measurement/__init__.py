"""Rows to numbers with intervals, and the two hypotheses. Loads no model.

Begin with `reward_models.measure`, `policies.measure` and `hypotheses`; the intervals come from `bootstrap`. Imports the ground
alone: rows are all that it knows of what was learnt.
"""
