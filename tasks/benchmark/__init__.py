"""The `benchmark` stage: how fast an engine is, and what people would use instead, on one device in one run.

Enters: an engine, the shapes to time it at, and (for what is compared) the source's files and its simplified graph. Leaves:
`benchmark.json`, and for TensorRT `profile.json`, the time of each layer. `stage` starts one process for each candidate,
one after another; `workers` runs in those; `measure` has the rule by which a time is taken, and knows no framework; the
modules `plan_candidate`, `onnx_candidate` and `torch_candidate` each make one framework a `measure.Candidate`.
"""
