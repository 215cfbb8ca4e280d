"""CardReader: the cards of a store, found and verified; the half of CacheStore that only reads.

    <url>/agents/<tenant>/<agent digest>/<epoch>-<generation>.safetensors

The greatest epoch counts, in it the greatest generation that verifies. A miss is None; a card that
cannot be used is told to `on_fault`, and reading goes on with the next best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from storage.cache_file import sha256
from storage.card import AgentId, CacheCard, CardRef, card_name, decode_card, parse_name
from storage.crypto import Cipher, unseal
from storage.errors import CorruptData, Incompatible, Locked, StorageError, Unsupported
from storage.files import Files
from storage.spec import CompatibilityKey


@dataclass(frozen=True)
class LoadedCard:
    card: CacheCard
    ref: CardRef


class CardReader:
    """Reads the cards of one store; safe to use from several threads."""

    def __init__(
        self,
        files: Files,
        signing_key: bytes | None,
        cipher: Cipher | None,
        on_fault: Callable[[StorageError], None],
    ) -> None:
        self.files = files
        self.url = files.url
        self.signing_key = signing_key
        self.cipher = cipher
        self.on_fault = on_fault

    def latest(
        self, agent: AgentId, key: CompatibilityKey, look_s: float | None = None
    ) -> LoadedCard | None:
        """The card that counts: greatest epoch, in it the greatest generation that verifies.

        Never a card of an older epoch, whose owner may have gone on writing after it lost the
        agent: the claim card of an epoch repeats what the epoch started from. None when the agent
        is unknown or nothing verifies (on_fault then was told). A tombstone is returned. Raises
        Locked for a card that the keys do not open, and Unsupported for one of a newer kvferry: an
        older card, or a claim, would bury it. `look_s`: a deadline sooner than the store's own
        for every list of what is there.
        """
        return self._newest(self.agent_folder(agent, key), key, look_s)

    def _newest(
        self,
        folder: str,
        key: CompatibilityKey | None,
        look_s: float | None = None,
        names: list[tuple[int, int]] | None = None,
    ) -> LoadedCard | None:
        """`names`: of a list that was just made."""
        unusable: set[tuple[int, int]] = set()
        names = self._card_names(folder, look_s) if names is None else names
        while names:
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
            names = self._card_names(folder, look_s)
        return None

    def epoch(self, agent: AgentId, key: CompatibilityKey, timeout_s: float | None = None) -> int:
        """The greatest epoch claimed, 0 for an unknown agent. `timeout_s`: a deadline sooner than
        the store's own."""
        names = self._card_names(self.agent_folder(agent, key), timeout_s)
        return names[-1][0] if names else 0

    def cards(self, tenants: list[str], key: CompatibilityKey | None) -> Iterator[LoadedCard]:
        """The newest sound card under `key`, None for any, of every agent that was not deleted;
        tenants in the order given."""
        for tenant in tenants:
            folder = self.files.path("agents", tenant)
            for name in self.files.names(folder):
                try:
                    loaded = self._newest(f"{folder}/{name}", None)
                except (Locked, Unsupported) as error:  # of one agent: others can still be read
                    self.on_fault(error)
                    continue
                if loaded and key in (None, loaded.card.key) and not loaded.card.tombstone:
                    yield loaded

    def tenants(self) -> list[str]:
        """Every tenant that has agents here."""
        return self.files.names(self.files.path("agents"))

    # ---- paths

    def agent_folder(self, agent: AgentId, key: CompatibilityKey) -> str:
        return self.files.path("agents", agent.tenant, agent.digest(key.digest))

    def _card_names(self, folder: str, timeout_s: float | None = None) -> list[tuple[int, int]]:
        names = self.files.names(folder, timeout_s)
        return sorted(found for found in map(parse_name, names) if found)

    def _read_card(self, path: str, key: CompatibilityKey | None) -> LoadedCard:
        return self.decode(self.files.read(path), path, key)

    def decode(self, raw: bytes, path: str, key: CompatibilityKey | None = None) -> LoadedCard:
        """A card's file, opened and verified. Raises CorruptData, Incompatible, Locked."""
        card = decode_card(self.open_card(raw, path), path, key=key, signing_key=self.signing_key)
        home = f"{self.agent_folder(card.agent, card.key)}/{card.name}"
        if path != home:  # a sound card, copied here from another agent, tenant or epoch
            raise CorruptData(path, f"the card inside belongs to {home}")
        return LoadedCard(card, CardRef(card.epoch, card.generation, sha256(raw)))

    def open_card(self, raw: bytes, path: str) -> bytes:
        """A card's file in the clear. Raises Locked, CorruptData."""
        tenant, place = self.place(path)
        return unseal(self.cipher, tenant, place, raw, path)

    def place(self, path: str) -> tuple[str, str]:
        """The tenant of a card's file, and where its encryption says it lies."""
        parts = path.split("/")[-4:]
        return parts[1], "/".join(parts)

    def _nonce(self, path: str) -> str | None:
        """Whose card this is; None if that cannot be said."""
        try:
            return self._read_card(path, None).card.nonce
        except (FileNotFoundError, CorruptData):
            return None
