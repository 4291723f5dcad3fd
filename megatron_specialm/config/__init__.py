"""What a pipeline is: the schema of its YAML file, how it is loaded, and the graph of tasks derived from it."""
