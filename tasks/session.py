"""One build of one recipe: plan, run what is ready, plan again, until nothing is left.

Everything that a build knows is in the store, so a session can be left at any instant and another
continues. Within a process, a step that several callers ask for (the head start of the command line,
and the Prefect task that shows it) runs once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from artifacts.cache import ActionCache, blob_path, record_path
from artifacts.errors import ArtifactError, IntegrityError, NotFoundError, UnavailableError
from artifacts.gathered import Gathered
from artifacts.host import Host
from artifacts.leases import Lease, leased
from artifacts.observed import ObservedStore, Sight
from artifacts.publications import PUBLICATIONS
from artifacts.records import ActionRecord
from artifacts.refits import Base, RefitIndex, refit_identity
from artifacts.store import Store
from recipes.errors import RecipeError
from recipes.files import RecipeFiles, gather
from recipes.loader import LoadedRecipe, load
from recipes.plan import Plan, Selection
from recipes.planner import plan
from recipes.schema import duration_seconds, size_bytes
from recipes.steps import Step
from tasks.errors import BackendError, StageCancelledError, TaskError
from tasks.latest import Preimages, keep_latest, latest_path, read_latest
from tasks.patience import patiently
from tasks.progress import Listener, Progress
from tasks.publish import is_published, other_store, publish_engines
from tasks.slots import Slots
from tasks.toolchain import probe_host, version

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tasks.gpus import Slot
    from tasks.run import StepRunner

T = TypeVar("T")

DEFAULT_JOBS: Final = 2
_RERUNS: Final = 3
_SAID: Final = 4000  # how much of what steps said is kept for who comes later


@dataclass(frozen=True)
class Outcome:
    """What became of one step in this build. `seconds` is the wall time that making it took, whenever that was."""

    step: Step
    state: str  # "built" | "cached" | "failed" | "interrupted": the store did not answer, and it is to be tried again
    seconds: float
    message: str = ""


@dataclass
class BuildSession:
    """A recipe, a store and a host; `plan` and `ensure` may be called from any thread."""

    loaded: LoadedRecipe
    files: RecipeFiles
    store: Store
    host: Host
    selection: Selection = field(default_factory=Selection)
    jobs: int = DEFAULT_JOBS
    warn: Callable[[str], None] = lambda _message: None
    listen: Listener = lambda _progress: None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)  # of the packages that made the portable stages
    slot: Slot | None = None  # of a GPU, besides this host's lock
    retries: int = 0  # of whatever fails because the store does not answer

    def __post_init__(self) -> None:
        """Prepare the cache, the limits of stages and the explanations."""
        self._cache = ActionCache(self.store, self._warn_once, lambda: self._lease)
        self._seen = ObservedStore(self.store)
        self._versions: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._slots = Slots(self.jobs)
        self._known: dict[tuple[str, str], ActionRecord | None] = {}
        self._running: dict[str, Future[tuple[ActionRecord, bool]]] = {}
        self._failures: dict[str, str] = {}
        self._spent: dict[str, float] = {}
        self._attempts: dict[str, int] = {}
        self._interruptions: dict[str, int] = {}
        self._warned: set[str] = set()
        self._bases: dict[str, tuple[Base, ...]] = {}
        self._said: deque[Progress] = deque(maxlen=_SAID)
        self._followers: list[Listener] = []
        self._telling = threading.Lock()
        self._publishing = threading.Lock()
        self._published: dict[str, ActionRecord | Exception] = {}
        self._cancelled = threading.Event()
        self._latest: tuple[bytes, str] | None = None
        self._lease: Lease | None = None
        self._leasing = threading.Lock()
        self._holders = 0
        self._lease_ends = ExitStack()

    @cached_property
    def _runner(self) -> StepRunner:
        """What runs steps; planning does without it, and without what it imports."""
        from tasks.process import Limits
        from tasks.run import StepRunner

        build = self.loaded.recipe.build
        return StepRunner(
            self.store,
            self._cache,
            Limits(timeout_s=duration_seconds(build.timeout), memory_bytes=size_bytes(build.memory)),
            producer={"host": self.host.name, "os": self.host.os},
            listen=self._tell,
            cancel=self._cancelled,
            host=self.host,
            slot=self.slot,
        )

    @property
    def recipe_name(self) -> str:
        """The recipe's name."""
        return self.loaded.recipe.name

    @property
    def latest_path(self) -> str:
        """Where the preimages of the recipe's last build are kept."""
        return latest_path(self.recipe_name)

    def objects_read(self) -> dict[str, dict[str, Sight]]:
        """Return what was found of the objects that this session's plans were made from, there or not, by store."""
        found: dict[str, dict[str, Sight]] = {}
        for seen in self._shelves:
            found[seen.uri] = {**found.get(seen.uri, {}), **seen.sights}
        return found

    def see(self, gathered: Gathered) -> None:
        """Plan with what was gathered of the store, where that has it, until a step is built or a lease is taken."""
        self._seen.through(gathered)

    def pack(self, planned: Plan) -> dict[str, dict[str, list[Any]]]:
        """Return what others can plan these steps with (`artifacts.gathered`), as this session read it; nothing where it was gathered."""
        sights, pack = self._seen.sights, {}
        for step in planned.steps:
            if step.record is None:
                continue
            record = step.record
            paths = [record_path(record.stage, record.key), *(blob_path(ref.digest) for ref in record.outputs.values())]
            if record.stage == "publish":
                shown = (f"{record.facts['path']}/", f"{PUBLICATIONS}/{self.recipe_name}/")
                paths += [path for path in sights if path.startswith(shown)]
            pack[step.id] = {
                path: [seen.size, seen.version, _text(self._seen.texts.get(path))]
                for path in paths
                if (seen := sights.get(path)) is not None and seen.there and seen.version
            }
        if all(self._seen.is_gathered(path) for paths in pack.values() for path in paths):
            return {}
        if self._latest is not None:
            data, version = self._latest
            pack[""] = {self.latest_path: [len(data), version, _text(data)]}
        return pack

    def versions_read(self) -> dict[str, str | None]:
        """Return the versions of packages that this session's plans asked for."""
        return dict(self._versions)

    def anew(self) -> BuildSession:
        """Return a session of the same recipe that knows nothing yet: its plans are made from what the store has now, at once."""
        return replace(self, outcomes={}, listen=lambda _progress: None, retries=0)

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Keep garbage collectors off what this build uses, for a block: what was planned before it is looked up anew.

        Blocks of several threads share one lease.
        """
        with self._leasing:
            if self._lease is None:
                what = f"build {self.recipe_name}"
                self._lease = self._patiently(lambda: self._lease_ends.enter_context(leased(self.store, what)))
                with self._lock:
                    self._known.clear()
                    self._seen.directly()
            self._holders += 1
        try:
            yield
        finally:
            with self._leasing:
                self._holders -= 1
                if not self._holders:
                    self._lease = None
                    self._lease_ends.close()

    def plan(self) -> Plan:
        """Plan with what the store holds and what failed in this session."""
        with self._lock:
            failures, spent = dict(self._failures), dict(self._spent)
        return self._patiently(
            lambda: plan(
                self.loaded.recipe,
                self.files,
                self.host,
                version=self._version,
                lookup=self._lookup,
                previous=lambda: self._previous,
                failures=failures,
                selection=self.selection,
                bases=self._refit_bases,
                spent=spent,
            )
        )

    def ensure(self, step: Step, planned: Plan) -> Outcome:
        """Run a ready step, or join the one that runs it, or find that it is cached; failures are outcomes.

        "interrupted", up to `retries` times: the store did not answer, nothing failed yet, and the caller is to come again.
        """
        if step.action is None:
            raise ValueError(f"{step.id}: its inputs are not known yet")
        if step.record is not None:
            return self._note(Outcome(step, "cached", step.record.seconds))
        if step.state == "failed":  # in this session, maybe before the caller looked
            return self._note(Outcome(step, "failed", 0.0, "; ".join(step.why)))
        from concurrent.futures import Future

        key = step.action.key
        with self._lock:
            future = self._running.get(key)
            mine = future is None
            if future is None:
                future = self._running[key] = Future()
        if mine:
            self._run(step, planned, future)
        try:
            record, built = future.result()
        except UnavailableError as err:
            with self._lock:
                interrupted = key not in self._failures
            outcome = Outcome(step, "interrupted" if interrupted else "failed", 0.0, str(err))
            return outcome if interrupted else self._note(outcome)
        except (TaskError, RecipeError, ArtifactError) as err:
            return self._note(Outcome(step, "failed", 0.0, str(err)))
        return self._note(Outcome(step, "built" if built else "cached", record.seconds))

    def on_progress(self, listen: Listener) -> None:
        """Tell `listen` from now on what running steps say; it is called from several threads."""
        self.listen = listen

    def follow(self, listen: Listener) -> None:
        """Tell `listen` too what steps say: at once what they have said lately, then what they will; it has to be quick."""
        with self._telling:
            for progress in self._said:
                listen(progress)
            self._followers.append(listen)

    def _tell(self, progress: Progress) -> None:
        self.listen(progress)
        with self._telling:
            self._said.append(progress)
            for follow in self._followers:
                follow(progress)

    def cancel(self) -> None:
        """Stop every stage that runs, and start none; safe to call in a signal handler."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether the build was asked to stop."""
        return self._cancelled.is_set()

    def finish(self, planned: Plan) -> None:
        """Keep the preimages of this build, so that the next plan can say what changed."""
        steps = {step.id: step.action.preimage() for step in planned.steps if step.record is not None and step.action}
        if steps:
            known = self._seen.gathered(self.latest_path)
            self._latest = self._patiently(lambda: keep_latest(self.store, self.recipe_name, steps, known))

    def _run(self, step: Step, planned: Plan, future: Future[tuple[ActionRecord, bool]]) -> None:
        key = step.action.key if step.action is not None else ""
        try:
            # A benchmark runs alone: whatever else this build does would be in its times.
            with self._slots.taken(self.jobs if step.stage == "benchmark" else 1):
                result = self._make(step, planned)
        except (IntegrityError, NotFoundError) as err:
            self._input_gone(step, key, err, future)
        except UnavailableError as err:
            self._interrupted(step, key, err, future)
        except (TaskError, RecipeError, ArtifactError) as err:
            self._fail(step, key, err, future)
        except BaseException as err:
            future.set_exception(err)
            raise
        else:
            if step.stage == "compile":
                self._offer_refit(result[0])
            # Noted before any plan can see the record: who then finds the step cached learns that it was built here.
            self._note(Outcome(step, "built" if result[1] else "cached", result[0].seconds))
            with self._lock:
                self._known[step.stage, key] = result[0]
            future.set_result(result)

    def _make(self, step: Step, planned: Plan) -> tuple[ActionRecord, bool]:
        if self.cancelled:
            raise StageCancelledError(f"{step.id}: cancelled")
        begin = time.monotonic()
        self._require_versions(step)
        try:
            return self._publish(step, planned) if step.stage == "publish" else self._runner.run(step)
        finally:  # what failed has cost its time too
            if step.action is not None:
                with self._lock:
                    self._spent[step.action.key] = time.monotonic() - begin

    def _require_versions(self, step: Step) -> None:
        """Refuse to make here what was planned with packages of another host: its record would not tell the truth."""
        toolchain = step.action.toolchain if step.action is not None else {}
        for package in sorted(set(toolchain) & set(self.versions)):
            here = version(package)
            if here != self.versions[package]:
                raise BackendError(
                    "version mismatch",
                    f"{step.id} is planned with {package} {self.versions[package]}, here is {here or 'none'}",
                    "give all pools the same packages, or run build/recipe, which makes the portable stages elsewhere",
                )

    def _publish(self, step: Step, planned: Plan) -> tuple[ActionRecord, bool]:
        key = step.action.key if step.action is not None else ""
        self._tell(Progress(step.id, "started", text="; ".join(step.why)))
        with self._publishing:  # who comes second finds what the first has published with its own
            if key not in self._published:
                self._publish_ready(planned)
            record = self._published.pop(key)
        if isinstance(record, Exception):
            raise record
        self._tell(Progress(step.id, "done", seconds=record.seconds))
        # Built even where an earlier record counts: what it had published was gone, and is there again.
        return record, True

    def _publish_ready(self, planned: Plan) -> None:
        """Publish every engine of a plan that is ready for it, together: all become visible, or none does."""
        engines = {
            engine.publish.action.key: (engine.publish, engine)
            for engine in planned.engines
            if engine.publish is not None and engine.publish.ready and engine.publish.action is not None
        }
        without = {
            f"{engine.target} {engine.asked}": engine.state
            for engine in planned.engines
            if engine.state in ("waiting", "failed")
        }
        with self._lock:
            built = [name for name, outcome in self.outcomes.items() if outcome.state == "built"]
        try:
            records = publish_engines(
                engines, planned.steps, self.loaded, self.host, self.store, built=built, without=without
            )
        except (TaskError, RecipeError, ArtifactError) as err:
            self._published |= dict.fromkeys(engines, err)
            return
        for key, (_step, engine) in engines.items():
            self._published[key] = self._cache.put_record(records[key])
            for one in engine.parts.values() or [engine]:
                if one.compile is not None and one.compile.stage == "compile" and one.compile.record is not None:
                    self._offer_refit(one.compile.record, records[key].facts["path"].removeprefix("engines/"))

    def _offer_refit(self, compiled: ActionRecord, engine: str | None = None) -> None:
        """List a plan that new weights can be put into, with the engine that it became; a build goes on without."""
        refit = compiled.facts.get("refit")
        if not isinstance(refit, dict) or "structure" not in refit:
            return
        try:
            index = RefitIndex(self.store)
            index.add(refit_identity(compiled.preimage, refit["structure"]), Base(compiled.key, engine))
        except ArtifactError as err:
            self._warn_once(f"the plan {compiled.key[:12]} cannot be offered for refitting: {err}")

    def _refit_bases(self, identity: str) -> tuple[Base, ...]:
        """Return what may be refitted as this session first saw it, so that all of its plans agree."""
        with self._lock:
            if identity in self._bases:
                return self._bases[identity]
        found = RefitIndex(cast("Store", self._seen)).bases(identity)
        with self._lock:
            return self._bases.setdefault(identity, found)

    def _input_gone(self, step: Step, key: str, err: ArtifactError, future: Future[tuple[ActionRecord, bool]]) -> None:
        """Forget what was known, since an input's blob is damaged or gone: the next plan makes it again."""
        self._warn_once(f"{step.id}: {err}")
        with self._lock:
            self._attempts[key] = self._attempts.get(key, 0) + 1
            self._known.clear()
            self._seen.directly()
            # Nor may what ran well in this session be handed out again: it is the maker of the input that has to run.
            self._running = {
                other: running
                for other, running in self._running.items()
                if other != key and (other in self._failures or not running.done())
            }
            given_up = self._attempts[key] >= _RERUNS
        if given_up:
            self._fail(step, key, err, future)
        else:
            future.set_exception(err)

    def _interrupted(
        self, step: Step, key: str, err: UnavailableError, future: Future[tuple[ActionRecord, bool]]
    ) -> None:
        """Let a step be tried again whose store does not answer, as often as may be."""
        with self._lock:
            self._interruptions[key] = self._interruptions.get(key, 0) + 1
            again = self._interruptions[key] <= self.retries and not self.cancelled
            if again:
                del self._running[key]
        if again:
            self._tell(Progress(step.id, "log", text=f"Warning: {err}"))
            future.set_exception(err)
        else:
            self._fail(step, key, err, future)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Do what reads or writes the store outside of steps, again where it does not answer."""
        return patiently(call, self.retries, warn=self.warn, wait=self._cancelled.wait)

    def _fail(self, step: Step, key: str, err: Exception, future: Future[tuple[ActionRecord, bool]]) -> None:
        with self._lock:
            self._failures[key] = str(err)
        self._tell(Progress(step.id, "failed", text=str(err)))
        future.set_exception(err)

    def _lookup(self, stage: str, key: str) -> ActionRecord | None:
        """Look a record up once in a session: what is missing stays missing until this session makes it."""
        with self._lock:
            if (stage, key) in self._known:
                return self._known[stage, key]
        gathered = self._seen.is_gathered(record_path(stage, key))
        record = self._found(stage, key, (lambda _message: None) if gathered else self._warn_once)
        if record is None and gathered:  # not as it was when it was packed: what the store itself says, counts
            self._seen.directly()
            record = self._found(stage, key, self._warn_once)
        with self._lock:
            return self._known.setdefault((stage, key), record)

    def _found(self, stage: str, key: str, warn: Callable[[str], None]) -> ActionRecord | None:
        record = ActionCache(cast("Store", self._seen), warn, lambda: self._lease).lookup(stage, key)
        if (
            record is not None
            and stage == "publish"
            and not all(is_published(record, cast("Store", one)) for one in self._shelves)
        ):
            warn(f"publish {key[:12]}: what it published is gone; treated as a miss")
            return None
        return record

    @cached_property
    def _shelves(self) -> tuple[ObservedStore, ...]:
        """Where engines have to be for their record to hold: the store, and another folder where the recipe names one.

        The address of that folder is no part of the record, which another checkout of the recipe may have made. One in
        S3 is not asked: planning would wait for the network, and its name means the same everywhere.
        """
        to = self.loaded.recipe.publish.to
        other = other_store(to, self.loaded.path) if to is not None and not to.startswith("s3://") else None
        return (self._seen,) if other is None else (self._seen, ObservedStore(other))

    def _version(self, package: str) -> str | None:
        if package in self.versions:
            return self._versions.setdefault(package, self.versions[package])
        return self._versions.setdefault(package, version(package))

    def _note(self, outcome: Outcome) -> Outcome:
        with self._lock:
            first = self.outcomes.get(outcome.step.id)
            if first is None or (first.state == "failed" and outcome.state != "failed"):
                self.outcomes[outcome.step.id] = outcome
            return self.outcomes[outcome.step.id]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self.warn(message)

    @cached_property
    def _previous(self) -> Preimages:
        return read_latest(self.store, self.recipe_name)


def _text(data: bytes | None) -> str | None:
    try:
        return data.decode() if data is not None else None
    except UnicodeDecodeError:
        return None


def open_session(
    recipe: Path,
    store: Store,
    *,
    targets: tuple[str, ...] = (),
    jobs: int = DEFAULT_JOBS,
    warn: Callable[[str], None] = lambda _message: None,
    listen: Listener = lambda _progress: None,
    host: Host | None = None,
    versions: Mapping[str, str | None] | None = None,
    retries: int = 0,
    slot: Slot | None = None,
) -> BuildSession:
    """Load a recipe and gather what it names; nothing is written and none of its code runs. Raises RecipeError.

    `host` is what this host counts as (None: all that it is); `versions` are those of the packages with which portable
    stages were planned elsewhere; `retries` bounds how often what fails because the store does not answer is tried again.
    """
    loaded = load(recipe)
    return BuildSession(
        loaded,
        gather(loaded),
        store,
        host or probe_host(),
        Selection(targets),
        jobs=jobs,
        warn=warn,
        listen=listen,
        versions=versions or {},
        retries=retries,
        slot=slot,
    )


_ACTIVE: dict[str, BuildSession] = {}


@contextmanager
def activate(recipe: str, session: BuildSession) -> Iterator[None]:
    """Offer a session of this process to the flow that is about to build the same recipe."""
    _ACTIVE[recipe] = session
    try:
        yield
    finally:
        del _ACTIVE[recipe]


def active_session(recipe: str) -> BuildSession | None:
    """Return the session that this process has begun for a recipe, if any."""
    return _ACTIVE.get(recipe)
