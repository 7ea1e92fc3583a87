"""What the Dagster UI shows of values: a file a group of assets. Begin with the group whose card you look at."""
