"""Calibration of posteriors: ranks of parameters that generated the data among draws."""
