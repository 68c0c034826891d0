"""How `linear_token_logprobs` goes through rows and vocabulary, in the order in which memory likes it.

Only counted rows are computed. They are packed and pass in chunks, a chunk in blocks of the vocabulary, through one
workspace: a matrix product fills it, the row kernel of `token_logprobs` reads it, and what it says of the blocks joins
to log-prob, entropy and logsumexp of the rows. Backward fills the workspace again, lets the row kernel turn logits into
gradients in place, and multiplies these by the weight and the hidden states: every row of the weight, and of its
gradient, passes through memory once a chunk.

With a frozen head and no entropy the gradient of the hidden states is known up to a factor per row as soon as the
log-probs are. On a GPU the forward then computes it on the spot, from fewer rows with the whole vocabulary, and
backward only scales it: two matrix products in all, not three. On a CPU so few rows cost more than the third product.

Where the caller says what it will make of the log-probs (`loss_of`), the forward takes the gradients of hidden states
and head on the spot too, from whole rows: three products instead of four.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Of a chunk and a block: on CPU about its last-level cache of logits, on a GPU what keeps the matrix products busy.
CPU_CHUNK_ROWS, CPU_BLOCK = 1024, 2048
GPU_CHUNK_ROWS, GPU_BLOCK = 8192, 16384
# Logits of whole rows at a time. On CPU 30 MB: of more, glibc would hand back the memory at every free.
CPU_WHOLE, GPU_WHOLE = 30 * 2**18, GPU_CHUNK_ROWS * GPU_BLOCK


def forward(
    impl,
    hidden,
    weight,
    bias,
    targets,
    mask,
    temperature,
    chunk_rows,
    with_entropy,
    with_likeliest,
    with_dhidden,
):
    """hidden (N, D), targets and mask (N,), temperature a number or (N,) -> logprobs (N,), entropy (N,) or None,
    likeliest (N,) uint8 or None, lse (N, 2), and the gradient of logprobs with respect to hidden (N, D) or None, for
    which a chunk's rows are whole.
    """
    logprobs = hidden.new_zeros(len(hidden), dtype=torch.float32)
    entropy = torch.zeros_like(logprobs) if with_entropy else None
    likeliest = torch.zeros_like(logprobs, dtype=torch.uint8) if with_likeliest else None
    lse = logprobs.new_zeros((len(hidden), 2))
    dhidden = torch.zeros_like(hidden) if with_dhidden else None
    width = _width(hidden, weight)
    if with_dhidden:
        width, chunk_rows = len(weight), max(1, chunk_rows * width // len(weight))
    for rows, y, T in _chunks(targets, mask, temperature, chunk_rows):
        parts, tops = [], []
        for start, logits in _blocks(hidden[rows], weight, bias, width):
            # A target of another block must not look out of range here; `_join` knows where it is.
            inside = (y - start).clamp(0, logits.shape[-1] - 1)
            here = y if width >= len(weight) else inside
            parts.append(impl.token_logprobs_fwd(logits, here, None, T, with_entropy, True))
            if with_likeliest:
                own = logits.gather(-1, inside[..., None])[..., 0].where(
                    inside == y - start, -math.inf
                )
                tops.append(torch.cat((own, logits.amax(dim=-1))))  # (2, n)
        logp, H, L = parts[0] if len(parts) == 1 else _join(parts, y, T, width, len(weight))
        logprobs[rows], lse[rows] = logp[0], L[0]
        if with_entropy:
            entropy[rows] = H[0]
        if with_likeliest:
            own, top = torch.stack(tops).amax(dim=0)
            likeliest[rows] = (own == top).to(torch.uint8)
        if with_dhidden:
            ones = torch.ones_like(logp)
            (dlogits,) = impl.token_logprobs_bwd(ones, None, logits, y, None, T, None, L, True)
            dhidden[rows] = dlogits @ weight
    return logprobs, entropy, likeliest, lse, dhidden


def _join(parts, y, T, width, V):
    """log-probs, entropy and lse of rows from those of their blocks: with a block's L and H, and w = exp(L - lse) its
    share of the probability, the entropy is sum w (H + lse - L)."""
    logp, H, lse = (
        None if part[0] is None else torch.stack(part).double() for part in zip(*parts)
    )  # (blocks, 1, n)
    offset, rest = lse.unbind(-1)
    top = offset.amax(dim=0)
    L = (rest + (offset - top) / T).where(
        offset != -math.inf, -math.inf
    )  # of a block that has no probability: no NaN
    total = L.logsumexp(dim=0)  # (1, n)
    total = total.where(
        (y >= 0) & (y < V) & (total != -math.inf), math.nan
    )  # no target, or nothing possible at all
    if H is not None:
        share = (L - total).exp()
        H = (share * (H + total - L)).where(share != 0, 0).sum(dim=0).float()
    block = (y // width).clamp(0, len(parts) - 1)[None]
    own = L.gather(0, block)
    logp = (logp.gather(0, block).where(own != -math.inf, 0) + own - total)[0].clamp_max(0)
    return logp.float(), H, torch.stack((top, total), dim=-1).float()


def backward(
    impl,
    dlogprobs,
    dentropy,
    hidden,
    weight,
    bias,
    targets,
    mask,
    temperature,
    entropy,
    lse,
    chunk_rows,
    needs,
):
    """Gradients of hidden, weight and bias, those that `needs` says, else None. Sums of several parts are float32."""
    width = _width(hidden, weight)
    chunks = list(_chunks(targets, mask, temperature, chunk_rows))
    dhidden = torch.zeros_like(hidden) if needs[0] else None
    if needs[1]:
        dweight = torch.empty_like(weight, dtype=torch.float32 if len(chunks) > 1 else weight.dtype)
        dweight = dweight if chunks else dweight.zero_()
    dbias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
    for i, (rows, y, T) in enumerate(chunks):
        h, L = hidden[rows], lse[rows][None]
        g, dH, H = (None if x is None else x[rows][None] for x in (dlogprobs, dentropy, entropy))
        dh = (
            torch.empty_like(h, dtype=torch.float32 if width < len(weight) else h.dtype)
            if needs[0]
            else None
        )
        for start, logits in _blocks(h, weight, bias, width):
            block = slice(start, start + logits.shape[-1])
            (dlogits,) = impl.token_logprobs_bwd(
                g, dH, logits, y - start, None, T, H, L, True
            )  # (n, width)
            if needs[0]:
                _add_product(dh, dlogits, weight[block], first=start == 0)
            if needs[1]:
                _add_product(dweight[block], dlogits.T, h, first=i == 0)
            if needs[2]:
                dbias[block] += dlogits.sum(dim=0, dtype=torch.float32)
        if needs[0]:
            dhidden[rows] = dh.to(hidden.dtype)
    return (
        dhidden,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
    )


def forward_and_gradients(
    impl,
    hidden,
    weight,
    bias,
    targets,
    mask,
    temperature,
    loss_of,
    sizes,
    with_entropy,
    with_likeliest,
    needs,
):
    """logprobs, entropy and likeliest as from `forward`, lse; the gradient of the loss with respect to logprobs (N,),
    and those with respect to hidden, weight and bias that `needs` says, else None."""
    logprobs, expected = hidden.new_zeros((2, len(hidden)), dtype=torch.float32)
    entropy = torch.zeros_like(logprobs) if with_entropy else None
    likeliest = torch.zeros_like(logprobs, dtype=torch.uint8) if with_likeliest else None
    lse = logprobs.new_zeros((len(hidden), 2))
    most = max(1, (GPU_WHOLE if hidden.is_cuda else CPU_WHOLE) // len(weight))
    counted = (
        torch.arange(len(targets), device=targets.device) if mask is None else mask.nonzero()[:, 0]
    )
    dhidden = torch.zeros_like(hidden) if needs[0] else None
    if needs[1]:
        dweight = torch.empty_like(weight, dtype=torch.float32)
        dweight = dweight if len(counted) else dweight.zero_()
    dbias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
    workspace = None
    for groups, part in _whole_groups(len(counted), sizes, most):
        rows = counted[part]
        h, y = hidden[rows], targets[rows][None]
        T = temperature[rows][None] if isinstance(temperature, Tensor) else temperature
        if workspace is None or len(workspace) < len(rows) * len(weight):
            workspace = h.new_empty(max(len(rows), min(most, len(counted))) * len(weight))
        ((_, logits),) = _blocks(h, weight, bias, len(weight), workspace)
        (logprobs[rows],), H, L = impl.token_logprobs_fwd(logits, y, None, T, with_entropy, True)
        lse[rows] = L[0]
        if with_entropy:
            entropy[rows] = H[0]
        if with_likeliest:
            own = logits.gather(-1, y.clamp(0, len(weight) - 1)[..., None])[..., 0]
            likeliest[rows] = (own == logits.amax(dim=-1))[0].to(torch.uint8)
        with torch.enable_grad():
            free = logprobs[rows].requires_grad_()
            (g,) = torch.autograd.grad(loss_of(free, groups), free)
        expected[rows] = g
        (dlogits,) = impl.token_logprobs_bwd(g[None], None, logits, y, None, T, None, L, True)
        if needs[0]:
            dhidden[rows] = dlogits @ weight
        if needs[1]:
            _add_product(dweight, dlogits.T, h, first=part.start == 0)
        if needs[2]:
            dbias += dlogits.sum(dim=0, dtype=torch.float32)
    gradients = (
        dhidden,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
    )
    return logprobs, entropy, likeliest, lse, expected, gradients


def _whole_groups(count: int, sizes: Tensor | None, most: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of at most `most` of `count` rows, or of one group: the slices of its groups and of their rows."""
    if sizes is None:
        for start in range(0, count, most):
            yield slice(start, start + most), slice(start, start + most)
        return
    first = begin = end = 0
    for group, size in enumerate(sizes.tolist()):
        if end > begin and end + size - begin > most:
            yield slice(first, group), slice(begin, end)
            first, begin = group, end
        end += size
    if end > begin:
        yield slice(first, len(sizes)), slice(begin, end)


def _add_product(total, a, b, first):
    """total += a @ b; the first time total holds nothing yet."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _chunks(targets, mask, temperature, chunk_rows):
    """For every chunk of counted rows: their indices (n,), targets (1, n) and temperature, a number or (1, n)."""
    counted = (
        torch.arange(len(targets), device=targets.device) if mask is None else mask.nonzero()[:, 0]
    )
    for rows in counted.split(chunk_rows) if len(counted) else ():
        yield (
            rows,
            targets[rows][None],
            temperature[rows][None] if isinstance(temperature, Tensor) else temperature,
        )


def _blocks(h, weight, bias, width, workspace=None):
    """The logits (1, n, width) of rows h (n, D), one block of the vocabulary after another, in one workspace."""
    workspace = h.new_empty(len(h) * min(width, len(weight))) if workspace is None else workspace
    for start in range(0, len(weight), width):
        w = weight[start : start + width]
        logits = workspace[: len(h) * len(w)].view(len(h), len(w))
        if bias is None:
            torch.mm(h, w.T, out=logits)
        else:
            torch.addmm(bias[start : start + width], h, w.T, out=logits)
        yield start, logits[None]


def _width(hidden, weight):
    return min(len(weight), GPU_BLOCK if hidden.is_cuda else CPU_BLOCK)
