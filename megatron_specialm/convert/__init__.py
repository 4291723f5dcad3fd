"""Conversion of models and tokenizers to other formats; each conversion is verified."""
