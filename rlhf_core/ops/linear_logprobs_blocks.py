"""The loops of `linear_token_logprobs` over rows and vocabulary, ordered for memory locality.

Only counted rows are computed, in chunks. Each chunk is processed in blocks of the vocabulary that
share one workspace. A matrix product fills the workspace and the row kernel of `token_logprobs`
reads it; the results of the blocks are then joined to log-prob, entropy and logsumexp of each row.
Backward refills the workspace, lets the row kernel turn logits into gradients in place, and
multiplies these by the weight and the hidden states. Each row of the weight, and of its gradient,
passes through memory once per chunk.

With a frozen head and no entropy, the log-probs determine the gradient of the hidden states up to a
factor per row. On GPU the forward then computes it at once, from fewer rows with the whole
vocabulary, and backward only scales it: two matrix products instead of three. On CPU,
products of so few rows cost more than the third product saves.

If the caller asks for it, a kernel that keeps the logits on the chip takes the place of product and
row kernel. Its splits of the vocabulary are joined like blocks, and its backward stores a block of
gradients.

If the caller passes its loss (`loss_of`), the forward also computes the gradients of hidden states
and head at once, from whole rows: three products instead of four.

The rows of the head may lie on several ranks (`Shard`). A rank is then one more level of blocks:
`_join` also takes the ranks' maxima and sums.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.ops.vocab_parallel import Shard

# Sizes of a chunk and a block. On CPU their logits roughly fill the last-level cache. On GPU the
# matrix products are just large enough to keep the device busy.
CPU_CHUNK_ROWS, CPU_BLOCK = 1024, 2048
GPU_CHUNK_ROWS, GPU_BLOCK = 8192, 16384
ON_CHIP = 0  # as chunk_rows: no row's logits are in memory
# Maximum number of logits in whole rows. Products of fewer rows cost more for each.
CPU_WHOLE, GPU_WHOLE = 2**25, GPU_CHUNK_ROWS * GPU_BLOCK


class TokenStatistics(NamedTuple):
    """Statistics of the model's distribution at each target token, all of shape (...)."""

    logprobs: Tensor  # nats
    entropy: Tensor  # nats
    likeliest: Tensor | None = None  # bool: no token is more likely than the target


def forward(
    impl, hidden, weight, bias, targets, mask, temperature, chunk_rows, with_entropy,
    with_likeliest, with_dhidden, shard=None,
):  # fmt: skip
    """Statistics of the rows, and the gradient of logprobs with respect to hidden.

    Args: hidden (N, D), targets and mask (N,), temperature a number or (N,). shard: the place of
    weight in the head, without with_dhidden; None if it is all of it.

    Returns: logprobs (N,), entropy (N,) or None, likeliest (N,) uint8 or None, lse (N, 2), dhidden
    (N, D) or None. With dhidden each block spans the whole vocabulary.
    """
    logprobs = hidden.new_zeros(len(hidden), dtype=torch.float32)
    entropy = torch.zeros_like(logprobs) if with_entropy else None
    likeliest = torch.zeros_like(logprobs, dtype=torch.uint8) if with_likeliest else None
    lse = logprobs.new_zeros((len(hidden), 2))
    dhidden = torch.zeros_like(hidden) if with_dhidden else None
    shard, width = shard or Shard.whole(weight), _width(hidden, weight)
    if with_dhidden:
        width, chunk_rows = len(weight), max(1, chunk_rows * width // len(weight))
    for rows, y, T in _chunks(targets, mask, temperature, chunk_rows):
        rest = (y, T, with_entropy, with_likeliest, shard)
        if chunk_rows == ON_CHIP:
            logp, H, L, likely = _statistics_on_chip(impl, hidden[rows], weight, bias, *rest)
        else:
            logits = _blocks(hidden[rows], weight, bias, width)
            if with_dhidden:
                logits = list(logits)  # one block, which is used again
            logp, H, L, likely = _statistics(impl, logits, *rest)
        logprobs[rows], lse[rows] = logp[0], L[0]
        if with_entropy:
            entropy[rows] = H[0]
        if with_likeliest:
            likeliest[rows] = likely[0].to(torch.uint8)
        if with_dhidden:
            ones = torch.ones_like(logp)
            z = logits[0][1]
            (dlogits,) = impl.token_logprobs_bwd(ones, None, z, y, None, T, None, L, True)
            dhidden[rows] = dlogits @ weight
    return logprobs, entropy, likeliest, lse, dhidden


def _statistics(impl, blocks, y, T, with_entropy, with_likeliest, shard):
    """Log-prob (1, n), entropy (1, n) or None, lse (1, n, 2), likeliest (1, n) or None of rows.

    blocks: start, among the rows of this rank, and logits (1, n, width) of each block.
    """
    parts, tops = [], []
    for start, logits in blocks:
        whole = logits.shape[-1] == shard.size
        # A target of another block must not seem out of range here. `_join` picks its block.
        place = y - shard.first - start
        inside = place.clamp(0, logits.shape[-1] - 1)
        here = y if whole else inside
        part = impl.token_logprobs_fwd(logits, here, None, T, with_entropy, True)
        parts.append((*part, place == inside))
        if with_likeliest:
            own = logits.gather(-1, inside[..., None])[..., 0].where(place == inside, -math.inf)
            tops.append(torch.stack((own, logits.amax(dim=-1))))  # (2, 1, n)
    if whole:
        logp, H, L = parts[0][:3]
    else:
        stacked = (None if part[0] is None else torch.stack(part) for part in zip(*parts))
        logp, H, L = _join(*stacked, y, T, shard)
    return logp, H, L, _likeliest(torch.stack(tops), logp, shard) if with_likeliest else None


def _statistics_on_chip(
    impl, h, weight, bias, y, T, with_entropy, with_likeliest, shard
):  # fmt: skip
    """The same of hidden states h (n, D), whose logits never are in memory."""
    found = impl.linear_logprobs_fwd(h, weight, bias, y - shard.first, T, with_entropy)
    own, has_target, H, lse = (None if x is None else x[:, None] for x in found)
    logp = (own - lse[..., 0]) / T - lse[..., 1]
    logp, H, L = _join(logp, H, lse, has_target, y, T, shard)
    tops = torch.stack((own.where(has_target, -math.inf), lse[..., 0]), dim=1)
    return logp, H, L, _likeliest(tops, logp, shard) if with_likeliest else None


def _likeliest(tops, logp, shard):
    """Whether no token is more likely than the target (1, n).

    tops: (blocks, 2, 1, n), the target's logit, or -inf if the block lacks it, and the largest one.
    """
    own, top = shard.largest(tops.amax(dim=0).float())
    return (own == top) & ~logp.isnan()  # a maximum over ranks may lose a NaN


def _join(logp, H, lse, has_target, y, T, shard):
    """Log-probs, entropy and lse of rows, joined from those of the blocks on all ranks.

    logp (blocks, 1, n), H (blocks, 1, n) or None, lse (blocks, 1, n, 2), and whether a block has
    the target (blocks, 1, n), for the blocks of this rank. A block with L and H has the share
    w = exp(L - lse) of the probability. The entropy is lse + sum w (H - L).
    """
    offset, rest = lse.double().unbind(-1)
    top = shard.largest(offset.amax(dim=0))
    L = rest + (offset - top) / T
    L = L.where(~offset.isneginf(), -math.inf)  # not NaN for a block without probability
    mass = L.exp()  # of each block, relative to top
    own = (logp.masked_fill(L.isneginf(), 0) + L).where(has_target, 0)
    terms = [mass, own]
    if H is not None:
        terms.append((mass * (H - L)).where(mass != 0, 0))
    mass, own, *spread = shard.total(torch.stack(terms).sum(dim=1))  # (1, n) each
    total = mass.log()
    # NaN if the target is out of range, or if no token has any probability.
    total = total.where((y >= 0) & (y < shard.size) & (mass != 0), math.nan)
    logp = (own - total).clamp_max(0).float()
    H = (total + spread[0] / mass).clamp_min(0).float() if spread else None
    return logp, H, torch.stack((top, total), dim=-1).float()


def backward(
    impl, dlogprobs, dentropy, hidden, weight, bias, targets, mask, temperature, entropy, lse,
    chunk_rows, needs, shard=None,
):  # fmt: skip
    """Gradients of hidden, weight and bias where `needs` is True, else None; sums are float32."""
    shard, width = shard or Shard.whole(weight), _width(hidden, weight)
    chunks = list(_chunks(targets, mask, temperature, chunk_rows))
    dhidden = torch.zeros_like(hidden, dtype=shard.sum_dtype(hidden)) if needs[0] else None
    if needs[1]:
        dweight = torch.empty_like(weight, dtype=torch.float32 if len(chunks) > 1 else weight.dtype)
        dweight = dweight if chunks else dweight.zero_()
    dbias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
    for i, (rows, y, T) in enumerate(chunks):
        h, y, L = hidden[rows], y - shard.first, lse[rows][None]
        g, dH, H = (None if x is None else x[rows][None] for x in (dlogprobs, dentropy, entropy))
        if needs[0]:
            dh = torch.empty_like(h, dtype=torch.float32 if width < len(weight) else h.dtype)
        gradients = _dlogits_on_chip if chunk_rows == ON_CHIP else _dlogits
        for start, dlogits in gradients(impl, h, weight, bias, width, g, dH, y, T, H, L):
            block = slice(start, start + dlogits.shape[-1])
            if needs[0]:
                add_product(dh, dlogits, weight[block], first=start == 0)
            if needs[1]:
                add_product(dweight[block], dlogits.T, h, first=i == 0)
            if needs[2]:
                dbias[block] += dlogits.sum(dim=0, dtype=torch.float32)
        if needs[0]:
            dhidden[rows] = dh.to(dhidden.dtype)
    return (
        shard.total(dhidden).to(hidden.dtype) if needs[0] else None,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
    )


def _dlogits(impl, h, weight, bias, width, g, dH, y, T, H, L):
    """Start and gradient (n, width) of the logits of each block of the vocabulary."""
    for start, logits in _blocks(h, weight, bias, width):
        yield start, impl.token_logprobs_bwd(g, dH, logits, y - start, None, T, H, L, True)[0]


def _dlogits_on_chip(impl, h, weight, bias, width, g, dH, y, T, H, L):
    """The same, from logits that never are in memory."""
    for start in range(0, len(weight), width):
        block = slice(start, start + width)
        b = None if bias is None else bias[block]
        yield start, impl.linear_logprobs_bwd(g, dH, h, weight[block], b, y - start, T, H, L)


def loss_and_gradients(
    impl, hidden, weight, bias, targets, temperature, losses, sizes, with_likeliest, needs, extras,
    shard=None,
):  # fmt: skip
    """The loss of all rows, chunk by chunk of whole groups, and its gradients.

    Returns: the results of `losses`, the first one summed over the chunks and the others
    concatenated; the gradients of hidden, weight and bias where `needs` is True, else None, and
    those of the extras.
    """
    shard, N, V = shard or Shard.whole(weight), len(hidden), len(weight)
    most = max(1, (GPU_WHOLE if hidden.is_cuda else CPU_WHOLE) // shard.widest)
    most = math.ceil(N / math.ceil(N / most))  # chunks of about the same size
    workspace, results, dextras = None, [], [torch.zeros_like(x) for x in extras]
    dhidden = torch.empty_like(hidden, dtype=shard.sum_dtype(hidden)) if needs[0] else None
    dweight = torch.empty_like(weight, dtype=torch.float32) if needs[1] else None
    dbias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
    for groups, rows in _whole_groups(N, sizes, most):
        h, y = hidden[rows], targets[rows][None]
        T = temperature[rows][None] if isinstance(temperature, Tensor) else temperature
        if workspace is None or len(workspace) < len(h) * V:
            workspace = h.new_empty(max(len(h), min(most, N)) * V)
        ((_, logits),) = _blocks(h, weight, bias, V, workspace)
        rest = (T, True, with_likeliest, shard)
        logprobs, entropy, L, likeliest = _statistics(impl, [(0, logits)], y, *rest)
        with torch.enable_grad():
            own_extras = [x[rows].detach().requires_grad_() for x in extras]
            leaves = logprobs[0].requires_grad_(), entropy[0].requires_grad_()
            likely = None if likeliest is None else likeliest[0]
            loss, *outputs = losses(TokenStatistics(*leaves, likely), groups, *own_extras)
            g, dH, *dx = torch.autograd.grad(loss, (*leaves, *own_extras), allow_unused=True)
        for total, part in zip(dextras, dx):
            if part is not None:
                total[rows] = part
        results.append((loss.detach(), *(x.detach() for x in outputs)))
        if g is None:
            g = torch.zeros_like(logprobs[0])
        dH, H = (None, None) if dH is None else (dH[None], entropy.detach())
        y = y - shard.first
        (dlogits,) = impl.token_logprobs_bwd(g[None], dH, logits, y, None, T, H, L, True)
        if needs[0]:
            add_product(dhidden[rows], dlogits, weight, first=True)
        if needs[1]:
            add_product(dweight, dlogits.T, h, first=rows.start == 0)
        if needs[2]:
            dbias += dlogits.sum(dim=0, dtype=torch.float32)
    losses_of_chunks, *columns = zip(*results)
    return (
        (sum(losses_of_chunks), *map(torch.cat, columns)),
        (
            shard.total(dhidden).to(hidden.dtype) if needs[0] else None,
            dweight.to(weight.dtype) if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            *dextras,
        ),
    )


def _whole_groups(count: int, sizes: Tensor | None, most: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the groups and of the rows of each chunk: at most `most` rows, or one group.

    An empty group joins the chunk before it.
    """
    if sizes is None:
        for start in range(0, count, most):
            yield slice(start, start + most), slice(start, start + most)
        return
    first = begin = end = 0
    for group, size in enumerate(sizes.tolist()):
        if size and end > begin and end + size - begin > most:
            yield slice(first, group), slice(begin, end)
            first, begin = group, end
        end += size
    if end > begin:
        yield slice(first, len(sizes)), slice(begin, end)


def add_product(total, a, b, first):
    """total += a @ b, or total = a @ b the first time."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _counted(targets, mask):
    """Indices of the counted rows."""
    if mask is None:
        return torch.arange(len(targets), device=targets.device)
    return mask.nonzero()[:, 0]


def _chunks(targets, mask, temperature, chunk_rows):
    """Row indices (n,), targets (1, n) and temperature, a number or (1, n), of each chunk."""
    counted = _counted(targets, mask)
    most = GPU_CHUNK_ROWS if chunk_rows == ON_CHIP else chunk_rows
    for rows in counted.split(most) if len(counted) else ():
        T = temperature[rows][None] if isinstance(temperature, Tensor) else temperature
        yield rows, targets[rows][None], T


def _blocks(h, weight, bias, width, workspace=None):
    """Start and logits (1, n, width) of each block of the vocabulary for rows h (n, D).

    All blocks share one workspace, so the next block overwrites the logits.
    """
    workspace = h.new_empty(len(h) * min(width, len(weight))) if workspace is None else workspace
    # On CPU, float32 products of few rows are up to a quarter faster block by block.
    step = CPU_BLOCK if h.is_cpu and h.dtype == torch.float32 else width
    for start in range(0, len(weight), width):
        w = weight[start : start + width]
        logits = workspace[: len(h) * len(w)].view(len(h), len(w))
        for first in range(0, len(w), step):
            block, out = w[first : first + step], logits[:, first : first + step]
            if bias is None:
                torch.mm(h, block.T, out=out)
            else:
                torch.addmm(bias[start + first :][: len(block)], h, block.T, out=out)
        yield start, logits[None]


def _width(hidden, weight):
    return min(len(weight), GPU_BLOCK if hidden.is_cuda else CPU_BLOCK)
