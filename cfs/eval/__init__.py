"""Scoring a model's skills and showing what a run did."""
