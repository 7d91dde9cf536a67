"""Measure the loss head: inputs, contenders, clock, memory, errors, report.

::

    inputs.Case ──contenders.run──▶ Outcome ──truth.errors──▶ how far off
         │               │
         │               ├──clock──▶ time in GEMMs    (1 = the bare product, 2·N·V·D)
         │               ├──memory──▶ peak bytes
         │               └──launches──▶ launches, waits, copies to the device
         └──measure──▶ live share                            all of it ──report──▶ rows, table, PNG

`str-kernels bench` and the scripts in ``benchmarks/`` measure with nothing else.
"""
