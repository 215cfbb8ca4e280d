"""CacheStore(url): blocks and cards over an fsspec file system; claim, commit, delete.

    <url>/agents/<tenant>/<agent digest>/<epoch>-<generation>.safetensors  cards, in order
    <url>/blocks/...                                                       see `blocks`
    <url>/encrypted                                                        see `probe`

Who owns an agent is decided here and nowhere else: by exclusive create of `<epoch>-00000000`.
Every byte read is verified before it is returned. A miss is None, a fault one of storage.errors.
No card is written that names a block the store may lose: see `collector` for the contract.
Called by the replicas' memory and by the router's scan; safe to use from several threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from storage.blocks import WRITER_WINDOW_S, BlockStore, card_block_names
from storage.cache_file import sha256
from storage.card import (
    AgentId,
    BlockRef,
    CacheCard,
    CardRef,
    PartRef,
    card_name,
    encode_card,
)
from storage.claims import Claim, first_card
from storage.condemned import Condemned
from storage.crypto import Cipher, seal
from storage.errors import Fenced, Incompatible, StorageError, StoreUnavailable
from storage.files import Files, FilesOptions
from storage.probe import probe
from storage.reader import CardReader
from storage.reader import LoadedCard as LoadedCard
from storage.spec import CompatibilityKey
from storage.written import Written, WrittenCards


class CacheStore(CardReader):
    """One store, for any number of tenants and agents.

    `on_fault` is told of every card that could not be used and why, so that the caller can count
    and log it; reading then goes on with the next best card.
    """

    def __init__(
        self,
        url: str,
        *,
        signing_key: bytes | None = None,
        cipher: Cipher | None = None,
        on_fault: Callable[[StorageError], None] = lambda error: None,
        options: FilesOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError for a URL this version has no tested backend for."""
        super().__init__(Files(url, options), signing_key, cipher, on_fault)
        self._clock = clock
        self.condemned = Condemned(self.files, clock)
        self.blocks = BlockStore(
            self.files,
            self.condemned,
            cipher=cipher,
            on_fault=lambda error: self.on_fault(error),
            clock=clock,
        )
        self._written = WrittenCards()

    # ---- start

    def probe(self) -> None:
        """Prove that a second create of one file is refused, and that the store is encrypted as
        configured. Raises StoreUnavailable, Locked."""
        probe(self.files, encrypted=self.cipher is not None)

    # ---- blocks

    def put_block(self, tenant: str, block_id: str, part: str, raw: bytes) -> PartRef:
        """Store the bytes, or adopt a sound variant another writer stored under this id."""
        return self.blocks.put(tenant, block_id, part, raw)

    def get_block(self, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        """The verified bytes of one part; None if the file is gone. Raises CorruptData, Locked."""
        return self.blocks.get(tenant, ref, part)

    def find_block(self, tenant: str, block_id: str, part: str) -> PartRef | None:
        """A block some agent of the tenant has stored under this id; None if there is none. Raises
        StoreUnavailable."""
        return self.blocks.find(tenant, block_id, part)

    def block_path(self, tenant: str, ref: BlockRef, part: str) -> str:
        return self.blocks.path(tenant, ref, part)

    # ---- cards

    def claim(
        self,
        template: CacheCard,
        *,
        after: int | None = None,
        tombstone: bool = False,
        inherit: bool = True,
        named: frozenset[str] = frozenset(),
        rows: bool = True,
        expect: CardRef | None = None,
        look_s: float | None = None,
        known: LoadedCard | None = None,
    ) -> Claim:
        """Take the agent over: create `<epoch + 1>-0` with what its latest card holds.

        `template` names the agent, key, codec and the new owner. `after`: claim exactly the epoch
        after this one, so that whoever claimed it before wins; default: after the newest.
        `inherit`: False begins with the template's own branches, salt and parent; `named` are
        block files of them that the card they come from names. `rows`: False
        keeps the tokens and lets go of the blocks. `expect`: only if this is still the latest
        card. `look_s`: a deadline sooner than the store's own for the first look. `known`: the
        latest card, by the word of its owner; it is not looked for, and where the store turns out
        not to have it, the next commit looks at every block. Raises Fenced when another claim wins,
        or `expect` fails; StoreUnavailable when the store gives no answer (then nothing is owned).
        """
        agent, key = template.agent, template.key
        folder = self.agent_folder(agent, key)
        newest, found = (
            self._look(folder, key, look_s) if known is None else (known.ref.epoch, known)
        )
        epoch = (newest if after is None else after) + 1
        if newest >= epoch or (expect is not None and (found is None or found.ref != expect)):
            raise Fenced(str(agent), newest)
        started = self._clock()
        card = first_card(template, epoch, found, inherit=inherit, tombstone=tombstone)
        if not inherit:
            card = self._secured(card, named)
        elif found and not tombstone and not found.card.tombstone:
            card = self._inherit(card, found.card, rows)
        raw = self._encode(card)
        self._create_or_read_back(f"{folder}/{card.name}", raw, card)
        names = self._card_names(folder)
        newest = names[-1][0] if names else 0
        if newest > epoch:  # claimed and cleaned up by others between our look and our create
            raise Fenced(str(agent), newest)
        self._wrote(folder, card, started)
        if known is not None and (known.ref.epoch, known.ref.generation) not in names:
            self._written.note(folder, None)
        return Claim(_stored(card, raw), found.card if found else None)

    def _look(
        self, folder: str, key: CompatibilityKey, look_s: float | None
    ) -> tuple[int, LoadedCard | None]:
        """(the greatest epoch claimed, the latest card)."""
        names = self._card_names(folder, look_s)
        return names[-1][0] if names else 0, self._newest(folder, key, names=names)

    def _inherit(self, card: CacheCard, old: CacheCard, rows: bool) -> CacheCard:
        if old.codec != card.codec:  # stored rows are never encoded again
            path = f"{self.agent_folder(old.agent, old.key)}/{old.name}"
            self.on_fault(Incompatible(path, [f"codec: {old.codec} != {card.codec}"]))
            return card
        card = replace(
            card,
            branches=old.branches,
            cache_salt=old.cache_salt,
            parent=old.parent,
            created=old.created,
        )
        if not rows:
            bare = [replace(b, blocks=(), tail=(), checkpoints=()) for b in old.branches]
            return replace(card, branches=tuple(bare))
        return self._secured(card, card_block_names(old))

    def commit(self, card: CacheCard) -> LoadedCard:
        """Write the next generation of the caller's epoch; its blocks must be stored already.

        The card that is returned counts: a generation that an earlier try took without an answer
        is skipped, a block that a collector has condemned is stored anew under another name, and
        a branch ends before a block that is gone (on_fault is told). Raises Fenced when a newer
        epoch exists, then nobody will read this card, or when the store lost the claim. Keeps the
        last two generations and the claim.
        """
        folder = self.agent_folder(card.agent, card.key)
        names = self._card_names(folder)
        self._check_owned(folder, names, card)
        while (card.epoch, card.generation) in names:
            if self._nonce(f"{folder}/{card.name}") != card.nonce:
                raise Fenced(str(card.agent), card.epoch)
            card = replace(card, generation=card.generation + 1)
        known = self._written.get(folder)
        started = self._clock()
        card = self._secured(card, known.named if known else frozenset())
        raw = self._encode(card)
        self._create_or_read_back(f"{folder}/{card.name}", raw, card)
        newest = self.epoch(card.agent, card.key)
        if newest > card.epoch:
            raise Fenced(str(card.agent), newest)
        mine = [n for n in names if n[0] == card.epoch and 0 < n[1] < card.generation]
        self._remove_cards(folder, [n for n in names if n[0] < card.epoch] + mine[:-1])
        self._wrote(folder, card, started)
        return _stored(card, raw)

    def _check_owned(self, folder: str, names: list[tuple[int, int]], card: CacheCard) -> None:
        """Raises Fenced unless the newest epoch is the caller's, with its claim in place."""
        if names and names[-1][0] > card.epoch:
            raise Fenced(str(card.agent), names[-1][0])
        known = self._written.get(folder)
        ours = (known.epoch, known.generation) if known else None
        if ours in names and ours[0] == card.epoch and (card.epoch, 0) in names:
            return
        claim = f"{folder}/{card_name(card.epoch, 0)}"
        if self._nonce(claim) != card.nonce:  # the store was emptied, and perhaps filled again
            raise Fenced(str(card.agent), card.epoch)

    def _secured(self, card: CacheCard, named: frozenset[str]) -> CacheCard:
        """The card with blocks that may be named from now on; see BlockStore.secure."""
        branches = tuple(
            self.blocks.secure_branch(card.agent.tenant, b, named) for b in card.branches
        )
        return card if branches == card.branches else replace(card, branches=branches)

    def _wrote(self, folder: str, card: CacheCard, started: float) -> None:
        """Remember the card, unless writing it took so long that its blocks are in doubt: then
        the next commit looks at each of them."""
        in_time = self._clock() - started <= WRITER_WINDOW_S
        named = Written(card.epoch, card.generation, card_block_names(card)) if in_time else None
        self._written.note(folder, named)

    def delete(
        self, template: CacheCard, *, after: int | None = None, expect: CardRef | None = None
    ) -> None:
        """A claim with a tombstone: what an old owner still writes is never read. Raises Fenced."""
        claimed = self.claim(template, after=after, expect=expect, tombstone=True).card
        self.remove_older(claimed)

    def remove_older(self, claimed: CacheCard) -> None:
        """Remove the cards of the epochs before a claim that starts from nothing of them."""
        folder = self.agent_folder(claimed.agent, claimed.key)
        names = self._card_names(folder)
        self._remove_cards(folder, [name for name in names if name[0] < claimed.epoch])

    # ---- cards of a local tier, whose claims are in another store

    def journal(self, card: CacheCard) -> None:
        """Write a card without a claim, in place of the agent's others. Raises StoreUnavailable."""
        folder = self.agent_folder(card.agent, card.key)
        self._create_or_read_back(f"{folder}/{card.name}", self._encode(card), card)
        self.drop_cards(card.agent, card.key, but=card)

    def drop_cards(
        self, agent: AgentId, key: CompatibilityKey, *, but: CacheCard | None = None
    ) -> None:
        """Remove an agent's cards, all or all but one."""
        folder = self.agent_folder(agent, key)
        kept = (but.epoch, but.generation) if but is not None else None
        self._remove_cards(folder, [name for name in self._card_names(folder) if name != kept])

    # ---- files

    def _remove_cards(self, folder: str, names: list[tuple[int, int]]) -> None:
        for name in names:
            self.files.remove(f"{folder}/{card_name(*name)}")

    def _encode(self, card: CacheCard) -> bytes:
        path = f"{self.agent_folder(card.agent, card.key)}/{card.name}"
        return seal(self.cipher, *self.place(path), encode_card(card, self.signing_key))

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
            if isinstance(failure, FileExistsError):  # others were there, and have gone on
                raise Fenced(str(card.agent), card.epoch) from failure
            raise StoreUnavailable(self.url, f"cannot create {path}: {failure}") from failure
        if found != raw:
            raise Fenced(str(card.agent), card.epoch) from failure
        self.on_fault(StoreUnavailable(self.url, f"{path} is there, in spite of {failure!r}"))


def _stored(card: CacheCard, raw: bytes) -> LoadedCard:
    return LoadedCard(card, CardRef(card.epoch, card.generation, sha256(raw)))
