"""Ours beside the peer on the same work, in one run. Each module prints one JSON object as its last line."""
