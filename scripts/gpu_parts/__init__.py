"""What `scripts/bench_gpu.py` measures, a file for each part, and how parts are run, timed and
reported.

    driver    runs parts one after another, each in a process of its own, within a budget
    child     what such a process does: the cases of its part, one after another
    clock     the device's time, memory, waits and profile; or the processor's, for a dry run
    models    models of given shapes with random weights, and rows to train on
    runs      `lora` commands inside this process, and what is seen of a training
    levers    ways to make a step quicker that are tried on a run
    report    the report as tables
"""
