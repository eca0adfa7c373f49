"""How samples are drawn, asked and kept."""
