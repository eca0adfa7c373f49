"""Probes: perplexity, and the recall of what heads attend to."""
