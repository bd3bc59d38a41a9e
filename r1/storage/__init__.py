"""How a matrix lies in memory."""
