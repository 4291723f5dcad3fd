"""Results as rows, and the tables, figures and costs derived from them. Imports no torch."""
