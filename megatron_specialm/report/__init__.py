"""Results as rows; tables, figures and costs made of them. Imports no torch."""
