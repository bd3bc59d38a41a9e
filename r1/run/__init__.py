"""How a step is called, and how text is made of steps."""
