"""Experiments of published papers, run again: one module and one command each."""
