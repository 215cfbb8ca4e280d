"""CacheStore(url): blocks and cards over an fsspec file system; claim, commit, delete.

    <url>/blocks/<tenant>/<3 hex>/<block id>.<part>.<sha256>.safetensors   immutable
    <url>/agents/<tenant>/<agent digest>/<epoch>-<generation>.safetensors  cards, in order

Who owns an agent is decided here and nowhere else: by exclusive create of `<epoch>-00000000`.
Every byte read is verified before it is returned. A miss is None, a fault one of storage.errors.
Called by the replicas' memory and by the router's scan; safe to use from several threads.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from storage.cache_file import sha256
from storage.card import (
    AgentId,
    BlockRef,
    CacheCard,
    CardRef,
    Owner,
    PartRef,
    card_name,
    decode_card,
    encode_card,
    parse_name,
)
from storage.errors import (
    CorruptData,
    Fenced,
    Incompatible,
    StorageError,
    StoreUnavailable,
    Unsupported,
)
from storage.files import Files, FilesOptions
from storage.spec import CompatibilityKey


@dataclass(frozen=True)
class LoadedCard:
    card: CacheCard
    ref: CardRef


@dataclass(frozen=True)
class Claim:
    """The card that now owns the agent, and the one it started from."""

    card: CacheCard
    previous: CacheCard | None


class CacheStore:
    """One store, for any number of tenants and agents.

    `on_fault` is told of every card that could not be used and why, so that the caller can count
    and log it; reading then goes on with the next best card.
    """

    def __init__(
        self,
        url: str,
        *,
        signing_key: bytes | None = None,
        on_fault: Callable[[StorageError], None] = lambda error: None,
        options: FilesOptions | None = None,
    ) -> None:
        """Raises ValueError for a URL this version has no tested backend for."""
        self.files = Files(url, options)
        self.url = self.files.url
        self._signing_key = signing_key
        self.on_fault = on_fault

    # ---- start

    def probe(self) -> None:
        """Prove that this store refuses a second create; raises StoreUnavailable if not."""
        path = self.files.path("probe", secrets.token_hex(16))
        with self.files.translated():
            try:
                self.files.create(path, b"1")
            except FileNotFoundError as error:  # a place where no folder can be made
                raise StoreUnavailable(self.url, repr(error)) from error
            try:
                self.files.create(path, b"2")
            except FileExistsError:
                return
            finally:
                self.files.remove(path)
        raise StoreUnavailable(self.url, "a second create of one file succeeds: no claim is safe")

    # ---- blocks

    def put_block(self, tenant: str, block_id: str, part: str, raw: bytes) -> PartRef:
        """Store the bytes, or adopt a sound variant another writer stored under this id."""
        with self.files.translated():
            folder = self._block_folder(tenant, block_id)
            prefix = f"{block_id}.{part}."
            for name in self.files.names(folder):
                if name.startswith(prefix) and name.endswith(".safetensors"):
                    adopted = self._verified(f"{folder}/{name}", name[len(prefix) :].split(".")[0])
                    if adopted is not None:
                        return adopted
            ref = PartRef(sha256(raw), len(raw))
            path = f"{folder}/{prefix}{ref.sha256}.safetensors"
            try:
                self.files.create(path, raw)
            except FileExistsError as error:  # a twin was faster: same name, same bytes
                if self._verified(path, ref.sha256) is None:
                    raise StoreUnavailable(self.url, f"cannot create {path}") from error
            return ref

    def get_block(self, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        """The verified bytes of one part; None if the file is gone. Raises CorruptData."""
        stored = ref.parts[part]
        path = self.block_path(tenant, ref, part)
        try:
            raw = self.files.read(path)
        except FileNotFoundError:
            return None
        if len(raw) != stored.size:
            raise CorruptData(path, f"{len(raw)} bytes, the card says {stored.size}")
        if sha256(raw) != stored.sha256:
            raise CorruptData(path, "sha256 does not match")
        return raw

    def block_path(self, tenant: str, ref: BlockRef, part: str) -> str:
        folder = self._block_folder(tenant, ref.id)
        return f"{folder}/{ref.id}.{part}.{ref.parts[part].sha256}.safetensors"

    # ---- cards

    def latest(self, agent: AgentId, key: CompatibilityKey) -> LoadedCard | None:
        """The card that counts: greatest epoch, in it the greatest generation that verifies.

        Never a card of an older epoch, whose owner may have gone on writing after it lost the
        agent: the claim card of an epoch repeats what the epoch started from. None when the agent
        is unknown or nothing verifies (on_fault then was told). A tombstone is returned. Raises
        Unsupported for a card of a newer kvferry: an older card, or a claim, would bury it.
        """
        return self._newest(self.agent_folder(agent, key), key)

    def _newest(self, folder: str, key: CompatibilityKey | None) -> LoadedCard | None:
        unusable: set[tuple[int, int]] = set()
        while names := self._card_names(folder):
            epoch = names[-1][0]
            left = [name for name in names if name[0] == epoch and name not in unusable]
            if not left:
                break
            try:
                return self._read_card(f"{folder}/{card_name(*left[-1])}", key)
            except FileNotFoundError:  # its owner has gone on and removed it: list again
                pass
            except (CorruptData, Incompatible) as error:
                self.on_fault(error)
            unusable.add(left[-1])
        return None

    def epoch(self, agent: AgentId, key: CompatibilityKey) -> int:
        """The greatest epoch claimed, 0 for an unknown agent."""
        names = self._card_names(self.agent_folder(agent, key))
        return names[-1][0] if names else 0

    def claim(
        self,
        template: CacheCard,
        *,
        after: int | None = None,
        tombstone: bool = False,
        inherit: bool = True,
    ) -> Claim:
        """Take the agent over: create `<epoch + 1>-0` with what its latest card holds.

        `template` names the agent, key, codec and the new owner. `after`: claim exactly the epoch
        after this one, so that whoever claimed it before wins; default: after the newest.
        `inherit=False`: the agent begins with the template's own branches, salt and parent. Raises
        Fenced when another claim wins, StoreUnavailable when the store gives no answer (then
        nothing is owned).
        """
        agent, key = template.agent, template.key
        newest = self.epoch(agent, key)
        epoch = (newest if after is None else after) + 1
        if newest >= epoch:
            raise Fenced(str(agent), newest)
        found = self.latest(agent, key)
        now = time.time()
        card = replace(
            template,
            epoch=epoch,
            generation=0,
            base=found.ref if found else None,
            nonce=secrets.token_hex(16),
            tombstone=tombstone,
            branches=() if inherit else template.branches,
            created=now,
            updated=now,
        )
        if found and inherit and not tombstone and not found.card.tombstone:
            card = self._inherit(card, found.card)
        raw = encode_card(card, self._signing_key)
        path = f"{self.agent_folder(agent, key)}/{card.name}"
        self._create_or_read_back(path, raw, card)
        newest = self.epoch(agent, key)
        if newest > epoch:  # claimed and cleaned up by others between our look and our create
            raise Fenced(str(agent), newest)
        return Claim(card, found.card if found else None)

    def _inherit(self, card: CacheCard, old: CacheCard) -> CacheCard:
        if old.codec != card.codec:  # stored rows are never encoded again
            path = f"{self.agent_folder(old.agent, old.key)}/{old.name}"
            self.on_fault(Incompatible(path, [f"codec: {old.codec} != {card.codec}"]))
            return card
        return replace(
            card,
            branches=old.branches,
            cache_salt=old.cache_salt,
            parent=old.parent,
            created=old.created,
        )

    def commit(self, card: CacheCard) -> LoadedCard:
        """Write the next generation of the caller's epoch; its blocks must be stored already.

        A generation that an earlier try of the caller took, without an answer, is skipped: the
        card that is returned counts. Raises Fenced when a newer epoch exists, then nobody will
        read this card. Keeps the last two generations and the claim.
        """
        folder = self.agent_folder(card.agent, card.key)
        names = self._card_names(folder)
        if names and names[-1][0] > card.epoch:
            raise Fenced(str(card.agent), names[-1][0])
        while (card.epoch, card.generation) in names:
            if self._nonce(f"{folder}/{card.name}") != card.nonce:
                raise Fenced(str(card.agent), card.epoch)
            card = replace(card, generation=card.generation + 1)
        raw = encode_card(card, self._signing_key)
        self._create_or_read_back(f"{folder}/{card.name}", raw, card)
        newest = self.epoch(card.agent, card.key)
        if newest > card.epoch:
            raise Fenced(str(card.agent), newest)
        mine = [n for n in names if n[0] == card.epoch and 0 < n[1] < card.generation]
        for name in names:
            if name[0] < card.epoch or name in mine[:-1]:
                self.files.remove(f"{folder}/{card_name(*name)}")
        return LoadedCard(card, CardRef(card.epoch, card.generation, sha256(raw)))

    # ---- cards of a local tier, whose claims are in another store

    def journal(self, card: CacheCard) -> None:
        """Write a card without a claim, in place of the agent's others. Raises StoreUnavailable."""
        folder = self.agent_folder(card.agent, card.key)
        raw = encode_card(card, self._signing_key)
        self._create_or_read_back(f"{folder}/{card.name}", raw, card)
        self.drop_cards(card.agent, card.key, but=card)

    def drop_cards(
        self, agent: AgentId, key: CompatibilityKey, *, but: CacheCard | None = None
    ) -> None:
        """Remove an agent's cards, all or all but one."""
        folder = self.agent_folder(agent, key)
        for name in self._card_names(folder):
            if but is None or name != (but.epoch, but.generation):
                self.files.remove(f"{folder}/{card_name(*name)}")

    def delete(self, template: CacheCard) -> None:
        """A claim with a tombstone: what an old owner still writes is never read. Raises Fenced."""
        claimed = self.claim(template, tombstone=True).card
        folder = self.agent_folder(claimed.agent, claimed.key)
        for epoch, generation in self._card_names(folder):
            if epoch < claimed.epoch:
                self.files.remove(f"{folder}/{card_name(epoch, generation)}")

    def cards(self, tenants: list[str], key: CompatibilityKey | None) -> Iterator[LoadedCard]:
        """The newest sound card under `key`, None for any, of every agent that was not deleted;
        tenants in the order given."""
        for tenant in tenants:
            folder = self.files.path("agents", tenant)
            for name in self.files.names(folder):
                try:
                    loaded = self._newest(f"{folder}/{name}", None)
                except Unsupported as error:  # another node's to read
                    self.on_fault(error)
                    continue
                if loaded and key in (None, loaded.card.key) and not loaded.card.tombstone:
                    yield loaded

    def tenants(self) -> list[str]:
        """Every tenant that has agents here."""
        return self.files.names(self.files.path("agents"))

    # ---- paths

    def _block_folder(self, tenant: str, block_id: str) -> str:
        return self.files.path("blocks", tenant, block_id[:3])

    def agent_folder(self, agent: AgentId, key: CompatibilityKey) -> str:
        return self.files.path("agents", agent.tenant, agent.digest(key.digest))

    def _card_names(self, folder: str) -> list[tuple[int, int]]:
        return sorted(found for found in map(parse_name, self.files.names(folder)) if found)

    def _read_card(self, path: str, key: CompatibilityKey | None) -> LoadedCard:
        raw = self.files.read(path)
        card = decode_card(raw, path, key=key, signing_key=self._signing_key)
        home = f"{self.agent_folder(card.agent, card.key)}/{card.name}"
        if path != home:  # a sound card, copied here from another agent, tenant or epoch
            raise CorruptData(path, f"the card inside belongs to {home}")
        return LoadedCard(card, CardRef(card.epoch, card.generation, sha256(raw)))

    def _nonce(self, path: str) -> str | None:
        """Whose card this is; None if that cannot be said."""
        try:
            return self._read_card(path, None).card.nonce
        except (FileNotFoundError, CorruptData):
            return None

    def _verified(self, path: str, digest: str) -> PartRef | None:
        """A stored variant, if its bytes are sound; a broken one is set aside."""
        try:
            raw = self.files.read(path)
        except FileNotFoundError:
            return None
        if sha256(raw) == digest:
            return PartRef(digest, len(raw))
        self.on_fault(CorruptData(path, "sha256 does not match its name; set aside"))
        self.files.set_aside(path)
        return None

    def _create_or_read_back(self, path: str, raw: bytes, card: CacheCard) -> None:
        """Exclusive create; after a refusal or a doubtful answer, our own bytes mean success."""
        try:
            self.files.create(path, raw)
            return
        except Exception as error:  # any backend's error: what counts is what the store now holds
            failure = error
        try:
            found = self.files.read(path)
        except FileNotFoundError:
            raise StoreUnavailable(self.url, f"cannot create {path}: {failure}") from failure
        if found != raw:
            raise Fenced(str(card.agent), card.epoch) from failure


def new_card(
    agent: AgentId,
    key: CompatibilityKey,
    codec: str,
    owner: Owner,
    *,
    codec_parameters: dict[str, dict[str, int]] | None = None,
    provenance: dict[str, str] | None = None,
) -> CacheCard:
    """A template for claim() and delete(): an agent without memory."""
    return CacheCard(
        agent=agent,
        epoch=0,
        generation=0,
        base=None,
        key=key,
        codec=codec,
        codec_parameters=codec_parameters or {},
        owner=owner,
        nonce="",
        provenance=provenance or {},
    )
