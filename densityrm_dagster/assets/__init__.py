"""The assets, a group a file. Each is a sentence: what it reads, the one core call, what it shows."""

OWNERS = ["team:densityrm"]
