"""BlockStore: the block files of a store; put once, adopted by later writers, verified when read.

    <url>/blocks/<tenant>/<3 hex>/<block id>.<part>.<sha256 of the file>.safetensors

An id may have several variants, each a file of its own; nothing is overwritten. `secure` is what a
card must pass before it names blocks: see `collector` for the contract behind it. Knows no
owner. Thread-safe; used by `store`.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from storage import cache_file
from storage.cache_file import PAGE, sha256
from storage.card import BlockRef, BranchCard, CacheCard, PartRef
from storage.condemned import Condemned
from storage.crypto import Cipher, seal, unseal
from storage.errors import CorruptData, Locked, StorageError, StoreUnavailable
from storage.files import Files

WRITER_WINDOW_S = 300.0  # how long a writer may rely on having put or adopted a block
BLOCK_FOLDER = re.compile(r"[0-9a-f]{3}\Z")
BLOCK_NAME = re.compile(r"([0-9a-f]{64})\.(full|sliding)\.([0-9a-f]{64})\.safetensors\Z")


def block_name(block_id: str, part: str, digest: str) -> str:
    return f"{block_id}.{part}.{digest}.safetensors"


def block_names(ref: BlockRef) -> list[str]:
    """The names of the files a reference stands for."""
    return [block_name(ref.id, part, stored.sha256) for part, stored in ref.parts.items()]


def card_block_names(card: CacheCard) -> frozenset[str]:
    """The names of the block files a card names."""
    refs = (ref for b in card.branches for ref in (*b.blocks, *b.tail))
    return frozenset(name for ref in refs for name in block_names(ref))


def block_folder(files: Files, tenant: str, block_id: str) -> str:
    return files.path("blocks", tenant, block_id[:3])


def block_place(tenant: str, block_id: str, part: str) -> str:
    """Where a block lies, as its encryption knows it."""
    return f"blocks/{tenant}/{block_id[:3]}/{block_id}.{part}"


def fresh_variant(raw: bytes) -> bytes:
    """The same rows as a file of other bytes, hence of another name. Raises CorruptData."""
    tensors, metadata = cache_file.load(raw, "block")
    return cache_file.save(tensors, metadata | {"variant": secrets.token_hex(8)}, align=PAGE)


class BlockStore:
    """All blocks of one store."""

    def __init__(
        self,
        files: Files,
        condemned: Condemned,
        *,
        cipher: Cipher | None,
        on_fault: Callable[[StorageError], None],
        clock: Callable[[], float],
    ) -> None:
        self._files = files
        self._condemned = condemned
        self._cipher = cipher
        self._on_fault = on_fault
        self._clock = clock
        self._ours: OrderedDict[tuple[str, str], float] = OrderedDict()  # when put or adopted
        self._lock = threading.Lock()

    def path(self, tenant: str, ref: BlockRef, part: str) -> str:
        """Where a part is stored; for a part the reference lacks, where it would be."""
        digest = ref.parts[part].sha256 if part in ref.parts else "none"
        return f"{block_folder(self._files, tenant, ref.id)}/{block_name(ref.id, part, digest)}"

    # ---- write

    def put(self, tenant: str, block_id: str, part: str, raw: bytes) -> PartRef:
        """Store the bytes, or adopt a sound variant another writer stored under this id.

        Sliding parts of one id may differ in their rows: only equal bytes are adopted. Raises
        StoreUnavailable; Locked when the tenant's blocks cannot be opened.
        """
        started = self._clock()
        with self._files.translated():
            condemned = self._condemned.names(tenant)
            ref = self._adopt(tenant, block_id, part, raw, condemned)
            if ref is None:
                ref = self._create(tenant, block_id, part, raw, condemned)
        self._note(tenant, block_name(block_id, part, ref.sha256), started)
        return ref

    def _adopt(
        self, tenant: str, block_id: str, part: str, raw: bytes, condemned: frozenset[str]
    ) -> PartRef | None:
        folder = block_folder(self._files, tenant, block_id)
        for name in self._files.names(folder):
            match = BLOCK_NAME.match(name)
            if match is None or match.group(1, 2) != (block_id, part) or name in condemned:
                continue
            found = self._verified(tenant, block_id, part, match[3])
            if found is not None and (part != "sliding" or found[1] == raw):
                return found[0]
        return None

    def _create(
        self, tenant: str, block_id: str, part: str, raw: bytes, condemned: frozenset[str]
    ) -> PartRef:
        place = block_place(tenant, block_id, part)
        stored = seal(self._cipher, tenant, place, raw)
        if block_name(block_id, part, sha256(stored)) in condemned:
            stored = seal(self._cipher, tenant, place, fresh_variant(raw))
        ref = PartRef(sha256(stored), len(stored))
        folder = block_folder(self._files, tenant, block_id)
        path = f"{folder}/{block_name(block_id, part, ref.sha256)}"
        try:
            self._files.create(path, stored)
        except FileExistsError as error:  # a twin was faster: same name, same bytes
            if self._verified(tenant, block_id, part, ref.sha256) is None:
                raise StoreUnavailable(self._files.url, f"cannot create {path}") from error
        return ref

    def _verified(
        self, tenant: str, block_id: str, part: str, digest: str
    ) -> tuple[PartRef, bytes] | None:
        """A stored variant and what it holds, if it is sound; a broken one is set aside, one under
        a key we lack is left alone."""
        folder = block_folder(self._files, tenant, block_id)
        path = f"{folder}/{block_name(block_id, part, digest)}"
        try:
            stored = self._files.read(path)
        except FileNotFoundError:
            return None
        try:
            if sha256(stored) != digest:
                raise CorruptData(path, "sha256 does not match its name")
            raw = unseal(self._cipher, tenant, block_place(tenant, block_id, part), stored, path)
        except Locked:
            if self._cipher is None:  # plain files have no place among encrypted ones
                raise
            return None
        except CorruptData as error:
            self._on_fault(CorruptData(path, f"{error.reason}; set aside"))
            self._files.set_aside(path)
            return None
        return PartRef(digest, len(stored)), raw

    # ---- read

    def get(self, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        """The verified bytes of one part; None if the file is gone, or the reference has no such
        part. Raises CorruptData, Locked."""
        stored = ref.parts.get(part)
        if stored is None:
            return None
        path = self.path(tenant, ref, part)
        try:
            raw = self._files.read(path)
        except FileNotFoundError:
            return None
        return self.opened(tenant, ref, part, raw, path)

    def opened(self, tenant: str, ref: BlockRef, part: str, raw: bytes, path: str) -> bytes:
        """The verified bytes of one part from its file, wherever that was read. Raises CorruptData
        naming `path`, Locked."""
        stored = ref.parts[part]
        if len(raw) != stored.size:
            raise CorruptData(path, f"{len(raw)} bytes, the card says {stored.size}")
        if sha256(raw) != stored.sha256:
            raise CorruptData(path, "sha256 does not match")
        return unseal(self._cipher, tenant, block_place(tenant, ref.id, part), raw, path)

    def find(self, tenant: str, block_id: str, part: str) -> PartRef | None:
        """A variant that is stored under this id and may be adopted; not read, not verified.
        Raises StoreUnavailable."""
        with self._files.translated():
            condemned = self._condemned.names(tenant)
            for entry in self._files.entries(block_folder(self._files, tenant, block_id)):
                match = BLOCK_NAME.match(entry.name)
                if match and match.group(1, 2) == (block_id, part) and entry.name not in condemned:
                    return PartRef(match[3], entry.size)
        return None

    # ---- what a card may name

    def secure(self, tenant: str, ref: BlockRef, named: frozenset[str]) -> BlockRef | None:
        """The reference as a card may name it from this moment on: the same, or to other variants
        where its own are condemned; without a sliding part that is gone, None without a full one.

        `named`: what the agent's newest card names already. Anything else that was not put or
        adopted within WRITER_WINDOW_S is read and verified again. Raises StoreUnavailable.
        """
        condemned = self._condemned.names(tenant)
        parts = {}
        for part, stored in ref.parts.items():
            name = block_name(ref.id, part, stored.sha256)
            if name not in condemned and (name in named or self._is_ours(tenant, name)):
                parts[part] = stored
                continue
            found = self._again(tenant, ref, part, name in condemned)
            if found is not None:
                parts[part] = found
            elif part == "full":
                return None
        return replace(ref, parts=parts) if parts else None

    def secure_branch(self, tenant: str, branch: BranchCard, named: frozenset[str]) -> BranchCard:
        """The branch up to the first block that is gone, with what secure says of the others."""
        secured: list[BlockRef] = []
        for ref in (*branch.blocks, *branch.tail):
            found = self.secure(tenant, ref, named)
            if found is None:
                break
            secured.append(found)
        n_blocks = len(branch.blocks)
        branch = replace(branch, blocks=tuple(secured[:n_blocks]), tail=tuple(secured[n_blocks:]))
        kept = tuple(point for point in branch.checkpoints if point <= branch.rows)
        return replace(branch, checkpoints=kept)

    def _again(self, tenant: str, ref: BlockRef, part: str, is_condemned: bool) -> PartRef | None:
        """Put a block again from the bytes the store still has; None if they are gone or bad."""
        started = self._clock()
        try:
            raw = self.get(tenant, ref, part)
        except CorruptData as error:
            self._on_fault(error)
            return None
        if raw is None:
            self._on_fault(CorruptData(self.path(tenant, ref, part), "the block is missing"))
            return None
        if is_condemned:
            return self.put(tenant, ref.id, part, raw)
        stored = ref.parts[part]
        self._note(tenant, block_name(ref.id, part, stored.sha256), started)
        return stored

    def _note(self, tenant: str, name: str, when: float) -> None:
        with self._lock:
            self._ours[tenant, name] = when
            self._ours.move_to_end((tenant, name))
            while self._ours and when - next(iter(self._ours.values())) > WRITER_WINDOW_S:
                self._ours.popitem(last=False)

    def _is_ours(self, tenant: str, name: str) -> bool:
        with self._lock:
            when = self._ours.get((tenant, name))
        return when is not None and self._clock() - when <= WRITER_WINDOW_S
