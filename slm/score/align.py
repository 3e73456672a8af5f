"""The loss of one tokenizer's tokens as that of another's, over the same text."""

import numpy as np


def blocks(ends: np.ndarray, shared: np.ndarray) -> np.ndarray:  # (n,) -> (n,) int64
    """The block of each token: the first that ends no earlier; of no bytes at the start, the first.

    shared: ascending ends of the blocks
    """
    return np.searchsorted(shared, ends, side="left")


def shared_logprobs(
    ours: np.ndarray,  # (n,) bytes of our tokens
    theirs: np.ndarray,  # (m,) bytes of the reference's tokens, of the same text
    logprobs: np.ndarray,  # (m,) of the reference's tokens
) -> np.ndarray:  # (n,) float64
    """The reference's log-probs on our tokens; EOS of both stands at neither end.

    Both sequences are cut where a token of each ends at the same byte. The log-prob of a block is
    the sum of the reference's tokens in it, and a token of ours in the block gets the share of its
    bytes: block * bytes of the token / bytes of the block. A token of no bytes gets 0. Where each
    token is a block of its own, this is a copy. Computed in float64 and rounded once, when it is
    stored: the sums over a document are those of the reference to that rounding, half a unit in the
    last place of a token at most.

    A text that was cut ends where ours does: of the reference's block there our tokens get the
    shares of the bytes that they have. Bytes of ours that the reference has not read count as none.
    """
    total = int(theirs.sum())
    our_ends, their_ends = np.minimum(np.cumsum(ours), total), np.cumsum(theirs)
    if not len(ours) or not total:
        return np.zeros(len(ours))
    reached = our_ends[-1]
    read = np.searchsorted(their_ends, reached, side="left") + 1  # tokens, to the end of our text
    read += np.searchsorted(their_ends[read:], their_ends[read - 1], side="right")
    their_ends, logprobs = their_ends[:read], logprobs[:read].astype(np.float64)
    shared = np.intersect1d(our_ends[our_ends > 0], their_ends[their_ends > 0])
    if not len(shared) or shared[-1] != their_ends[-1]:  # ours was cut within their last block
        shared = np.append(shared, their_ends[-1])
    sums = np.bincount(blocks(their_ends, shared), logprobs, len(shared))
    widths = np.diff(shared, prepend=0)
    mine = blocks(our_ends, shared)
    return sums[mine] * np.diff(our_ends, prepend=0) / widths[mine]
