"""Arithmetic: what a workload needs on which machines. Pure, deterministic, without torch."""
