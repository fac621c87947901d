"""One step to its action record: bring its inputs, run its stage in a child process, keep what it made.

Blobs are stored before the record, and the record is written only if there is none, so that a build
that dies at any instant leaves nothing visible, and two builders of one key produce one record.
"""

from __future__ import annotations

import datetime as dt
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from artifacts.cache import ActionCache
from artifacts.errors import IntegrityError
from artifacts.host import Host
from artifacts.records import ActionRecord
from artifacts.refs import BYTES, ONNX, SAFETENSORS, TAR, ArtifactRef, digest_file
from artifacts.store import Store, open_store
from recipes.digests import Digests
from recipes.errors import Fault, RecipeError
from recipes.files import CodeBundle, DatasetFiles, LocalFile, dataset_members
from recipes.steps import Step
from tasks.gpus import Slot, gpu_held, visible
from tasks.process import Limits, run_stage
from tasks.progress import Listener, Progress
from tasks.timing import TIMING_CACHE, combine_in_child, lent_cache
from tasks.toolchain import probe_host

_MEDIA_TYPES: Final[Mapping[str, str]] = {".onnx": ONNX, ".safetensors": SAFETENSORS, ".tar": TAR}


@dataclass(frozen=True)
class StepRunner:
    """Runs steps against one store; safe to use from many threads."""

    store: Store
    cache: ActionCache
    limits: Limits
    producer: Mapping[str, Any]
    listen: Listener = lambda _progress: None
    cancel: threading.Event = field(default_factory=threading.Event)
    host: Host | None = None  # this one; None: look
    slot: Slot | None = None  # of a GPU, besides this host's lock

    def run(self, step: Step) -> tuple[ActionRecord, bool]:
        """Return the step's record, and whether it was made here rather than found (another builder may be faster).

        Raises TaskError, RecipeError, StoreError, and IntegrityError where an input's blob is damaged (it is
        removed, so that planning again finds the stage that makes it missing).
        """
        action = step.action
        if action is None:
            raise ValueError(f"{step.id}: its inputs are not known yet")
        with self.store.lock(f"{action.stage}-{action.key}", give_up=self.cancel.is_set):
            found = self.cache.lookup(action.stage, action.key)
            if found is not None:
                return found, False
            self.listen(Progress(step.id, "started", text="; ".join(step.why)))
            started = dt.datetime.now(dt.timezone.utc)
            begin = time.perf_counter()
            outputs, facts = self._make(step)
            record = ActionRecord(
                preimage=action.preimage(),
                outputs=outputs,
                facts=facts,
                seconds=time.perf_counter() - begin,
                started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
                producer=self.producer,
            )
            kept = self.cache.put_record(record)
        self.listen(Progress(step.id, "done", seconds=record.seconds))
        return kept, kept is record

    def _make(self, step: Step) -> tuple[dict[str, ArtifactRef], dict[str, Any]]:
        with self.store.scratch() as folder:
            inputs = folder / "inputs"
            inputs.mkdir()
            if isinstance(step.local, LocalFile):
                return {step.local.name: self._fetch_file(step.local, inputs)}, {}
            if isinstance(step.local, CodeBundle):
                return {"code.tar": self._fetch_code(step.local, inputs)}, {}
            files = _dataset_inputs(step.local, inputs) if step.local is not None else {}
            for name, ref in step.inputs.items():
                files[name] = inputs / name
                files[name].parent.mkdir(parents=True, exist_ok=True)  # external data may lie in a folder of its own
                self.cache.get_blob(ref, files[name])
            made = self._run_stage(step, files, folder)
            if step.local is not None:
                _require_unchanged(step.local)
            return made

    def _run_stage(
        self, step: Step, files: Mapping[str, Path], folder: Path
    ) -> tuple[dict[str, ArtifactRef], dict[str, Any]]:
        output_dir = folder / "outputs"
        output_dir.mkdir()
        params = step.action.params if step.action is not None else {}
        device = step.action.toolchain.get("device") if step.action is not None else None
        host = self.host or probe_host()
        with gpu_held(
            params,
            device,
            gpus=host.gpus,
            waits=lambda: self.listen(Progress(step.id, "progress", None, "waiting for a GPU")),
            give_up=self.cancel.is_set,
            slot=self.slot,
        ) as gpu:
            loan = lent_cache(self.store, step, gpu, host)
            if loan is not None and loan.lend(folder / "inputs" / TIMING_CACHE):
                files = {**files, TIMING_CACHE: folder / "inputs" / TIMING_CACHE}
            result = run_stage(
                step.stage,
                params,
                files,
                output_dir,
                limits=self.limits,
                on_progress=lambda fraction, text: self.listen(Progress(step.id, "progress", fraction, text)),
                on_log=lambda line: self.listen(Progress(step.id, "log", text=line)),
                cancel=self.cancel,
                variables=visible(gpu),
            )
            facts, made = dict(result.facts), dict(result.outputs)
            if loan is not None:
                # Kept in one place for all builds, not as an output of each.
                made.pop(TIMING_CACHE, None)
                combine = combine_in_child(folder, self.limits, gpu)
                loan.take_back(output_dir / TIMING_CACHE, facts["timing_cache"], combine)
                facts["timing_cache"] = {**facts["timing_cache"], **loan.facts}
        outputs: dict[str, ArtifactRef] = {}
        for name, media_type in made.items():
            path = output_dir / name
            ref = ArtifactRef(digest_file(path), path.stat().st_size, media_type)
            self.cache.put_blob(path, ref)
            outputs[name] = ref
        return outputs, facts

    def _fetch_file(self, file: LocalFile, folder: Path) -> ArtifactRef:
        """Bring one file into the store, checked against the digest that was planned with."""
        path, size = Path(file.address), file.size
        if file.address.startswith("s3://"):
            parent, _, name = file.address.rpartition("/")
            remote = open_store(parent)
            info = remote.info(name)
            if info is None:
                raise RecipeError(
                    [Fault(file.address, 0, "", "there is no such object; correct the recipe, or upload it")]
                )
            size, path = info.size, folder / file.name
            try:
                remote.get_file(name, ArtifactRef(file.digest, size, BYTES), path)
            except IntegrityError as err:
                what = f"is not the file that the recipe's sha256 names: {err}"
                raise RecipeError([Fault(file.address, 0, "", what)]) from err
        ref = ArtifactRef(file.digest, size, _MEDIA_TYPES.get(Path(file.name).suffix, BYTES))
        try:
            self.cache.put_blob(path, ref)
        except IntegrityError as err:
            raise _changed(path) from err
        return ref

    def _fetch_code(self, bundle: CodeBundle, folder: Path) -> ArtifactRef:
        from recipes.bundle import write_tar

        target = folder / "code.tar"
        write_tar(bundle, target)
        ref = ArtifactRef(bundle.digest, bundle.size, TAR)
        self.cache.put_blob(target, ref)
        return ref


def _dataset_inputs(local: DatasetFiles, folder: Path) -> dict[str, Path]:
    """Put what a data set is read from where its stage looks for it. Raises RecipeError where it is not as planned."""
    if local.code is not None:
        from recipes.bundle import write_tar

        target = folder / "code.tar"
        write_tar(local.code, target)
        return {"code.tar": target}
    if local.format == "npz":
        target = folder / "data.npz"
        try:
            shutil.copyfile(local.path, target)
        except FileNotFoundError as err:
            raise _changed(local.path) from err
        if digest_file(target) != local.digest:
            raise _changed(local.path)
        return {"data.npz": target}
    return {"data": local.path}


def _require_unchanged(local: DatasetFiles) -> None:
    """Digest a folder again after it was read in place: its record must not hold other samples than its key names."""
    if local.format not in ("arrays", "images"):
        return  # read from a copy that was checked
    members = dataset_members(local.path, images=local.format == "images")
    try:
        digest = Digests().files(members)
    except OSError as err:
        raise _changed(local.path) from err
    if digest != local.digest:
        raise _changed(local.path)


def _changed(path: Path) -> RecipeError:
    return RecipeError([Fault(str(path), 0, "", "changed since the build was planned; run it again")])
