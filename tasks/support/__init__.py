"""What an ONNX file holds, and which targets can read it: nothing is compiled, and each question has its own process.

`enginery inspect` asks the functions of this package as entries of `tasks.process.run_stage`.
"""
