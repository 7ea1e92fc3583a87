"""What an experiment needs of a machine before it is run: room, and time, by a few units of its real work.

Begin with `needs.disk_needed`, `needs.memory_needed` and `estimate.probe`. Imports policies, reward_models, models, training,
sources and the ground.
"""
