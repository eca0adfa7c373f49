"""Whether a plan keeps the answers, and which heads are given back until it does."""
