"""`--plot`: a result as a picture."""
