"""Run an inference model of Paddle's: a graph (.json of 3.x, .pdmodel of 2.x) and its weights beside it."""

from __future__ import annotations

import threading

import numpy as np

from tasks.code import plain_words
from tasks.engines.saved_run import Array, Saved, SavedRunner
from tasks.errors import BackendError
from tasks.paddle_model import loaded_paddle

WEIGHTS = "model.pdiparams"
_GPU_MEGABYTES = 256


class PaddleRunner(SavedRunner):
    """A predictor of paddle.inference: on the first CUDA device where Paddle has one, else (or with `cpu`) on the CPU."""

    def __init__(self, saved: Saved) -> None:
        super().__init__(saved)
        graph, device = saved.plan, saved.device
        if isinstance(graph, bytes):
            raise BackendError("bad data", f"the {saved.form} has its weights in a file of its own", "give its path")
        paddle = loaded_paddle()
        there = paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0
        if device is not None and device >= there:
            raise BackendError("no device", f"Paddle has no cuda:{device} here", "leave the device away")
        config = paddle.inference.Config(str(graph), str(graph.with_name(WEIGHTS)))
        config.disable_glog_info()
        if there and not saved.cpu:
            config.enable_use_gpu(_GPU_MEGABYTES, device or 0)
            self.device = f"cuda:{device or 0}"
        else:
            config.disable_gpu()
        if saved.threads is not None:
            config.set_cpu_math_library_num_threads(saved.threads)
        try:
            self._predictor = paddle.inference.create_predictor(config)
        except Exception as err:  # its exceptions share no base class
            raise BackendError(
                "bad data",
                f"{graph.name} is not read by paddle.inference {paddle.__version__}: {plain_words(str(err), 600)}",
                "pull it again, or install the Paddle that it was verified with",
            ) from err
        own = list(self._predictor.get_input_names())
        # With one input its name is free; several have the recipe's names.
        self._names = own if len(own) == len(self.inputs) == 1 else list(self.inputs)
        # A predictor keeps its inputs between calls.
        self._lock = threading.Lock()

    def _compute(self, arrays: list[Array]) -> list[Array]:
        with self._lock:
            for name, array in zip(self._names, arrays, strict=True):
                self._predictor.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(array))
            self._predictor.run()
            names = self._predictor.get_output_names()
            return [np.array(self._predictor.get_output_handle(name).copy_to_cpu()) for name in names]

    def close(self) -> None:
        """Drop the predictor."""
        del self._predictor


RUNNER = PaddleRunner
