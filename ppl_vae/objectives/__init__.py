"""Objectives read from any pair's traces, their gradient estimators and divergences."""
