"""Copies what a store holds into another, in the order in which it may be seen: blobs, records, engines, channels.

What is there already, in its size, is not sent again, so that a mirror that was killed goes on where it was. Engines that
were published together become visible together at the other end as well: all that is to be sent of a publication, or, where one
of it is damaged, nothing. Documents
arrive byte for byte, and signatures with them: a policy that holds at one end holds at the other. A channel that is behind
moves on; one that went another way since is left as it is, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from artifacts.attestation import FOLDER
from artifacts.cache import blob_path, record_path
from artifacts.catalog import SIGNATURES, EngineCatalog, EngineId
from artifacts.channels import Channel, channel_path, channels_of, read_channel
from artifacts.errors import IntegrityError, NotFoundError, TrustError
from artifacts.leases import leased
from artifacts.manifest import MANIFEST_NAME, Manifest
from artifacts.publications import completed, mark_of, publication_path, read_publication
from artifacts.records import ActionRecord
from artifacts.refs import BYTES, ArtifactRef, digest_bytes, is_digest
from artifacts.store import Store
from artifacts.trust import Trust

_BLOBS: Final = "cache/blobs/sha256/"
_RECORDS: Final = "cache/actions/"
_ALSO: Final = ("hosts/", "pins/")


@dataclass
class Mirrored:
    """What a mirror did: objects and bytes sent, engines that are at the other end, channels moved, and what it left."""

    objects: int = 0
    size: int = 0
    engines: list[str] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


@dataclass
class Mirror:
    """Copies from one store to another; only engines of `recipe`, or that `channel` names, and what they came through.

    `warn` is told, in one sentence, of what is passed over. Damaged bytes are never sent. Signatures are read back at the other end and
    compared, and checked by the policy of `judge` where there is one: an engine that does not pass is named among what was left.
    """

    source: Store
    target: Store
    recipe: str | None = None
    channel: str | None = None
    warn: Callable[[str], None] = lambda _message: None
    judge: Trust | None = None
    done: Mirrored = field(default_factory=Mirrored)
    _put: set[str] = field(default_factory=set)

    def run(self) -> Mirrored:
        """Copy, and return what was done. Raises StoreError; what was copied until then stays, and is whole."""
        # Engines are chosen first, so that everything they name goes before them.
        engines = self._engines()
        with leased(self.target, "mirror", [str(engine) for engine in engines]):
            for record in self._records([manifest for manifest in engines.values() if manifest is not None]):
                self._send_record(record)
            if self._whole:
                for info in self.source.list(_BLOBS):
                    digest = info.path.rpartition("/")[2]
                    if is_digest(digest):
                        self._send_file(info.path, ArtifactRef(digest, info.size, BYTES))
            for group, publications in self._together(engines):
                self._send_engines({engine: engines[engine] for engine in group}, publications)
            for channel in self._channels():
                self._send_channel(channel)
            if self._whole:
                for prefix in _ALSO:
                    for info in self.source.list(prefix):
                        self._send_document(info.path, self.source.read(info.path))
        return self.done

    @property
    def _whole(self) -> bool:
        return self.recipe is None and self.channel is None

    def _channels(self) -> Iterator[Channel]:
        recipes = (
            [self.recipe]
            if self.recipe is not None
            else sorted({info.path.split("/")[1] for info in self.source.list("channels/")})
        )
        for recipe in recipes:
            yield from channels_of(self.source, recipe, self.channel)

    def _engines(self) -> dict[EngineId, Manifest | None]:
        """Return the engines that are to be sent; None stands for a manifest that cannot be read."""
        catalog, found = EngineCatalog(self.source, self.warn), dict[EngineId, Manifest | None]()
        named = None
        if self.channel is not None:
            heads = [channel.head.move for channel in self._channels()]
            named = {EngineId(move.recipe, move.target, move.build) for move in heads}
        for engine in catalog.engines(self.recipe):
            if named is None or engine in named:
                try:
                    found[engine] = catalog.manifest(engine)
                except NotFoundError:
                    continue  # removed since it was listed
                except IntegrityError as err:
                    found[engine] = None
                    self._leave(str(err))
        return found

    def _together(self, engines: Collection[EngineId]) -> list[tuple[list[EngineId], set[str]]]:
        """Return engines in groups of which each was published together, and by which publications, as marks tell."""
        prefix = "" if self.recipe is None else f"{self.recipe}/"
        done = completed(self.source, self.recipe)
        groups: dict[EngineId, tuple[list[EngineId], set[str]]] = {engine: ([engine], set()) for engine in engines}
        first: dict[str, EngineId] = {}
        for info in self.source.list(f"engines/{prefix}"):
            mark = mark_of(info.path)
            if mark is None:
                continue
            engine = EngineId(*info.path.split("/")[1:4])
            publication = publication_path(engine.recipe, mark)
            if engine not in groups or publication not in done:
                continue
            one, other = groups[first.setdefault(publication, engine)], groups[engine]
            one[1].add(publication)
            if one is not other:
                one[0].extend(other[0])
                one[1].update(other[1])
                groups |= dict.fromkeys(other[0], one)
        return list({id(group): group for group in groups.values()}.values())

    def _records(self, manifests: list[Manifest]) -> list[str]:
        if self._whole:
            return [info.path for info in self.source.list(_RECORDS)]
        paths = [record_path(step.stage, step.key) for manifest in manifests for step in manifest.provenance.steps] + [
            record_path("publish", manifest.provenance.key) for manifest in manifests
        ]
        return list(dict.fromkeys(paths))

    def _send_record(self, path: str) -> None:
        try:
            data = self.source.read(path)
            record = ActionRecord.from_bytes(data)
            for ref in record.outputs.values():
                self._send_file(blob_path(ref.digest), ref)
        except NotFoundError:
            return  # a record that is gone, or whose blobs are, is a miss
        except IntegrityError as err:
            self._leave(f"{path}: {err}")
            return
        self._send_document(path, data)

    def _send_file(self, path: str, ref: ArtifactRef) -> None:
        there = self.target.info(path)
        if there is not None and there.size == ref.size:
            return
        try:
            if not self._copied_within(path, ref):
                with self.target.scratch() as folder:
                    self.source.get_file(path, ref, folder / "file")
                    self.target.put_file(path, folder / "file", ref)
            self._put.add(path)
        except IntegrityError as err:
            self._leave(str(err))
            return
        self._count(ref.size)

    def _copied_within(self, path: str, ref: ArtifactRef) -> bool:
        """Have the service copy an object where both stores lie in one bucket, and tell whether it did."""
        if not (self.source.uri.startswith("s3://") and self.target.uri.startswith("s3://")):
            return False
        from artifacts.s3 import S3Store

        source, target = self.source, self.target
        if not (isinstance(source, S3Store) and isinstance(target, S3Store) and source.bucket == target.bucket):
            return False
        target.copy_from(source, path, ref)
        return True

    def _send_engines(self, group: Mapping[EngineId, Manifest | None], publications: Collection[str]) -> None:
        """Send engines that were published together: all of them, or nothing where one cannot be."""
        here, there = EngineCatalog(self.source, self.warn), EngineCatalog(self.target, self.warn)
        whole = {engine: manifest for engine, manifest in group.items() if manifest is not None}
        if len(whole) < len(group):  # which is told
            if whole:
                self._hold("an engine's manifest is damaged", group)
            return
        try:
            sent = {engine: here.manifest_bytes(engine) for engine in whole}
            missing = [engine for engine, data in sent.items() if not self._has(engine, whole[engine], data)]
            if missing:
                now = dict(zip(sent, here.send(list(sent), there, self._without(publications), self._put), strict=True))
                for engine in missing:
                    if now[engine] == sent[engine]:
                        self._count(whole[engine].size)
                    else:
                        self._leave(f"{engine}: {self.target.uri} has another manifest of this build, which stays")
                sent = {engine: data for engine, data in sent.items() if now[engine] == data}
        except (IntegrityError, NotFoundError) as err:
            left = {engine: group[engine] for engine in group if self._is_here(engine)}
            if len(left) == len(group):
                self._hold(str(err), group)
            elif left:  # the others were removed since they were listed
                self._send_engines(left, publications)
            return
        for engine, data in sent.items():
            self._send_findings(engine, whole[engine], data)

    def _is_here(self, engine: EngineId) -> bool:
        return self.source.info(f"{engine.path}/{MANIFEST_NAME}") is not None

    def _hold(self, why: str, group: Collection[EngineId]) -> None:
        names = ", ".join(map(str, group))
        also = f"; {names} were published together, and none of them is sent" if len(group) > 1 else ""
        # What is wrong at the other end says so, and what to do.
        advice = f"; mend it in {self.source.uri} (enginery verify --deep), and mirror again"
        self._leave(f"{why}{also}{'' if why.startswith(f'{self.target.uri}: ') else advice}")

    def _without(self, publications: Collection[str]) -> Mapping[str, str]:
        """Return what a publication is without, for people; nothing where there are several, or it cannot be read."""
        if len(publications) == 1:
            with suppress(IntegrityError, NotFoundError):
                return read_publication(self.source.read(*publications)).without
        return {}

    def _send_findings(self, engine: EngineId, manifest: Manifest, data: bytes) -> None:
        # Signatures before what they are over, so that nobody meets an attestation that is not vouched for yet.
        for folder in (SIGNATURES, FOLDER):
            for info in self.source.list(f"{engine.path}/{folder}/"):
                with suppress(NotFoundError):  # removed since it was listed
                    self._send_document(info.path, self.source.read(info.path))
        if self._arrived(engine, manifest, data):
            self.done.engines.append(str(engine))

    def _arrived(self, engine: EngineId, manifest: Manifest, data: bytes) -> bool:
        """Tell whether an engine's signatures are at the other end as they are here, and are trusted where there is a policy."""
        there = EngineCatalog(self.target, self.warn).signatures(engine, data)
        for key, signature in EngineCatalog(self.source, self.warn).signatures(engine, data).items():
            if there.get(key) != signature:
                self._leave(
                    f"{engine}: its signature by {key[:16]} is not in {self.target.uri} as it is here; remove what is there "
                    "(or run enginery verify --deep --from this store on it), and mirror again"
                )
                return False
        if self.judge is not None:
            try:
                self.judge.check_engine(manifest, data, there, self.channel)
            except TrustError as err:
                self._leave(f"{self.target.uri}: {err}")
                return False
        return True

    def _has(self, engine: EngineId, manifest: Manifest, data: bytes) -> bool:
        try:
            if self.target.read(f"{engine.path}/{MANIFEST_NAME}") != data:
                return False
            if not EngineCatalog(self.target).is_visible(engine):
                return False
        except NotFoundError:
            return False
        infos = self.target.infos([f"{engine.path}/{name}" for name in manifest.files])
        return {path: info.size for path, info in infos.items()} == {
            f"{engine.path}/{name}": entry.size for name, entry in manifest.files.items()
        }

    def _send_channel(self, channel: Channel) -> None:
        recipe, target, name = channel.head.move.at
        path, build = channel_path(recipe, target, name), channel.head.move.build
        there, engine = EngineCatalog(self.target), EngineId(recipe, target, build)
        manifest = b""
        with suppress(NotFoundError):
            if there.is_visible(engine):  # else what it is published together with is not complete there
                manifest = there.manifest_bytes(engine)
        if not manifest:
            self._leave(f"{path}: names {build}, which is not in {self.target.uri}; the channel stays as it was there")
            return
        if channel.head.move.manifest not in (None, digest_bytes(manifest)):
            self._leave(f"{path}: {self.target.uri} has another manifest of {build} than was promoted")
            return
        data, version = self.source.read_versioned(path)
        if version != channel.version:
            self._leave(f"{path}: was moved meanwhile; mirror again")
            return
        known = read_channel(self.target, recipe, target, name)
        if known is None:
            written = self.target.write(path, data, if_absent=True)
        else:
            ours, theirs = ([signed.statement for signed in found.moves] for found in (channel, known))
            if ours[: len(theirs)] != theirs:
                ahead = theirs[: len(ours)] == ours
                self._leave(
                    f"{path}: {self.target.uri} {'is ahead' if ahead else 'was moved another way'}, and stays as it is"
                )
                return
            if ours == theirs:
                return
            written = self.target.write(path, data, if_version=known.version)
        if not written:
            self._leave(f"{path}: was moved in {self.target.uri} meanwhile; mirror again")
            return
        self._count(len(data))
        self.done.channels.append("/".join(channel.head.move.at))

    def _send_document(self, path: str, data: bytes) -> None:
        if self.target.info(path) is None and self.target.write(path, data, if_absent=True):
            self._count(len(data))

    def _leave(self, message: str) -> None:
        self.done.left.append(message)
        self.warn(message)

    def _count(self, size: int) -> None:
        self.done.objects += 1
        self.done.size += size
