"""The parts of `bench.py`.

In the order in which a measurement uses them:

flags            the command line's arguments
commands         choose between measuring, --show, --compare and --explain
plan             which arms on which workloads, checked before anything is measured
arms, ablation   the arms: settings of the switches
sizes            the context and the memory, checked before anything is made
workload, exam   the work that each arm does; the problems that it is asked
measure          all arms on all workloads
busy, progress   how busy other programs keep the machine; what is said meanwhile
compiler_checks  Inductor's test of the CPU, once for all arms
reference        the fp32 reference, in its own process
session          one arm's process, as the parent sees it
process          a child process and the pipe to it
team             an arm that devices share: a child on each rank, asked as one
worker/          the commands that run in the child: build, measure, parity, energy, profile
parity           compare logits with the reference's
routing, upcast  changes to a model: even routing; fp32 arithmetic on bf16 weights
timeline         the time of each kernel, from a profiler's trace
exchange         what devices exchange in a decode step: its time, what of it is exposed, bytes
result           a result file: how it begins, and how paths are kept out of it
load_result      read a result file back, and check it (report/types.py has the types)
report/          answers -> rows -> tables and text; report/speedup.py says what a speed-up is
plot/            a result as a picture
output           stdout, --output-file, --plot: checked before measuring, lost to no full disk
merge            --compare: results of several machines, and r1.guide's predictions, in one table

The hardware's limits come from r1/roofline.py.
Tested in tests/test_bench.py, test_bench_table.py, test_gate.py (parity), test_bench_plot.py,
test_bench_results.py, test_bench_serving.py, test_exam.py, test_exchange.py and
test_torchrun.py.
"""
