"""Judging fused weights: metrics, controls, comparisons, tracking, plots and reports."""
