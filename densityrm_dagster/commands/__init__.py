"""What a person types: `densityrm <command>`. Begin with `main`; `run` materializes the graph from the terminal."""
