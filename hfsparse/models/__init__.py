"""What is known of a user's model: how it is loaded, its shape, window and chat template."""
