"""What the eight lessons share. Each module is imported where it is needed; none does work at import."""
