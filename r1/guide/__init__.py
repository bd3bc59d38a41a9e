"""`python -m r1.guide`: which GPU holds a model, how fast it will be, and what a token costs.

In the order in which a question is answered:

gpus       what is published of each machine, every figure with its source and date (gpus.json)
steps      what a step's time is made of
measured   the rows of bench.py that predictions start from (measured.json, or --calibrate)
setup      a model on some machines: where experts lie, memory
layouts    the ways to share a model between machines, and the switches
links      what moves between devices, and from host memory or a drive
fit        does it fit: memory by what holds it, the largest batch and context, the fewest GPUs
predict    the floor, and the time to expect by the nearest measured row
cost       money and joules of a token
answer     all of these for one model and one machine
ranking    many answers in one order
page       answers and rankings as Markdown; rows for bench.py --compare
notes      the sentences below an answer: the slowest link, what a time starts from
picture    tokens a second against money
calibrate  how far predictions are from rows that were measured

Memory is counted by r1/footprint.py, which the loader asks too; the floor by r1/roofline.py, as in
bench.py's tables. Tested in tests/test_guide.py, test_guide_links.py and test_guide_command.py.
"""
