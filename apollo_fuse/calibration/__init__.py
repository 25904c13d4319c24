"""Measures the processor at hand for the cost model, in under a second, and keeps the figures."""
