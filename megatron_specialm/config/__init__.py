"""What users write: the schema of a pipeline's YAML file and of a site profile, and how both are loaded."""
