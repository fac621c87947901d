"""The stages: what turns inputs into outputs, each in a process of its own.

Enters: a `Step` of a plan, and a store. Leaves: an action record whose blobs are stored. Imports
`recipes` and `artifacts`; `tasks.sources` and `tasks.engines` import no sibling of theirs.
Map: `stage` (what a stage's code gets and returns), `child` (the process it runs in), `process`
(starting, bounding and classifying that process), `run` (a step to its record), `cache` (where
Prefect's task states meet action records), `remembered` and `shared_plans` (plans that are fresh
still), `toolchain` (what is installed here), and the stages:
`fetch`, `sources/`, `simplify`, `calibrate`, `outliers`, `sensitivity`, `precision`, `engines/`, `verify`, `benchmark/`, `publish`.
"""
