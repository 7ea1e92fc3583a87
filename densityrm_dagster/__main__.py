"""`python -m densityrm_dagster` is the command line."""

from densityrm_dagster.commands.main import main

main()
