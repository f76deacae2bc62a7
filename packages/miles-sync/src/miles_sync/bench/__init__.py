"""Measuring and proving: `miles-sync bench` and `miles-sync verify`, and what the scripts under benchmarks/ share."""
