"""Settings of a pipeline and of a site profile: schema, loading, presets, learning-rate schedules. Imports no torch."""
