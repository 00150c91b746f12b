"""Measurements side by side: one command a topic, ratios of things run in turn, results committed beside them."""
