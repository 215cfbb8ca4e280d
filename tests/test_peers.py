"""Blocks from the disks of other nodes: which place is asked first, what is believed, who is left
alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from actors.config import ReplicaConfig
from actors.rates import Rates
from cluster.decisions import Choice, reasons
from cluster.disks import NodeDisk, RemoteDisk, disk_folder, parse_url
from cluster.placement import Candidate, LinkCost, Location, PlacementConfig, over_peer, place
from storage.card import AgentId, BlockRef, PartRef
from storage.codec import encode_rows, get_codec, tensor_bytes
from storage.errors import CorruptData, StorageError, StoreUnavailable
from storage.links import peer_link
from storage.local import LocalTier
from storage.peers import PAUSE_S, Peers
from storage.store import CacheStore
from storage.tiers import Tiers
from tests.store_contract import AGENT, KEY, SPEC, sample_rows

Q4 = get_codec("q4")
ROWS = encode_rows(SPEC, Q4, sample_rows(16))
RUN = "5a" * 32


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Peer:
    """A node's disk that takes its time, or does not answer."""

    def __init__(self, node: str, folder: Path, clock: Clock | None = None) -> None:
        self.node, self.disk, self.calls = node, NodeDisk(str(folder)), 0
        self.clock, self.takes_s = clock or Clock(), 0.0
        self.instead: Callable[[bytes | None], bytes | None] = lambda raw: raw

    def get(self, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        self.calls += 1
        self.clock.now += self.takes_s
        stored = ref.parts[part]
        return self.instead(self.disk.block(tenant, ref.id, part, stored.sha256, stored.size))

    def sample(self, size: int) -> bytes:
        self.calls += 1
        return self.instead(self.disk.sample(size)) or b""


def silent(_: bytes | None) -> bytes | None:
    raise StoreUnavailable("the disk of a", "no answer in 2.0 s")


class World:
    """A block in the shared store and on the disk of a; b reads."""

    def __init__(self, folder: Path) -> None:
        self.faults: list[StorageError] = []
        self.store = CacheStore(f"file://{folder}/store", on_fault=self.faults.append)
        self.theirs = LocalTier(CacheStore(f"file://{folder}/a"), KEY, 1 << 30)
        self.tiers = Tiers(self.store, SPEC, Q4, 1 << 30)
        self.peer = Peer("a", folder / "a")
        writer = Tiers(self.store, SPEC, Q4, 1 << 30, self.theirs)
        part = writer.write(AGENT, RUN, "full", ROWS)
        assert part is not None
        self.ref = BlockRef(RUN, 16, {"full": part})
        assert writer.upload("acme", RUN, "full", self.ref) == part
        self.asked: list[str] = []
        get = self.store.get_block

        def watched(*block: object) -> bytes | None:
            self.asked.append("store")
            return get(*block)  # type: ignore[arg-type]

        self.store.get_block = watched  # type: ignore[method-assign]
        ask = self.peer.get

        def asked(*block: object) -> bytes | None:
            self.asked.append("peer")
            return ask(*block)  # type: ignore[arg-type]

        self.peer.get = asked  # type: ignore[method-assign]

    def forget(self) -> None:
        """The store has lost it."""
        self.store.files.remove(self.store.block_path("acme", self.ref, "full"))

    def read(self) -> bool:
        self.tiers.pool.evict_all()
        found = self.tiers.read("acme", RUN, 16, "full", None, self.ref, self.peer)
        return found is not None and all((found[name] == ROWS[name]).all() for name in ROWS)

    def measured(self, store_s: float, peer_s: float) -> None:
        """A read of the block takes so long over either."""
        size = self.ref.parts["full"].size
        self.tiers.links["store"].seconds = lambda n: store_s * n / size  # type: ignore[method-assign]
        self.tiers.peers.seconds = lambda node, n: peer_s * n / size  # type: ignore[method-assign]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_nearer_of_store_and_peer_is_asked_first(world: World) -> None:
    for store_s, peer_s, asked in [(0.2, 0.1, ["peer"]), (0.1, 0.2, ["store"])]:
        world.measured(store_s, peer_s)
        world.asked.clear()
        assert world.read()
        assert world.asked == asked


def test_what_the_first_does_not_have_the_other_may(world: World) -> None:
    world.measured(0.1, 0.2)
    world.forget()
    assert world.read()
    assert world.asked == ["store", "peer"]


def test_an_unmeasured_peer_is_asked_and_then_measured(world: World) -> None:
    assert world.read()
    assert world.asked == ["peer"]
    assert peer_link("a") in world.tiers.link_rates()
    assert world.tiers.peers.n_bytes == world.ref.parts["full"].size > tensor_bytes(ROWS)


def test_peers_that_are_met_are_measured_before_they_are_read(tmp_path: Path) -> None:
    """Once, and not all of many; one that is silent does not keep the others from it."""
    peers = Peers()
    some = [Peer(f"n{i}", tmp_path / str(i)) for i in range(10)]
    some[0].instead = silent
    peers.meet(some[:5]).result(10)
    assert sorted(peers.rates()) == ["n1", "n2", "n3", "n4"]
    asked = [peer.calls for peer in some]
    peers.meet(some[1:5]).result(10)
    assert [peer.calls for peer in some] == asked
    peers = Peers()
    peers.meet(some[1:]).result(10)
    assert len(peers.rates()) == 8


@pytest.mark.parametrize("spoil", [lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw + b"x"])
def test_what_a_peer_sends_is_verified(world: World, spoil: Callable[[bytes], bytes]) -> None:
    """I3: refused and counted where the store has sound bytes, an error where nobody has."""
    world.peer.instead = lambda raw: spoil(raw or b"")
    assert world.read()
    assert world.asked == ["peer", "store"]
    assert [type(fault) for fault in world.faults] == [CorruptData]
    assert str(world.faults[0]).startswith("a: ")
    world.forget()
    with pytest.raises(CorruptData, match=r"^a: "):
        world.read()


def test_a_peer_that_is_silent_is_a_miss_and_left_alone_for_a_while(tmp_path: Path) -> None:
    clock = Clock()
    peers, peer, other = Peers(clock), Peer("a", tmp_path), Peer("b", tmp_path)
    ref = BlockRef(RUN, 16, {"full": PartRef("6b" * 32, 10)})
    peer.instead = silent
    assert peers.get(peer, "acme", ref, "full") is None
    for clock.now in (0.0, PAUSE_S - 1):
        assert peers.get(peer, "acme", ref, "full") is None
    assert peer.calls == 1
    assert peers.get(other, "acme", ref, "full") is None
    assert other.calls == 1  # nobody else pays for it
    clock.now = PAUSE_S
    assert peers.get(peer, "acme", ref, "full") is None
    assert peer.calls == 2


def test_a_disk_gives_blocks_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    disk, digest = NodeDisk(str(tmp_path)), "6b" * 32
    assert disk.block("acme", RUN, "full", digest, 1) is None
    for name in [
        ("../..", RUN, "full", digest),
        ("acme", "../../secret", "full", digest),
        ("acme", RUN, "../secret", digest),
        ("acme", RUN, "full", "../secret"),
        ("", RUN, "full", digest),
    ]:
        with pytest.raises(ValueError, match="no block's name"):
            disk.block(*name, 1)


def test_a_file_of_another_size_is_not_sent(world: World) -> None:
    part = world.ref.parts["full"]
    disk = world.peer.disk
    assert disk.block("acme", RUN, "full", part.sha256, part.size) is not None
    assert disk.block("acme", RUN, "full", part.sha256, part.size + 1) is None


# ---- the decision


RATES = Rates(200.0, 0.02, 1e6, 2.0)
STORE, NEAR, FAR = LinkCost(0.0, 2e-4), LinkCost(0.0, 1e-4), LinkCost(0.0, 9e-4)


def test_an_agent_moves_over_the_cheaper_link_or_one_that_nobody_knows() -> None:
    at_a, lags = Location("a", 1000), Location("a", 1000, lag=4000)
    assert over_peer({"store": STORE}, at_a)
    assert over_peer({"store": STORE, peer_link("a"): NEAR}, at_a)
    assert not over_peer({"store": STORE, peer_link("a"): FAR}, at_a)
    assert over_peer({"store": STORE, peer_link("a"): FAR}, lags)  # the store may take nothing
    assert over_peer({"store": STORE, peer_link("b"): FAR}, at_a)
    assert over_peer({"store": STORE, peer_link("a"): FAR}, Location("a"))  # nothing reported yet


@pytest.mark.parametrize(("cost", "source"), [(NEAR, "from a's disk"), (FAR, "from the store")])
def test_the_reasons_say_where_the_rows_come_from(cost: LinkCost, source: str) -> None:
    free = PlacementConfig(0.0, 0.0, 0.0, 0.0)
    busy = Candidate("a", 60.0, RATES, 0.0, 1, {"store": STORE})
    idle = Candidate("b", 0.0, RATES, 0.0, 0, {"store": STORE, peer_link("a"): cost})
    where = Location("a", 2000)
    placement = place(100, 10, where, [busy, idle], free)
    assert placement.node == "b"
    choice = Choice(0.0, "t", AgentId("t", "s"), "b", where, 100, 10, "soft", placement)
    assert any(f"bringing the rows {source} takes" in line for line in reasons(choice, free))


def test_which_disks_there_are() -> None:
    assert disk_folder(ReplicaConfig()) == ""
    assert disk_folder(ReplicaConfig(local="/disk")) == "/disk"
    assert disk_folder(ReplicaConfig(local="/disk", local_bytes=0)) == ""
    assert disk_folder(ReplicaConfig(store="cluster:///home/kv?replicas=3")) == "/home/kv"
    assert parse_url("cluster:///home/kv/") == ("/home/kv", 2)


def test_a_link_without_reads_has_no_price() -> None:
    peers = Peers()
    assert peers.seconds("a", 1 << 20) == 0.0
    peers._link("a")
    assert (peers.seconds("a", 3), peers.rates()) == (0.0, {})


def test_a_remote_disk_that_fails_is_unavailable() -> None:
    class Dead:
        def __getattr__(self, name: str) -> object:
            raise ConnectionError("the actor is dead")

    ref = BlockRef(RUN, 16, {"full": PartRef("6b" * 32, 10)})
    with pytest.raises(StoreUnavailable, match="the disk of a: the actor is dead"):
        RemoteDisk("a", Dead()).get("acme", ref, "full")
