"""Stages that do what real ones must not; each runs in a process of its own, started by `run_stage`."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from recipes.errors import Fault, RecipeError
from tasks.errors import BackendError, ModelCodeError
from tasks.stage import StageResult

FOREVER = 600


def well(request):
    request.report(0.25, "a quarter")
    request.report(7.0, "too much")
    request.report(float("nan"), "who knows")
    (request.output_dir / "out.txt").write_text(request.inputs["in.txt"].read_text() + request.params["suffix"])
    return StageResult({"out.txt": "text/plain"}, {"length": 3})


def surroundings(request):
    """Say what the process looks like to the stage."""
    Path("left behind").write_text("x")
    facts = {
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "path": sys.path,
        "modules": sorted(name for name in sys.modules if "." not in name),
        "stdin": sys.stdin.read(),
        "group": os.getpgid(0) == os.getpid(),
    }
    return StageResult({}, facts)


def sleep(request):
    sys.stdout.write("about to sleep\n")
    time.sleep(FOREVER)


def sleep_with_children(request):
    """Two grandchildren: one in this process group, one that left it. Their numbers go to a file."""
    pids = [
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER})"], start_new_session=apart).pid
        for apart in (False, True)
    ]
    write_whole(Path(request.params["pids"]), [os.getpid(), *pids])
    time.sleep(FOREVER)


def return_with_children(request):
    sleeper = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER})"])
    write_whole(Path(request.params["pids"]), [sleeper.pid])
    return StageResult({}, {})


def write_whole(path, value):
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value))
    temporary.rename(path)


def allocate(request):
    held = bytearray(request.params["bytes"])
    held[:: resource.getpagesize()] = b"x" * len(held[:: resource.getpagesize()])
    time.sleep(request.params.get("seconds", FOREVER))
    return StageResult({}, {"held": len(held)})


def allocate_in_child(request):
    code = f"import time; held = b'x' * {request.params['bytes']}; time.sleep({FOREVER})"
    subprocess.run([sys.executable, "-c", code], check=True)


def map_file(request):
    """Read a large file through a mapping: its pages are the kernel's to take back."""
    import mmap

    path = request.output_dir / "weights"
    with path.open("wb") as stream:
        stream.truncate(request.params["bytes"])
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        total = sum(mapped[index] for index in range(0, len(mapped), resource.getpagesize()))
        time.sleep(0.6)  # long enough to be measured
    return StageResult({}, {"total": total})


def segfault(request):
    sys.stdout.write("before the fault\n")
    ctypes.string_at(0)


def abort(request):
    os.abort()


def killed(request):
    os.kill(os.getpid(), signal.SIGKILL)


def exit_silently(request):
    os._exit(3)


def exit_politely(request):
    sys.exit(3)


def crash_after_the_result(request):
    """A native library that fails while the interpreter ends."""
    import atexit

    atexit.register(os.abort)
    return StageResult({}, {"done": True})


def print_garbage(request):
    os.write(1, b"\xff\xfe{not json}\n\x1b[31mred\x1b[0m bell\x07\n")
    os.write(2, b"10%\r20%\rno end")
    return StageResult({}, {})


def flood(request):
    for index in range(request.params["lines"]):
        sys.stdout.write(f"{index} {'x' * 90}\n")
    os.write(1, b"y" * 20_000)
    return StageResult({}, {})


def scribble_on_the_report(request):
    for descriptor in range(3, 1024):
        try:
            os.write(descriptor, b"mine\n")
        except OSError:
            continue
    time.sleep(FOREVER)


def fork_and_raise(request):
    child = os.fork()
    if child == 0:
        raise RuntimeError("only the copy")
    os.waitpid(child, 0)
    return StageResult({}, {"original": True})


def big_facts(request):
    return StageResult({}, {"text": "z" * 3_000_000})


def raise_backend(request):
    raise BackendError("no kernel", "no such thing", "try another")


def raise_model_code(request):
    raise ModelCodeError("model.py line 3: boom")


def raise_recipe(request):
    raise RecipeError([Fault("r.yaml", 3, "source.model", "wrong"), Fault("r.yaml", 0, "", "also wrong")])


def raise_other(request):
    raise KeyError("nobody expects this")


def raise_memory(request):
    raise MemoryError


def raise_bad_alloc(request):
    raise RuntimeError("std::bad_alloc")


def interrupted(request):
    raise KeyboardInterrupt


def import_missing(request):
    sys.modules[request.params["package"]] = None
    __import__(request.params["package"])


def import_broken(request):
    Path("onnxslim.py").write_text("raise ImportError('libcudart.so.13: cannot open', name='onnxslim')")
    sys.path.insert(0, str(Path.cwd()))
    __import__("onnxslim")


def import_own_missing(request):
    from tasks import no_such_module  # noqa: F401 - that is the fault


def file_too_large(request):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    with (request.output_dir / "big").open("wb") as stream:
        for _ in range(4):
            stream.write(bytes(1 << 20))


def fill(request):
    with Path(request.params["path"]).open("wb") as stream:
        while True:
            stream.write(bytes(1 << 16))
            stream.flush()


def not_a_result(request):
    return {"out": 1}


def not_finite(request):
    return StageResult({}, {"loss": float("nan")})


def not_json(request):
    return StageResult({}, {"loss": b"bytes"})


def missing_output(request):
    return StageResult({"model.onnx": "application/onnx"}, {})


def escaping_output(request):
    (request.output_dir.parent / "outside").write_text("x")
    return StageResult({"../outside": "text/plain"}, {})


def linked_output(request):
    (request.output_dir / "passwd").symlink_to("/etc/passwd")
    return StageResult({"passwd": "text/plain"}, {})
