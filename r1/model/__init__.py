"""R1 itself: what a newcomer reads first."""
