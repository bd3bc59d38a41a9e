"""What runs in an arm's process: it loads the model, warms it up, and measures it when asked."""
