"""Results as rows, with the tables, figures and costs derived from them; estimates of a config. Imports no torch."""
