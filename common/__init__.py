"""What the lessons share. Each module is imported where it is needed; none works at import."""
