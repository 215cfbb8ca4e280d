"""How an engine computes: what changes its speed and memory, and not what it serves. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

KV_TYPES = ("f16", "q8_0", "q4_1", "q4_0")  # the better kept first
# How OpenMP's threads wait for each other, told before llama.cpp is loaded. A wait that ends in
# sleep costs more than what was waited for, and threads that others interrupt wait often: on two
# cores that carry a cluster, too, two decode at 0.86 of llama-server's rate with 30,000 looks, at
# 0.94 with 300,000, at 0.93 to 0.96 with a million (20 ms on x86). Where libgomp has more threads
# than there are cores, it looks 1,000 times if "active", else 100.
WAITING = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "1000000"}
MAX_UBATCH = 512


@dataclass(frozen=True)
class EngineOptions:
    threads: int
    flash_attention: bool = True
    kv_type: str = "f16"  # of the cells, see KV_TYPES
    ubatch: int = MAX_UBATCH  # tokens computed at once

    def check(self) -> None:
        """Raises ValueError for what no engine can do."""
        if self.kv_type not in KV_TYPES:
            raise ValueError(f"kv_type = {self.kv_type!r}: one of {', '.join(KV_TYPES)}")
        if not self.flash_attention and self.kv_type != "f16":
            raise ValueError(f"kv_type = {self.kv_type}: wants flash attention")
        if not 1 <= self.ubatch <= MAX_UBATCH:
            raise ValueError(f"ubatch = {self.ubatch}: must be between 1 and {MAX_UBATCH}")
        if self.threads < 1:
            raise ValueError(f"threads = {self.threads}: must be 1 or more")

    def __str__(self) -> str:
        attention = "flash attention" if self.flash_attention else "no flash attention"
        return f"{self.threads} threads, {attention}, {self.kv_type}, ubatch {self.ubatch}"

    def changed(self, name: str, value: object) -> EngineOptions:
        return replace(self, **{name: value})  # type: ignore[arg-type]
