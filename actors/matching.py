"""Where does a prompt continue an agent's history, and what are the names of its beginnings? Pure:
branches and token ids in, a Match or ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.branches import Branch
from actors.prompt import EmittedReply, common_prefix
from storage.cache_file import Chain

MIN_SHARED = 32  # tokens; fewer are computed faster than they are shared


@dataclass(frozen=True)
class Match:
    """Where a prompt continues: `branch` is the one it lives in, `source` the one it forks from.

    The first `keep` tokens are in `source` (or, without one, in `branch`) already.
    """

    branch: Branch
    source: Branch | None
    keep: int
    dropped: Branch | None = None  # the least recently used one, over the limit


def match(
    branches: Sequence[Branch],
    encode: Callable[[Sequence[EmittedReply]], list[int]],
    replies_of: Callable[[Branch], list[EmittedReply]],
    *,
    emitted: Sequence[int] = (),
    max_branches: int,
) -> tuple[list[int], Match]:
    """(prompt ids, where they continue).

    `encode` makes the prompt from the replies of a branch; `emitted` follows it, in a turn that is
    resumed. EXTEND, or a prompt that parts inside the last reply, goes on in its branch. A prompt
    that parts earlier opens a branch and leaves the one it parted from as it is.
    """
    best: tuple[int, list[int], Branch] | None = None
    encoded: dict[tuple[EmittedReply, ...], list[int]] = {}
    for branch in sorted(branches, key=lambda b: b.last_used, reverse=True):
        replies = tuple(replies_of(branch))
        if replies not in encoded:
            encoded[replies] = encode(replies)
        common = common_prefix(branch.tokens, [*encoded[replies], *emitted])
        if best is None or common > best[0]:
            best = (common, encoded[replies], branch)
    if best is None:
        return encode(()), Match(Branch(0), None, 0)
    keep, prompt, branch = best
    if keep >= branch.last_reply_start:
        return prompt, Match(branch, None, keep)
    fresh = Branch(1 + max(b.id for b in branches))
    dropped = None
    if len(branches) >= max_branches:
        dropped = min(
            (b for b in branches if b is not branch),
            key=lambda b: b.last_used,
            default=None,
        )
    return prompt, Match(fresh, branch if keep else None, keep, dropped)


def prefix_ids(chain: Chain, tokens: Sequence[int], block_tokens: int) -> tuple[str, ...]:
    """Names of a prompt's beginnings: of its first MIN_SHARED tokens, then of every whole block
    (its id). Empty for a prompt that is shorter."""
    if len(tokens) < MIN_SHARED:
        return ()
    ids, parent = [chain.segment_id("", tokens[:MIN_SHARED], 0)], ""
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = chain.block_id(parent, tokens[start : start + block_tokens])
        ids.append(parent)
    return tuple(ids)
