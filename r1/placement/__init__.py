"""Where a weight lies.

placement    the base: everything on one device. build.py asks it while it makes and loads a model
cuts         one table: how each matrix is cut, and a device's share in whole blocks
parallel     tensor and expert parallel: each rank's part of every layer
offload      experts in host memory or files: what lies where, and how much memory that takes
streamed     one layer's experts there: passes over the slots of the device
stepping     the same in a captured step, which is cut in pieces
sources      where a missing expert comes from: host memory, or files with a cache before them
holding      what of it lies on the device or is on its way: slots, copies, passes
guessing     the next layer's experts, fetched before it has chosen
staging      places that layers share, through which a prompt's experts pass
traffic      counts: experts that were wanted, found and copied
slots        which expert lies in which slot, and which one gives its slot away
profile      a recording: how often each expert was chosen
link         pinned memory, and copies on a stream of their own
stages       pipeline parallel: each rank's range of layers
collectives  what ranks exchange: sums, and rows put together
symmetric    small sums over memory that GPUs map of each other
mesh         the ranks that share a model, in a grid, and what they agree on
alike        whether they loaded the same checkpoint
ranks        the processes of one command: how they meet, speak, listen and end

Tested in tests/: test_placement.py, test_offload.py, test_disk.py, test_routing.py,
test_parallel.py, test_allreduce.py, test_gpus.py and test_torchrun.py.
"""
