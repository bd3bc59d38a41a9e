"""Where a weight lies."""
