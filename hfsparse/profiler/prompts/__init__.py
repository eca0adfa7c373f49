"""The prompts that a model is calibrated on."""
