"""What `bench.py` is made of: arms (what is compared), worker (one arm's process), parity (is it
still right), roofline (../roofline.py: what the hardware allows), report (what a person reads)."""
