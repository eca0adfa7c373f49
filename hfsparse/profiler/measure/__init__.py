"""What heads do, and what candidates keep and lose of it."""
