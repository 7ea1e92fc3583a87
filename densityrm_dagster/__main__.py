"""`python -m densityrm_dagster` is the command line."""

from densityrm_dagster.cli import main

main()
