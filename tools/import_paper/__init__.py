"""Thresholds that the paper's own code calibrated, as a store."""
